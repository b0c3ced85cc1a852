"""Rings of pages shared with KVM, and bitmaps: coalesced writes, dirty pages."""

from __future__ import annotations

import mmap

from pykvm._abi import ffi, lib
from pykvm.errors import ClosedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

    from .handle import BytesLike

PAGE_SIZE = 4096


class Coalesced:
    """A write that waited in the ring of a coalesced zone.

    Attributes:
        phys_addr: guest-physical address, or port.
        size: bytes, 1 to 8.
        pio: whether it is a port.
        data: what was written.
    """

    __slots__ = ("data", "phys_addr", "pio", "size")

    def __init__(self, phys_addr: int, size: int, pio: bool, data: bytes) -> None:
        self.phys_addr = phys_addr
        self.size = size
        self.pio = pio
        self.data = data

    @property
    def value(self) -> int:
        """What was written, as a little-endian number."""
        return int.from_bytes(self.data, "little")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Coalesced):
            return NotImplemented
        return (self.phys_addr, self.pio, self.data) == (other.phys_addr, other.pio, other.data)

    def __hash__(self) -> int:
        return hash((self.phys_addr, self.pio, self.data))

    def __repr__(self) -> str:
        kind = "pio" if self.pio else "mmio"
        return f"<Coalesced {kind} {self.phys_addr:#x} = {self.value:#x} ({self.size} bytes)>"


def drain_coalesced(run: Any) -> list[Coalesced]:
    """Empty the ring behind a ``struct kvm_run *``, oldest write first (api.rst 4.116).

    KVM moves ``last`` after it wrote an item, the reader moves ``first`` after it read one; both
    wrap at KVM_COALESCED_MMIO_MAX, which is what fits a page.
    """
    page = ffi.cast("char *", run) + lib.KVM_COALESCED_MMIO_PAGE_OFFSET * PAGE_SIZE
    ring = ffi.cast("struct kvm_coalesced_mmio_ring *", page)
    capacity = (PAGE_SIZE - ffi.sizeof("struct kvm_coalesced_mmio_ring")) // ffi.sizeof(
        "struct kvm_coalesced_mmio"
    )
    writes = []
    first = ring.first % capacity
    last = ring.last % capacity
    while first != last:
        item = ring.coalesced_mmio[first]
        size = min(item.len, 8)
        writes.append(
            Coalesced(item.phys_addr, size, bool(item.pio), bytes(ffi.buffer(item.data, size)))
        )
        first = (first + 1) % capacity
    ring.first = first
    return writes


class DirtyRing:
    """The dirty ring of one vCPU, mapped (api.rst, KVM_CAP_DIRTY_LOG_RING): ``Vcpu.dirty_ring``.

    The guest's writes appear as pages; :meth:`harvest` takes them out, then
    ``Vm.reset_dirty_rings`` lets KVM log these pages anew and reuse their places.
    """

    __slots__ = ("_gfns", "_next", "count")

    def __init__(self, vcpu_fd: int, size: int) -> None:
        """Map it.

        Args:
            vcpu_fd: the vCPU's file descriptor.
            size: bytes, as enabled; a power of two.
        """
        entry = ffi.sizeof("struct kvm_dirty_gfn")
        if size < entry or size & (size - 1):
            raise ValueError(f"the size of a dirty ring is a power of two, not {size}")
        #: Places in the ring.
        self.count = size // entry
        offset = lib.KVM_DIRTY_LOG_PAGE_OFFSET * PAGE_SIZE
        self._gfns: Any = ffi.from_buffer(
            "struct kvm_dirty_gfn[]", mmap.mmap(vcpu_fd, size, offset=offset)
        )
        self._next = 0

    def harvest(self) -> list[tuple[int, int]]:
        """Take what is there: ``(slot, offset)``, the offset in pages from the slot's start.

        Bits 31:16 of the slot are the address space. Each place is handed back to KVM, in order,
        for the next reset.
        """
        gfns = self._gfns
        if gfns is None:
            self._closed()
        pages = []
        index = self._next
        while True:
            gfn = gfns[index]
            if gfn.flags & lib.KVM_DIRTY_GFN_F_MASK != lib.KVM_DIRTY_GFN_F_DIRTY:
                break
            pages.append((gfn.slot, gfn.offset))
            # x86 keeps stores behind earlier loads: KVM sees the place free only once it was read.
            gfn.flags = lib.KVM_DIRTY_GFN_F_RESET
            index = (index + 1) % self.count
        self._next = index
        return pages

    def _closed(self) -> NoReturn:
        raise ClosedError("this dirty ring is closed")

    def close(self) -> None:
        """Unmap it. A second call does nothing."""
        self._gfns = None

    def __enter__(self) -> DirtyRing:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._gfns is None else f"{self.count} pages"
        return f"<pykvm.kvm.rings.DirtyRing {state}>"


def dirty_pages(bitmap: BytesLike, first_page: int = 0) -> list[int]:
    """The numbers of the set bits of a dirty bitmap, ascending.

    Args:
        bitmap: as ``Vm.get_dirty_log`` returns it.
        first_page: the page that bit 0 stands for.
    """
    bits = int.from_bytes(memoryview(bitmap).cast("B"), "little")
    pages = []
    while bits:
        lowest = bits & -bits
        pages.append(first_page + lowest.bit_length() - 1)
        bits ^= lowest
    return pages
