"""One region of guest-physical addresses and the host memory behind it."""

from __future__ import annotations

from pykvm._abi import lib
from pykvm.errors import ClosedError

from .units import PAGE_SIZE, format_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    import mmap
    from typing import Any, Literal

    from .backing import Backing

# Formats of the memoryview casts by width in bytes: native, so little endian and, at an aligned
# address, one load or store each. C gives these four their sizes on every x86-64 ABI of Linux.
_FORMATS: dict[int, Literal["B", "H", "I", "Q"]] = {1: "B", 2: "H", 4: "I", 8: "Q"}


class Region:
    """A stretch of guest RAM or ROM. ``GuestMemory.add*`` makes them.

    The names are those of ``struct kvm_userspace_memory_region`` (api.rst 4.35)::

        vm.set_user_memory_region(
            slot=r.slot, flags=r.flags, guest_phys_addr=r.guest_phys_addr,
            memory_size=r.memory_size, userspace_addr=r.userspace_addr)

    Attributes:
        slot: KVM's number for it.
        guest_phys_addr: its first gpa.
        end: the gpa after its last byte.
        memory_size: its length in bytes, a multiple of the page size.
        readonly: a ROM: guest writes exit as MMIO, and of the host's writes only
            ``GuestMemory.load`` is let through. Needs KVM_CAP_READONLY_MEM.
        log_dirty: KVM is to log which pages are written (KVM_MEM_LOG_DIRTY_PAGES). Whoever
            changes it registers the region again.
        name: a label for people, or "".
        exposed: whether a writable view of it was made here, so that it may change unseen.
    """

    __slots__ = (
        "_backing",
        "_cells",
        "end",
        "exposed",
        "guest_phys_addr",
        "log_dirty",
        "memory_size",
        "name",
        "readonly",
        "slot",
    )

    def __init__(
        self,
        slot: int,
        guest_phys_addr: int,
        backing: Backing,
        *,
        readonly: bool = False,
        log_dirty: bool = False,
        name: str = "",
    ) -> None:
        self.slot = slot
        self.guest_phys_addr = guest_phys_addr
        self.memory_size = backing.size
        self.end = guest_phys_addr + backing.size
        self.readonly = readonly
        self.log_dirty = log_dirty
        self.name = name
        self.exposed = False
        self._backing = backing
        self._cells: dict[int, memoryview] | None = {}

    @property
    def userspace_addr(self) -> int:
        """The hva of its first byte; valid until ``close()``, and as long as a view is alive."""
        if self._cells is None:
            raise ClosedError("this guest memory was closed")
        return self._backing.hva

    @property
    def flags(self) -> int:
        """Flags for KVM_SET_USER_MEMORY_REGION: KVM_MEM_READONLY, KVM_MEM_LOG_DIRTY_PAGES."""
        flags = 0
        if self.readonly:
            flags |= lib.KVM_MEM_READONLY
        if self.log_dirty:
            flags |= lib.KVM_MEM_LOG_DIRTY_PAGES
        return flags

    @property
    def kind(self) -> str:
        """What backs it: ``"anonymous"``, ``"memfd"``, ``"file"`` or ``"private"``."""
        return self._backing.kind

    @property
    def huge(self) -> str | None:
        """The huge pages asked for: None, ``"thp"``, ``"2M"`` or ``"1G"``."""
        return self._backing.huge

    @property
    def source(self) -> object:
        """What was said at ``add_private`` that it is of, or None."""
        return self._backing.source

    @property
    def path(self) -> str:
        """The file behind it, or ""."""
        return self._backing.path

    @property
    def fd(self) -> int:
        """The descriptor behind a memfd or a shared file (still the region's own), or -1."""
        return self._backing.fd

    @property
    def writable_by_host(self) -> bool:
        """Whether the host mapping can be written at all: not so for a shared read-only file."""
        return self._backing.writable

    def view(self) -> memoryview:
        """Return a memoryview of the whole region, without a copy; read-only for a ROM.

        It keeps the mapping alive, also past ``close()``.
        """
        view = self.cells(1)[:]
        if self.readonly:
            return view.toreadonly()
        self.exposed = True
        return view

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        """Give ``numpy.asarray(region)``: one byte per element, without a copy."""
        import numpy

        return numpy.array(self.view(), dtype=dtype, copy=copy)

    def discard(self, at: int, size: int) -> tuple[int, int]:
        """Zero the whole pages of a range by giving them back, if the backing can do that.

        Returns:
            (start, end) of what is zero now, offsets within ``at .. at+size``; both ``at`` if the
            range has to be written instead.
        """
        start, end = -(-at // PAGE_SIZE) * PAGE_SIZE, (at + size) // PAGE_SIZE * PAGE_SIZE
        return (start, end) if start < end and self._backing.discard(start, end) else (at, at)

    def cells(self, width: int) -> memoryview:
        """Return the region as cells of 1, 2, 4 or 8 bytes. It stays ours: hand out slices only."""
        cells = self._cells
        if cells is None:
            raise ClosedError("this guest memory was closed")
        if width not in cells:
            start, end, mapping, base = self.read_window()
            window = memoryview(mapping)[start - base : end - base]
            cells[width] = window.cast(_FORMATS[width])
        return cells[width]

    def read_window(self) -> tuple[int, int, mmap.mmap, int]:
        """Return (first gpa, end gpa, mapping, the gpa of the mapping's byte 0): for fast reads.

        A slice of the mmap itself is bytes in one step; a memoryview slice takes two.
        """
        mapping = self._backing.mapping
        if mapping is None:
            raise ClosedError("this guest memory was closed")
        start = self.guest_phys_addr
        return start, self.end, mapping, start - self._backing.window

    def close(self) -> None:
        """Let go of the host memory; a view that is alive keeps it mapped. Idempotent."""
        cells, self._cells = self._cells, None
        if cells is None:
            return
        for view in cells.values():
            view.release()
        self._backing.close()

    def __repr__(self) -> str:
        return f"<Region {self.describe()}>"

    def describe(self) -> str:
        """Return its line in the map: ``0x0-0x1fffff 2M anonymous, slot 0``."""
        parts = [
            f"{self.guest_phys_addr:#x}-{self.end - 1:#x} {format_size(self.memory_size)} "
            f"{self.kind}{' ' + self.path if self.path else ''}",
            f"slot {self.slot}",
        ]
        if self.huge:
            parts.append(f"huge={self.huge}")
        if self.readonly:
            parts.append("read-only")
        if self.name:
            parts.append(repr(self.name))
        return ", ".join(parts)
