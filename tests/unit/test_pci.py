"""The PCI bus: configuration space, BARs that move, and accesses of any kind."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pykvm.arch.x86_64 import pc
from pykvm.devices import pci
from pykvm.devices.claim import Claim
from pykvm.devices.pci import Bar, PciFunction, PciRoot, claim_all
from tests.support.pci_guest import ADDRESS, DATA, PciGuest

ONES = 0xFFFF_FFFF


class Example(PciFunction):
    """Memory that answers with its own offset, and ports that do; one live word."""

    def __init__(self, root: PciRoot, sizes: tuple[int, ...] = (0x1000, 0x10)) -> None:
        super().__init__(0x1234, 0x5678, 0xFF0000, revision=3, subsystem=(0xAA, 0xBB))
        self.bus = root
        for number, size in enumerate(sizes):
            self.add_bar(number, Bar(size, io=number == 1))
        self.capability = self.add_capability(9, bytes(6), b"\0\0\xff\xff\0\0")
        self.add_capability(9, b"\1\2\3")
        self.live = self.capability + 4
        self.number = root.add(self)

    def claim(self, number: int, address: int) -> list[Claim]:
        bar = self.bars[number]
        bus = self.bus.pio if bar.io else self.bus.mmio
        half = bar.size // 2  # two claims, so that one of them alone can be in the way
        return claim_all(
            [],
            lambda: bus.handle(address, lambda access: access.offset & 0xFF, half),
            lambda: bus.handle(address + half, lambda access: 0x80, half),
        )


@pytest.fixture
def guest() -> Iterator[PciGuest]:
    with PciGuest() as guest:
        yield guest


def test_a_guest_finds_the_bridge_and_nothing_else(guest: PciGuest) -> None:
    assert guest.config(0, 0) == 0x1237_8086 and guest.config(0, 0x0B, 1) == 6
    assert all(guest.config(device, 0) == ONES for device in range(1, 32))
    guest.port(ADDRESS, 4, 1 << 31 | 1 << 16)  # bus 1
    assert guest.port(DATA, 4) == ONES
    guest.port(ADDRESS, 4, 1 << 31 | 1 << 8)  # function 1
    assert guest.port(DATA, 2) == 0xFFFF
    guest.port(ADDRESS, 4, 0)  # not enabled
    assert guest.port(DATA, 4) == ONES


def test_the_address_register_is_32_bits_wide(guest: PciGuest) -> None:
    guest.port(ADDRESS, 4, 0x8000_0008)
    guest.port(ADDRESS, 1, 0)
    guest.port(ADDRESS, 2, 0)
    assert guest.port(ADDRESS, 4) == 0x8000_0008
    assert guest.port(ADDRESS, 1) == 0xFF and guest.port(ADDRESS + 2, 2) == 0xFFFF


def test_an_access_ends_with_the_four_bytes_it_is_in(guest: PciGuest) -> None:
    number = Example(guest.root).number
    guest.port(ADDRESS, 4, 1 << 31 | number << 11)
    assert guest.port(DATA + 2, 4) == 0xFFFF_5678
    assert guest.port(DATA + 3, 2) == 0xFF56
    at = guest.root.functions[number].live
    guest.port(ADDRESS, 4, 1 << 31 | number << 11 | at)
    assert guest.port(DATA + 3, 4) == 0xFFFF_FF00  # the same where Python answers


def test_sizing_a_bar(guest: PciGuest) -> None:
    number = Example(guest.root).number
    before = guest.config(number, pci.BARS)
    assert pc.PCI_MEMORY <= before < pc.PCI_MEMORY + pc.PCI_MEMORY_LENGTH
    guest.config(number, pci.BARS, value=ONES)
    assert guest.config(number, pci.BARS) == 0x1_0000_0000 - 0x1000
    guest.config(number, pci.BARS + 4, value=ONES)
    assert guest.config(number, pci.BARS + 4) == 0x1_0000_0000 - 0x10 | 1
    guest.config(number, pci.BARS + 8, value=ONES)
    assert guest.config(number, pci.BARS + 8) == 0


def test_the_header_is_for_reading(guest: PciGuest) -> None:
    example = Example(guest.root)
    before = bytes(example.config)
    for offset in range(0, pci.SIZE, 4):
        if not pci.BARS <= offset < pci.BARS + 24 and offset != pci.COMMAND:
            guest.config(example.number, offset, value=ONES)
    changed = {at for at in range(pci.SIZE) if before[at] != example.config[at]}
    assert changed == {0x0C, 0x3C, example.capability + 4, example.capability + 5}
    guest.config(example.number, pci.COMMAND, value=ONES)
    assert guest.config(example.number, pci.COMMAND) == 0x10 << 16 | 0x407


def test_a_bar_is_there_when_it_is_switched_on_and_moves(guest: PciGuest) -> None:
    number = Example(guest.root).number
    first = guest.bar(number, 0)
    assert guest.memory_access(first + 4, 4) == ONES
    guest.config(number, pci.COMMAND, 2, pci.DECODE_MEMORY)
    assert guest.memory_access(first + 4, 4) == 4
    assert guest.port(guest.bar(number, 1), 1) == 0xFF
    guest.config(number, pci.COMMAND, 2, pci.DECODE_MEMORY | pci.DECODE_IO)
    assert guest.port(guest.bar(number, 1) + 3, 1) == 3
    guest.config(number, pci.BARS, value=first + 0x8000)
    assert guest.memory_access(first + 4, 4) == ONES
    assert guest.memory_access(first + 0x8004, 4) == 4
    guest.config(number, pci.COMMAND, 2, 0)
    assert guest.memory_access(first + 0x8004, 4) == ONES


@pytest.mark.parametrize("address", [0, 0x1000, 0xFEE0_0000, 0xFFFF_F000, pc.PCI_MEMORY - 0x1000])
def test_the_bridge_hands_on_its_windows_only(guest: PciGuest, address: int) -> None:
    number = Example(guest.root).number
    guest.config(number, pci.COMMAND, 2, 7)
    guest.config(number, pci.BARS, value=address)
    assert guest.memory_access(address + 4, 4) == ONES
    assert guest.bar(number, 0) == address


def test_of_two_at_one_place_the_second_waits_until_the_first_moves(guest: PciGuest) -> None:
    first, second = Example(guest.root), Example(guest.root, (0x2000,))
    there = guest.bar(second.number, 0)
    for each in (first, second):
        guest.config(each.number, pci.COMMAND, 2, pci.DECODE_MEMORY)
    guest.config(second.number, pci.COMMAND, 2, 0)
    guest.config(first.number, pci.BARS, value=there + 0x1000)
    guest.config(second.number, pci.COMMAND, 2, pci.DECODE_MEMORY)  # its upper half is taken
    assert guest.memory_access(there + 4, 4) == ONES
    assert guest.memory_access(there + 0x1004, 4) == 4
    guest.config(first.number, pci.BARS, value=there + 0x4000)
    assert guest.memory_access(there + 4, 4) == 4
    assert guest.memory_access(there + 0x1004, 4) == 0x80


def test_bars_do_not_overlap_and_a_full_bus_says_so(guest: PciGuest) -> None:
    taken = []
    for _ in range(31):
        example = Example(guest.root)
        taken += [(guest.bar(example.number, 0), 0x1000), (guest.bar(example.number, 1), 0x10)]
    taken.sort()
    assert all(a + size <= b for (a, size), (b, _) in pairwise(taken))
    with pytest.raises(ValueError, match="room for 32"):
        Example(guest.root)


def test_windows_can_be_full(guest: PciGuest) -> None:
    Example(guest.root, (1 << 27,))
    with pytest.raises(ValueError, match="full"):
        Example(guest.root, (1 << 28,))
    assert len(guest.root.functions) == 2


@pytest.mark.parametrize(
    ("size", "io"), [(0, False), (8, False), (24, False), (2, True), (512, True)]
)
def test_a_bar_of_no_size_is_refused(size: int, io: bool) -> None:
    with pytest.raises(ValueError, match="power of two"):
        Bar(size, io=io)


def test_state_brings_back_registers_and_claims(guest: PciGuest) -> None:
    example = Example(guest.root)
    guest.config(example.number, pci.COMMAND, 2, pci.DECODE_MEMORY)
    moved = guest.bar(example.number, 0) + 0x10000
    guest.config(example.number, pci.BARS, value=moved)
    state, root = example.state(), guest.root.state()
    with PciGuest() as other:
        again = Example(other.root)
        again.restore(state)
        other.root.restore(root)
        assert other.port(ADDRESS, 4) == guest.port(ADDRESS, 4)
        assert other.memory_access(moved + 4, 4) == 4


ACCESS = st.tuples(
    st.sampled_from([ADDRESS, ADDRESS + 2, DATA, DATA + 1, DATA + 2, DATA + 3]),
    st.sampled_from([1, 2, 4]),
    st.none() | st.integers(0, ONES) | st.sampled_from([ONES, 7, 0, pc.PCI_MEMORY, 0x4000]),
    st.integers(0, 3),  # device
    st.integers(0, 63) | st.integers(1, 6),  # which four bytes of it
)


@settings(max_examples=300, deadline=None)
@given(st.lists(ACCESS, max_size=60))
def test_no_access_raises_and_claims_stay_in_the_windows(
    accesses: list[tuple[int, int, int | None, int, int]],
) -> None:
    with PciGuest() as guest:
        examples = [Example(guest.root), Example(guest.root, (0x4000, 0x100))]
        before = [bytes(each.config[:4]) for each in examples]
        claims = len(guest.fake.mmio) + len(guest.fake.pio)
        for port, size, value, device, word in accesses:
            guest.port(ADDRESS, 4, 1 << 31 | device << 11 | word << 2)
            guest.port(port, size, None if value is None else value & (1 << 8 * size) - 1)
            for claim in (*guest.fake.mmio, *list(guest.fake.pio)[3:]):
                first, length = (
                    (pc.PCI_PORTS, pc.PCI_PORTS_LENGTH)
                    if claim.bus is guest.fake.pio
                    else (pc.PCI_MEMORY, pc.PCI_MEMORY_LENGTH)
                )
                assert first <= claim.first and claim.last < first + length
        assert [bytes(each.config[:4]) for each in examples] == before
        for each in examples:
            guest.config(each.number, pci.COMMAND, 2, 0)
        assert len(guest.fake.mmio) + len(guest.fake.pio) == claims
