"""The small devices of a PC, as a guest's INs and OUTs meet them."""

from __future__ import annotations

import json
from calendar import timegm
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykvm import result as reasons
from pykvm.arch.x86_64 import pc
from pykvm.arch.x86_64.pic import bios_state
from pykvm.devices import debug_exit, testdev
from pykvm.devices.base import ByteDevice, Device
from pykvm.devices.cmos import Cmos
from pykvm.devices.fw_cfg import FwCfg
from pykvm.devices.i8042 import I8042
from pykvm.devices.pci_none import PciNone
from pykvm.devices.pm import PowerManagement
from pykvm.devices.post import PostCode
from pykvm.devices.pvpanic import Pvpanic
from pykvm.devices.reset import FastA20, ResetControl
from pykvm.result import DEBUG_EXIT
from tests.support.ports import Ports


@pytest.fixture
def ports() -> Ports:
    return Ports()


def reason(ports: Ports) -> str:
    assert ports.end is not None
    return ports.end.reason


# ---- what all have in common -------------------------------------------------------------------


def nothing(*_: Any) -> None:
    pass


EVERY: list[tuple[Callable[[], Device], int]] = [
    (Cmos, pc.CMOS),
    (lambda: I8042(nothing), pc.KEYBOARD),
    (lambda: ResetControl(nothing), pc.RESET),
    (lambda: FastA20(nothing), pc.FAST_A20),
    (lambda: PowerManagement(nothing), pc.PM_BASE),
    (PciNone, pc.PCI_ADDRESS),
    (PostCode, pc.POST),
    (debug_exit.DebugExit, pc.DEBUG_EXIT),
    (lambda: FwCfg(cpus=1, memory=1), pc.FW_CFG),
    (lambda: Pvpanic(nothing), pc.PVPANIC),
]


def test_all_of_them_fit_on_one_bus_and_leave_it_again(ports: Ports) -> None:
    devices = []
    for make, first in EVERY:
        device = make()
        device.attach(ports.pio, first)
        devices.append(device)
    assert len(ports.pio) > len(EVERY)
    for device in devices:
        device.close()
        device.close()
    assert len(ports.pio) == 0


@pytest.mark.parametrize(("make", "first"), EVERY, ids=[f"{first:#x}" for _, first in EVERY])
@given(
    accesses=st.lists(
        st.tuples(
            st.integers(0, 11), st.sampled_from([1, 2, 4]), st.booleans(), st.integers(0, 2**32 - 1)
        ),
        max_size=30,
    )
)
def test_any_access_is_served_and_the_state_survives_json(
    make: Callable[[], Device], first: int, accesses: list[tuple[int, int, bool, int]]
) -> None:
    """Whatever a guest does to it, a device answers in full and says what became of it."""
    ports = Ports()
    ports.pio.unclaimed("ignore")
    device = make()
    device.attach(ports.pio, first)
    for offset, size, is_write, value in accesses:
        if is_write:
            ports.out(first + offset, value & (1 << 8 * size) - 1, size)
        else:
            assert 0 <= ports.inp(first + offset, size) < 1 << 8 * size
        if reason(ports) != DEBUG_EXIT:
            assert reason(ports) == reasons.HALTED
    state = json.loads(json.dumps(device.state()))
    twin = make()
    twin.restore(state)
    again = twin.state()
    for clock in ("timer", "offset"):
        state.pop(clock, None), again.pop(clock, None)
    assert again == state


def test_a_wide_access_of_byte_registers_is_one_after_the_other(ports: Ports) -> None:
    class Two(ByteDevice):
        LENGTH = 2

        def __init__(self) -> None:
            super().__init__()
            self.seen: list[tuple[int, int]] = []

        def read(self, offset: int) -> int:
            return 0x10 + offset

        def write(self, offset: int, value: int) -> None:
            self.seen.append((offset, value))

    device = Two()
    device.attach(ports.pio, 0x100)
    assert ports.inp(0x100, 2) == 0x1110
    assert ports.inp(0x100, 4) == 0xFFFF1110
    assert ports.inp(0x101, 2) == 0xFF11
    ports.out(0x101, 0x5566, 2)
    ports.out(0x100, 0x7788, 2)
    assert device.seen == [(1, 0x66), (0, 0x88), (1, 0x77)]


# ---- resets ------------------------------------------------------------------------------------


