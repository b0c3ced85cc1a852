"""The IOAPIC that is not in the kernel, as a guest's accesses and the lines meet it."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykvm.arch.x86_64 import pc
from pykvm.devices.ioapic import (
    EOI,
    LEVEL,
    LOGICAL,
    MASKED,
    PINS,
    REMOTE_IRR,
    SELECT,
    VERSION_VALUE,
    WINDOW,
    Ioapic,
    message,
)
from tests.support.ports import Ports


class Chip:
    """An IOAPIC on a bus, and what it asks of KVM.

    Attributes:
        routes: as KVM has them.
        sent: GSIs, in their order.
        taken: how many processors take each.
    """

    def __init__(self) -> None:
        self.ports = Ports()
        self.routes: list[tuple[int, int, int]] = []
        self.sent: list[int] = []
        self.taken = 1
        self.device = Ioapic(self._route, self._send)
        self.device.attach(self.ports.mmio, pc.IOAPIC)

    def _route(self, routes: list[tuple[int, int, int]]) -> None:
        assert routes != self.routes  # KVM waits for its readers: not for nothing
        self.routes = routes

    def _send(self, gsi: int) -> int:
        assert gsi in [route[0] for route in self.routes]
        self.sent.append(gsi)
        return self.taken

    def read(self, register: int) -> int:
        self.ports.store(pc.IOAPIC + SELECT, register)
        return self.ports.load(pc.IOAPIC + WINDOW)

    def write(self, register: int, value: int) -> None:
        self.ports.store(pc.IOAPIC + SELECT, register)
        self.ports.store(pc.IOAPIC + WINDOW, value)

    def entry(self, pin: int) -> int:
        return self.read(0x10 + 2 * pin) | self.read(0x11 + 2 * pin) << 32

    def program(self, pin: int, entry: int) -> None:
        """As Linux does: the upper half first, so that the entry is whole when it is unmasked."""
        self.write(0x11 + 2 * pin, entry >> 32)
        self.write(0x10 + 2 * pin, entry & 0xFFFF_FFFF)


@pytest.fixture
def chip() -> Chip:
    return Chip()


def test_after_a_reset_every_input_is_masked(chip: Chip) -> None:
    assert [chip.entry(pin) for pin in range(PINS)] == [MASKED] * PINS
    assert chip.read(1) == VERSION_VALUE == 0x170020
    assert (chip.read(0), chip.read(2), chip.read(0x40)) == (0, 0, 0)
    for pin in range(PINS):
        chip.device.line(pin, 1)
    assert (chip.routes, chip.sent) == ([], [])


def test_what_can_be_written_and_what_cannot(chip: Chip) -> None:
    chip.write(0, 0xFFFF_FFFF)
    chip.write(1, 0)
    assert (chip.read(0), chip.read(1), chip.read(2)) == (0x0F00_0000, VERSION_VALUE, 0x0F00_0000)
    chip.program(23, (1 << 64) - 1)
    assert chip.entry(23) == 0xFF00_0000_0001_AFFF  # neither delivery status nor remote IRR
    assert chip.ports.load(pc.IOAPIC + 0x20) == 0
    assert chip.ports.load(pc.IOAPIC + WINDOW + 1) == 0
    assert chip.ports.load(pc.IOAPIC + SELECT, 1) == 0x11 + 2 * 23


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (0x31, (0xFEE00000, 0x31)),
        (3 << 56 | 0x31, (0xFEE03000, 0x31)),
        (0xFF << 56 | LOGICAL | 0x1FE, (0xFEEFF004, 0x1FE)),
        (1 << 56 | LEVEL | 1 << 13 | 0x40, (0xFEE01000, 0x8040)),
    ],
)
def test_an_entry_becomes_a_message(entry: int, expected: tuple[int, int]) -> None:
    assert message(entry) == expected


def test_every_input_that_is_open_is_a_route(chip: Chip) -> None:
    chip.program(4, 0x24)
    chip.program(9, 1 << 56 | LEVEL | 0x29)
    assert chip.routes == [(4, 0xFEE00000, 0x24), (9, 0xFEE01000, 0x8029)]
    chip.program(4, MASKED | 0x24)
    assert chip.routes == [(9, 0xFEE01000, 0x8029)]


def test_an_edge_is_sent_once_and_lost_where_it_is_masked(chip: Chip) -> None:
    chip.device.line(4, 1)
    chip.program(4, 0x24)
    assert chip.sent == []
    chip.device.line(4, 1)  # it was high already
    assert chip.sent == []
    for level in (0, 1, 1, 0, 1):
        chip.device.line(4, level)
    assert chip.sent == [4, 4]


def test_a_level_is_sent_again_at_every_end_of_interrupt_until_it_is_low(chip: Chip) -> None:
    chip.device.line(9, 1)
    chip.program(9, LEVEL | 0x29)  # a level waits for its mask
    assert (chip.sent, chip.entry(9)) == ([9], LEVEL | REMOTE_IRR | 0x29)
    chip.device.line(9, 1)
    chip.device.end_of_interrupt(0x28)  # another's
    assert chip.sent == [9]
    chip.device.end_of_interrupt(0x29)
    chip.ports.store(pc.IOAPIC + EOI, 0x29)
    assert chip.sent == [9, 9, 9]
    chip.device.line(9, 0)
    assert chip.entry(9) & REMOTE_IRR
    chip.device.end_of_interrupt(0x29)
    assert (chip.sent, chip.entry(9)) == ([9, 9, 9], LEVEL | 0x29)


def test_a_level_that_nobody_took_is_not_under_way(chip: Chip) -> None:
    chip.taken = 0
    chip.program(9, 7 << 56 | LEVEL | 0x29)
    chip.device.line(9, 1)
    assert (chip.sent, chip.entry(9) & REMOTE_IRR) == ([9], 0)
    chip.taken = 1
    chip.program(9, LEVEL | 0x29)
    assert chip.entry(9) & REMOTE_IRR


def test_an_entry_made_an_edge_is_not_under_way(chip: Chip) -> None:
    """Linux ends a level-triggered interrupt so at IOAPICs without an EOI register."""
    chip.program(9, LEVEL | 0x29)
    chip.device.line(9, 1)
    chip.program(9, MASKED | 0x29)
    assert chip.entry(9) & REMOTE_IRR == 0
    chip.program(9, LEVEL | 0x29)
    assert chip.sent == [9, 9]


@pytest.mark.parametrize("gsi", [-1, 24])
def test_there_are_24_inputs(chip: Chip, gsi: int) -> None:
    with pytest.raises(ValueError, match=r"0\.\.23"):
        chip.device.line(gsi, 1)


accesses = st.lists(
    st.tuples(
        st.sampled_from([0, 1, 2, 0x10, 0x11, 0x14, 0x20, 0x3F, 0x40, 0xFFF]),
        st.sampled_from([1, 2, 4, 8]),
        st.none() | st.integers(0, 2**64 - 1),
        st.integers(0, 23),
        st.integers(0, 1),
    ),
    max_size=60,
)


@given(accesses)
def test_whatever_a_guest_does_is_served_and_the_state_survives_json(
    steps: list[tuple[int, int, int | None, int, int]],
) -> None:
    chip = Chip()
    chip.ports.mmio.unclaimed("ignore")
    for offset, size, value, gsi, level in steps:
        if value is None:
            assert 0 <= chip.ports.load(pc.IOAPIC + offset, size) < 1 << 8 * size
        else:
            chip.ports.store(pc.IOAPIC + offset, value & (1 << 8 * size) - 1, size)
        chip.device.line(gsi, level)
    state = json.loads(json.dumps(chip.device.state()))
    twin = Chip()
    twin.device.restore(state)
    assert (twin.device.state(), twin.routes, twin.sent) == (state, chip.routes, [])
