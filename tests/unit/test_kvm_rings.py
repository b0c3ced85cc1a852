"""Rings shared with KVM: coalesced writes, dirty pages; and dirty bitmaps."""

from __future__ import annotations

import os
from struct import pack
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykvm._abi import ffi, lib
from pykvm.errors import ClosedError
from pykvm.kvm.rings import Coalesced, DirtyRing, dirty_pages, drain_coalesced

ENTRY = 24  # sizeof(struct kvm_coalesced_mmio)
CAPACITY = (4096 - 8) // ENTRY


class CoalescedPage:
    """The kernel's end of the ring."""

    def __init__(self) -> None:
        self.raw = bytearray(3 * 4096)
        self.run: Any = ffi.from_buffer("struct kvm_run *", self.raw)
        self.base = lib.KVM_COALESCED_MMIO_PAGE_OFFSET * 4096

    def indices(self) -> tuple[int, int]:
        first, last = memoryview(self.raw)[self.base : self.base + 8].cast("I").tolist()
        return first, last

    def set_indices(self, first: int, last: int) -> None:
        self.raw[self.base : self.base + 8] = pack("<II", first, last)

    def write(self, address: int, data: bytes, pio: int = 0) -> bool:
        first, last = self.indices()
        if (last + 1) % CAPACITY == first:
            return False  # full: KVM exits instead
        at = self.base + 8 + last * ENTRY
        self.raw[at : at + ENTRY] = pack("<QII8s", address, len(data), pio, data)
        self.set_indices(first, (last + 1) % CAPACITY)
        return True


def test_coalesced_writes_come_in_order_and_once() -> None:
    page = CoalescedPage()
    page.write(0xD000_0000, b"\x01")
    page.write(0xD000_0008, b"\x02\x03\x04\x05")
    page.write(0x70, b"\x8f\x00", pio=1)
    writes = drain_coalesced(page.run)
    assert writes == [
        Coalesced(0xD000_0000, 1, False, b"\x01"),
        Coalesced(0xD000_0008, 4, False, b"\x02\x03\x04\x05"),
        Coalesced(0x70, 2, True, b"\x8f\x00"),
    ]
    assert [write.value for write in writes] == [1, 0x0504_0302, 0x8F]
    assert "pio 0x70" in repr(writes[2])
    assert drain_coalesced(page.run) == []


@given(st.lists(st.integers(0, CAPACITY + 20), max_size=8))
def test_the_ring_loses_nothing_when_it_wraps(bursts: list[int]) -> None:
    page = CoalescedPage()
    number = 0
    expected, got = [], []
    for burst in bursts:
        for _ in range(burst):
            if page.write(number, number.to_bytes(8, "little")):
                expected.append(number)
            number += 1
        got += [write.value for write in drain_coalesced(page.run)]
    assert got == expected


@given(first=st.integers(0, 0xFFFF_FFFF), last=st.integers(0, 0xFFFF_FFFF))
def test_indices_that_make_no_sense_stay_inside_the_page(first: int, last: int) -> None:
    page = CoalescedPage()
    page.set_indices(first, last)
    assert len(drain_coalesced(page.run)) < CAPACITY


class DirtyPages:
    """The kernel's end of a dirty ring, on a memfd in place of the vCPU."""

    def __init__(self, count: int) -> None:
        self.fd = os.memfd_create("dirty")
        self.count = count
        self.offset = lib.KVM_DIRTY_LOG_PAGE_OFFSET * 4096
        os.truncate(self.fd, self.offset + max(4096, count * 16))
        self.dirty = 0  # pushed so far
        self.clean = 0  # reset so far

    def push(self, slot: int, page: int) -> None:
        at = self.offset + self.dirty % self.count * 16
        os.pwrite(self.fd, pack("<IIQ", lib.KVM_DIRTY_GFN_F_DIRTY, slot, page), at)
        self.dirty += 1

    def reset(self) -> int:
        """KVM_RESET_DIRTY_RINGS: take back what was harvested, in order."""
        done = 0
        while self.clean < self.dirty:
            at = self.offset + self.clean % self.count * 16
            if not os.pread(self.fd, 4, at)[0] & lib.KVM_DIRTY_GFN_F_RESET:
                break
            os.pwrite(self.fd, bytes(4), at)
            self.clean += 1
            done += 1
        return done


@given(st.lists(st.integers(0, 4), max_size=20))
def test_a_dirty_ring_is_harvested_in_order_and_handed_back(bursts: list[int]) -> None:
    kernel = DirtyPages(4)
    number = 0
    try:
        with DirtyRing(kernel.fd, 4 * 16) as ring:
            for burst in bursts:
                pages = list(range(number, number + burst))
                for page in pages:
                    kernel.push(0x1_0002, page)
                number += burst
                assert ring.harvest() == [(0x1_0002, page) for page in pages]
                assert ring.harvest() == []
                assert kernel.reset() == burst
    finally:
        os.close(kernel.fd)


def test_a_dirty_ring_that_is_closed_says_so() -> None:
    kernel = DirtyPages(256)
    ring = DirtyRing(kernel.fd, 4096)
    os.close(kernel.fd)
    assert ring.count == 256
    ring.close()
    ring.close()
    with pytest.raises(ClosedError, match="dirty ring"):
        ring.harvest()
    assert "closed" in repr(ring)


@pytest.mark.parametrize("size", [0, 8, 4095, 4096 * 3])
def test_a_dirty_ring_has_a_size_of_a_power_of_two(size: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        DirtyRing(-1, size)


@given(st.sets(st.integers(0, 1000)), st.integers(0, 1 << 40))
def test_a_bitmap_lists_its_pages_in_ascending_order(pages: set[int], first: int) -> None:
    bitmap = bytearray(128)
    for page in pages:
        bitmap[page // 8] |= 1 << page % 8
    assert dirty_pages(bitmap, first) == [first + page for page in sorted(pages)]
    assert dirty_pages(bytes(bitmap)) == sorted(pages)
    assert dirty_pages(memoryview(bitmap).cast("Q")) == sorted(pages)