@pytest.fixture
def resets(ports: Ports) -> list[str]:
    seen: list[str] = []
    I8042(seen.append).attach(ports.pio, 0x60)
    ResetControl(seen.append).attach(ports.pio, 0xCF9)
    FastA20(seen.append).attach(ports.pio, 0x92)
    PciNone().attach(ports.pio, 0xCF8)
    return seen


def test_the_keyboard_controller_resets_by_pulse_and_by_output_port(
    ports: Ports, resets: list[str]
) -> None:
    for command in (0xAD, 0xFF, 0x20, 0xD1):
        ports.out(0x64, command)
    ports.out(0x60, 0x03)  # output port, the reset line high
    ports.out(0x60, 0x02)  # just data, to nobody
    assert resets == []
    ports.out(0x64, 0xFE)
    ports.out(0x64, 0xD1)
    ports.out(0x60, 0x02)
    assert resets == ["i8042", "i8042"]


def test_linux_finds_no_keyboard_controller_and_can_still_reboot_by_it(
    ports: Ports, resets: list[str]
) -> None:
    """i8042_flush() gives up on output without end; kb_wait() wants the input buffer empty."""
    flushed = 0
    while ports.inp(0x64) & 1 and flushed <= 16:
        assert ports.inp(0x60) == 0xFF
        flushed += 1
    assert flushed > 16
    assert not ports.inp(0x64) & 2


@pytest.mark.parametrize("values", [[0x06], [0x02, 0x06], [0x0A, 0x0E], [0x04]])
def test_the_reset_register_resets_when_its_bit_rises(
    ports: Ports, resets: list[str], values: list[int]
) -> None:
    for value in values:
        assert resets == []
        ports.out(0xCF9, value)
    assert resets == ["0xcf9"]
    assert ports.inp(0xCF9) == 0


def test_the_reset_register_and_port_92_read_what_was_written(
    ports: Ports, resets: list[str]
) -> None:
    ports.out(0xCF9, 0xFB)
    assert ports.inp(0xCF9) == 0x0A
    assert ports.inp(0x92) == 0x02  # A20 is open
    ports.out(0x92, 0x00)
    assert (ports.inp(0x92), resets) == (0x00, [])
    ports.out(0x92, 0x03)
    assert (ports.inp(0x92), resets) == (0x02, ["port92"])


# ---- ACPI's fixed hardware ---------------------------------------------------------------------


class Power:
    def __init__(self, ports: Ports) -> None:
        self.off: list[int] = []
        self.sci: list[int] = []
        self.device = PowerManagement(self.off.append, on_sci=self.sci.append)
        self.device.attach(ports.pio, pc.PM_BASE)


STATUS, ENABLE, CONTROL, TIMER = pc.PM_BASE, pc.PM_BASE + 2, pc.PM_BASE + 4, pc.PM_BASE + 8


@pytest.mark.parametrize("sleep_type", range(8))
def test_only_the_sleep_type_of_s5_powers_off(ports: Ports, sleep_type: int) -> None:
    power = Power(ports)
    ports.out(CONTROL, sleep_type << 10, 2)  # Linux: the type first, then with SLP_EN
    assert power.off == []
    ports.out(CONTROL, sleep_type << 10 | 1 << 13, 2)
    assert power.off == ([5] if sleep_type == 5 else [])
    assert ports.inp(CONTROL, 2) == sleep_type << 10 | 1  # SLP_EN reads 0, SCI_EN 1


def test_bytes_of_the_control_register_do_not_disturb_each_other(ports: Ports) -> None:
    power = Power(ports)
    ports.out(CONTROL + 1, 5 << 2)
    ports.out(CONTROL, 0x02)
    assert ports.inp(CONTROL, 2) == 5 << 10 | 0x03
    ports.out(CONTROL + 1, 5 << 2 | 1 << 5)
    assert power.off == [5]


def test_the_power_button_raises_the_sci_until_its_status_is_cleared(ports: Ports) -> None:
    power = Power(ports)
    power.device.press_power_button()
    assert (power.sci, ports.inp(STATUS, 2)) == ([], 0x100)  # not enabled
    ports.out(ENABLE, 0x100, 2)
    assert power.sci == [1]
    ports.out(STATUS, 0x0021, 2)  # other bits
    assert power.sci == [1]
    ports.out(STATUS, 0x0100, 2)
    assert (power.sci, ports.inp(STATUS, 2)) == ([1, 0], 0)
    assert ports.inp(ENABLE, 2) == 0x100


