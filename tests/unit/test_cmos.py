"""The real-time clock of a PC, and the memory beside it."""

from __future__ import annotations

from calendar import timegm

import pytest

from pykvm.devices.cmos import Cmos
from tests.support.ports import Ports


class Clock:
    """Seconds since 1970, that stand still."""

    def __init__(self, *date: int) -> None:
        self.now = float(timegm((*date, 0, 0, 0)))

    def __call__(self) -> float:
        return self.now


class Rtc:
    def __init__(self, ports: Ports, clock: Clock, **options: int) -> None:
        self.ports = ports
        self.device = Cmos(clock=clock, **options)
        self.device.attach(ports.pio, 0x70)

    def __getitem__(self, register: int) -> int:
        self.ports.out(0x70, 0x80 | register)  # with NMIs off, as Linux has it
        return self.ports.inp(0x71)

    def __setitem__(self, register: int, value: int) -> None:
        self.ports.out(0x70, register)
        self.ports.out(0x71, value)

    def time(self) -> list[int]:
        return [self[register] for register in (0x32, 9, 8, 7, 4, 2, 0)]


AFTERNOON = (2024, 2, 29, 23, 58, 7)


def test_the_clock_shows_the_time_in_every_format(ports: Ports) -> None:
    rtc = Rtc(ports, Clock(*AFTERNOON))
    assert rtc.time() == [0x20, 0x24, 0x02, 0x29, 0x23, 0x58, 0x07]
    assert rtc[6] == 5  # a Thursday
    rtc[0xB] = 0x06
    assert rtc.time() == [20, 24, 2, 29, 23, 58, 7]
    rtc[0xB] = 0x00
    assert rtc[4] == 0x91
    rtc[0xB] = 0x04
    assert rtc[4] == 0x8B


@pytest.mark.parametrize(("hour", "shown"), [(0, 0x12), (1, 0x01), (12, 0x92), (13, 0x81)])
def test_twelve_hours_have_no_zero(ports: Ports, hour: int, shown: int) -> None:
    rtc = Rtc(ports, Clock(2024, 1, 1, hour, 0, 0))
    rtc[0xB] = 0
    assert rtc[4] == shown


@pytest.mark.parametrize("mode", [0x00, 0x02, 0x04, 0x06])
@pytest.mark.parametrize("hour", [0, 11, 12, 23])
def test_a_clock_that_is_set_runs_on_from_there(ports: Ports, mode: int, hour: int) -> None:
    clock = Clock(*AFTERNOON)
    source = Rtc(Ports(), Clock(1999, 12, 31, hour, 59, 58))
    source[0xB] = mode
    rtc = Rtc(ports, clock)
    rtc[0xB] = mode | 0x80
    for register in (0, 2, 4, 7, 8, 9, 0x32):
        rtc[register] = source[register]
    clock.now += 100  # stopped meanwhile
    assert rtc[0] == source[0]
    rtc[0xB] = mode
    assert rtc.time() == source.time()
    rtc[0xB] = 0x06
    clock.now += 3
    assert rtc.time() == (
        [20, 0, 1, 1, 0, 0, 1] if hour == 23 else [19, 99, 12, 31, hour + 1, 0, 1]
    )


def test_a_time_that_cannot_be_leaves_the_clock_as_it_was(ports: Ports) -> None:
    rtc = Rtc(ports, Clock(*AFTERNOON))
    before = rtc.time()
    rtc[0xB] = 0x82
    rtc[8] = 0x13
    rtc[0xB] = 0x02
    assert rtc.time() == before
    rtc[8] = 0x05  # without stopping it: no effect
    assert rtc.time() == before


def test_the_clock_says_when_it_is_about_to_change(ports: Ports) -> None:
    clock = Clock(*AFTERNOON)
    rtc = Rtc(ports, clock)
    assert rtc[0xA] == 0x26
    clock.now += 0.9985
    assert rtc[0xA] == 0xA6
    clock.now += 0.0020
    assert (rtc[0xA], rtc[0]) == (0x26, 0x08)
    rtc[0xA] = 0xFF
    assert rtc[0xA] == 0x7F


def test_registers_that_are_fixed_and_memory_that_is_not(ports: Ports) -> None:
    rtc = Rtc(ports, Clock(*AFTERNOON))
    for register in (0xC, 0xD, 0x0F, 0x7F):
        rtc[register] = 0x5A
    assert [rtc[register] for register in (0xC, 0xD, 0x0F, 0x7F)] == [0, 0x80, 0x5A, 0x5A]
    assert ports.inp(0x70) == 0xFF


@pytest.mark.parametrize(
    ("below", "above", "base", "extended", "from_16m", "from_4g"),
    [
        (512 << 20, 0, 640, 65535, 496 << 4, 0),
        (8 << 20, 0, 640, 7 << 10, 0, 0),
        (64 << 10, 0, 64, 0, 0, 0),
        (3 << 30, 5 << 30, 640, 65535, ((3 << 30) - (16 << 20)) >> 16, 5 << 14),
    ],
)
def test_memory_sizes_stand_where_a_bios_leaves_them(
    ports: Ports, below: int, above: int, base: int, extended: int, from_16m: int, from_4g: int
) -> None:
    rtc = Rtc(ports, Clock(*AFTERNOON), memory_below_4g=below, memory_above_4g=above, cpus=4)

    def number(at: int, size: int) -> int:
        return sum(rtc[at + i] << 8 * i for i in range(size))

    assert (number(0x15, 2), number(0x17, 2), number(0x30, 2)) == (base, extended, extended)
    assert (number(0x34, 2), number(0x5B, 3), rtc[0x5F]) == (from_16m, from_4g, 3)
