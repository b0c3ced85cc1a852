"""The small devices of a PC, as a guest's INs and OUTs meet them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykvm import result as reasons
from pykvm.arch.x86_64 import pc
from pykvm.arch.x86_64.pic import bios_state
from pykvm.devices import debug_exit
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
        if ports.reason != DEBUG_EXIT:
            assert ports.reason == reasons.HALTED
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