def test_status_and_enable_are_read_together_as_acpica_reads_them(ports: Ports) -> None:
    power = Power(ports)
    ports.out(STATUS, 0xFFFF0000, 4)
    power.device.press_power_button()
    assert ports.inp(STATUS, 4) == 0x0721_0100


def test_the_timer_runs_at_its_rate_and_can_be_restored(
    ports: Ports, monkeypatch: pytest.MonkeyPatch
) -> None:
    import time

    power = Power(ports)
    before = time.monotonic_ns()
    first = ports.inp(TIMER, 4)
    while time.monotonic_ns() < before + 5_000_000:
        pass
    elapsed = (ports.inp(TIMER, 4) - first) / 3_579_545
    assert 0.004 < elapsed <= (time.monotonic_ns() - before) / 1e9
    power.device.restore({**power.device.state(), "timer": 0xFFFF_0000})
    assert ports.inp(TIMER, 4) >> 16 in (0xFFFF, 0x0000)
    power.device.restore({**power.device.state(), "timer": 0x12_3456_0000})
    assert ports.inp(TIMER + 2, 2) == 0x3456
    ports.out(TIMER, 0, 4)
    assert ports.inp(TIMER + 2, 2) == 0x3456


# ---- CMOS --------------------------------------------------------------------------------------


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


# ---- nothing there -----------------------------------------------------------------------------


def test_linux_finds_no_pci(ports: Ports, resets: list[str]) -> None:
    """pci_check_type1() and pci_check_type2() of arch/x86/pci/direct.c."""
    ports.out(0xCFB, 0x01)
    ports.out(0xCF8, 0x80000000, 4)
    assert ports.inp(0xCF8, 4) != 0x80000000
    ports.out(0xCFB, 0)
    ports.out(0xCF8, 0)
    ports.out(0xCFA, 0)
    assert (ports.inp(0xCF8), ports.inp(0xCFA)) == (0xFF, 0xFF)
    assert ports.inp(0xCFC, 4) == 0xFFFF_FFFF
    assert resets == []


def test_post_codes_vanish_and_are_counted(ports: Ports) -> None:
    claim = PostCode().attach(ports.pio, 0x80)
    ports.out(0x80, 0x55)
    assert (ports.inp(0x80), claim.hits) == (0xFF, 2)


# ---- QEMU's test devices -----------------------------------------------------------------------


@pytest.mark.parametrize(("size", "value"), [(1, 0x7F), (2, 0x1234), (4, 0xDEADBEEF)])
def test_debug_exit_ends_the_run_with_the_written_value(
    ports: Ports, size: int, value: int
) -> None:
    debug_exit.DebugExit().attach(ports.pio, 0xF4)
    ports.out(0xF4, value, size)
    assert ports.end is not None
    assert (ports.end.reason, ports.end.code) == (DEBUG_EXIT, value)


def test_debug_exit_reads_zero(ports: Ports) -> None:
    debug_exit.DebugExit().attach(ports.pio, 0xF4)
    assert (ports.inp(0xF4, 4), reason(ports)) == (0, reasons.HALTED)


@pytest.mark.parametrize(
    ("code", "status"), [(0, 1), (1, 3), (0x31, 0x63), (0x80, 1), (0x1FF, 255)]
)
def test_qemus_exit_status_is_odd(code: int, status: int) -> None:
    assert debug_exit.qemu_status(code) == status


@pytest.fixture
def lines(ports: Ports) -> list[tuple[int, int]]:
    seen: list[tuple[int, int]] = []
    testdev.TestDevice(
        lambda gsi, level: seen.append((gsi, level)), lambda gpa: seen.append((gpa, -1))
    ).attach_all(ports.pio, ports.mmio)
    return seen


def test_the_test_devices_ports_read_back_what_was_written(
    ports: Ports, lines: list[tuple[int, int]]
) -> None:
    ports.out(0xE0, 0x12345678, 4)
    assert ports.inp(0xE0, 4) == ports.inp(0xE8, 4) == 0x12345678
    ports.out(0xE1, 0xAA)
    ports.out(0xE2, 0xBBCC, 2)
    assert ports.inp(0xE0, 4) == 0xBBCCAA78
    assert (ports.inp(0xE0), ports.inp(0xE2, 2), ports.inp(0xE9)) == (0x78, 0xBBCC, 0xAA)


def test_the_test_device_drives_lines_and_flushes_pages(
    ports: Ports, lines: list[tuple[int, int]]
) -> None:
    ports.out(0x2000, 1)
    ports.out(0x2017, 0xFF)
    ports.out(0x2000, 0)
    ports.out(0xE4, 0x123456, 4)
    assert lines == [(0, 1), (23, 1), (0, 0), (0x123000, -1)]
    ports.inp(0xE4, 4)
    assert len(lines) == 4


def test_the_test_devices_memory_holds_every_width(
    ports: Ports, lines: list[tuple[int, int]]
) -> None:
    ports.store(0xFF000000, 0x1122334455667788, 8)
    ports.store(0xFF000003, 0xAA, 1)
    assert ports.load(0xFF000000, 8) == 0x11223344AA667788
    assert ports.load(0xFF000001, 2) == 0x6677
    ports.store(0xFF00FFFE, 0x55667788, 4)  # the last two bytes, and two beyond
    assert ports.load(0xFF00FFFE, 2) == 0x7788
    assert ports.load(0xFF00FFFE, 4) == 0x7788


def test_the_test_devices_state_is_its_memory() -> None:
    one, two = testdev.TestDevice(), testdev.TestDevice()
    ports, other = Ports(), Ports()
    one.attach_all(ports.pio, ports.mmio)
    two.attach_all(other.pio, other.mmio)
    ports.out(0xE0, 0x01020304, 4)
    ports.store(0xFF000100, 0xCAFE, 2)
    two.restore(json.loads(json.dumps(one.state())))
    assert (other.inp(0xE0, 4), other.load(0xFF000100, 2)) == (0x01020304, 0xCAFE)
    one.close()
    assert (len(ports.pio), len(ports.mmio)) == (0, 0)


def test_fw_cfg_tells_processors_and_memory(ports: Ports) -> None:
    FwCfg(cpus=4, memory=5 << 30, max_cpus=16, extra={0x19: b"\0\0\0\0"}).attach(ports.pio, 0x510)

    def item(key: int, size: int) -> bytes:
        ports.out(0x510, key, 2)
        return bytes(ports.inp(0x511) for _ in range(size))

    assert item(0x00, 6) == b"QEMU\0\0"
    assert item(0x01, 4) == bytes([1, 0, 0, 0])
    assert item(0x03, 8) == (5 << 30).to_bytes(8, "little")
    assert (item(0x05, 2), item(0x0F, 2)) == (b"\4\0", b"\x10\0")
    assert item(0x77, 3) == b"\0\0\0"
    ports.out(0x510, 0x00, 2)
    ports.out(0x511, 0x55)  # data is for reading
    ports.out(0x510, 0x55)  # and the selector for 16 bits
    assert ports.inp(0x511, 4) == int.from_bytes(b"QEMU", "little")


def test_pvpanic_tells_panics_by_their_kind(ports: Ports) -> None:
    seen: list[str] = []
    Pvpanic(seen.append).attach(ports.pio, 0x505)
    assert ports.inp(0x505) == 0x03
    for value in (0x00, 0x01, 0x02, 0xFC):
        ports.out(0x505, value)
    assert seen == ["panicked", "crash-loaded"]


# ---- interrupt lines ---------------------------------------------------------------------------


def test_every_line_has_its_pins_and_no_pin_has_two() -> None:
    for timer_pin in (0, 2):
        routes = pc.gsi_routes(timer_pin)
        pins = [(chip, pin) for _, chip, pin in routes]
        assert len(set(pins)) == len(pins) == (40 if timer_pin == 0 else 39)
        assert (0, "ioapic", timer_pin) in routes
        assert {gsi for gsi, _, _ in routes} == set(range(24))
    assert (2, "ioapic", 2) not in pc.GSI_ROUTES
    assert (12, "pic-slave", 4) in pc.GSI_ROUTES


def test_a_bios_leaves_the_pics_at_vectors_8_and_112() -> None:
    master, slave = bios_state("master"), bios_state("slave")
    assert (master["irq_base"], master["imr"], slave["irq_base"], slave["imr"]) == (
        8,
        0xFC,
        0x70,
        0xFF,
    )
    assert (master["elcr"], slave["elcr"]) == (0, 0x02)
    assert bios_state("master", open_irqs=(4, 8))["imr"] == 0xFF & ~(1 << 4 | 1 << 2)
    assert bios_state("slave", open_irqs=(4, 8))["imr"] == 0xFE
    with pytest.raises(ValueError, match="middle"):
        bios_state("middle")
