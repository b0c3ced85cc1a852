"""What a guest's memory is made of: regions, and who is told of each."""

from __future__ import annotations

from pykvm.errors import GuestMemoryError

from . import backing
from .region import Region
from .region_map import RegionMap
from .units import parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from .backing import Backing


class Building:
    """The half of :class:`~pykvm.memory.GuestMemory` that says where RAM and ROM are."""

    __slots__ = ("_map", "_register")

    def __init__(self) -> None:
        self._map = RegionMap()
        self._register: list[Callable[[Region], object]] = []

    def add(
        self,
        gpa: int,
        size: int | str,
        *,
        readonly: bool = False,
        huge: str | None = None,
        log_dirty: bool = False,
        slot: int | None = None,
        name: str = "",
    ) -> Region:
        """Add anonymous memory of ``size`` bytes at ``gpa``, zeroed, and return its region.

        Args:
            gpa: first guest-physical address, a multiple of the page size (4 KiB).
            size: bytes, or text such as ``"2M"``; a multiple of the page size.
            readonly: a ROM (see ``Region.readonly``); fill it with ``load()``.
            huge: ``"thp"`` advises the kernel to use transparent huge pages; ``"2M"`` or ``"1G"``
                takes hugetlb pages, which must be free.
            log_dirty: have KVM log the pages the guest writes.
            slot: KVM's slot number; by default the lowest that is free.
            name: a label for people.

        Raises:
            ValueError: misaligned, empty, beyond 2**52, overlapping another region, slot in use.
            CapabilityError: no huge pages of that size.
            OSError: the host has no room for it.
        """
        size = parse_size(size)
        gpa, slot = self._map.place(gpa, size, slot)
        return self._insert(
            slot, gpa, backing.anonymous(gpa, size, huge), readonly, log_dirty, name
        )

    def add_memfd(
        self,
        gpa: int,
        size: int | str,
        *,
        readonly: bool = False,
        huge: str | None = None,
        log_dirty: bool = False,
        slot: int | None = None,
        name: str = "",
    ) -> Region:
        """Add a memfd, so that another process can share it by ``region.fd``; arguments as ``add``.

        The memfd is sealed against shrinking. The region owns the descriptor: duplicate it to keep
        it past ``close()``.
        """
        size = parse_size(size)
        gpa, slot = self._map.place(gpa, size, slot)
        return self._insert(
            slot, gpa, backing.memfd(gpa, size, huge, name), readonly, log_dirty, name
        )

    def add_file(
        self,
        gpa: int,
        path: str | os.PathLike[str],
        size: int | str | None = None,
        *,
        offset: int | str = 0,
        shared: bool = False,
        readonly: bool = False,
        log_dirty: bool = False,
        slot: int | None = None,
        name: str = "",
    ) -> Region:
        """Add the contents of a file, from ``offset``, by default to its end.

        Args:
            gpa: as for ``add``.
            path: a regular file (also on hugetlbfs) or a block device.
            size: bytes to map, a multiple of the page size and not past the file's end.
            offset: where in the file, a multiple of the page size.
            shared: writes go to the file; else they stay private to this process.
            readonly: a ROM. A private one can still be changed with ``load()``, a shared one not.
            log_dirty: as for ``add``.
            slot: as for ``add``.
            name: as for ``add``.

        Raises:
            ValueError: as ``add``; the file is too short, or no file one can map.
            OSError: the file cannot be opened or mapped.
        """
        import os

        wanted = None if size is None else parse_size(size)
        made = backing.file(os.fsdecode(path), wanted, parse_size(offset), shared, readonly)
        try:
            gpa, slot = self._map.place(gpa, made.size, slot)
        except BaseException:
            made.close()
            raise
        return self._insert(slot, gpa, made, readonly, log_dirty, name)

    def add_private(
        self,
        gpa: int,
        fd: int,
        size: int | str,
        *,
        offset: int = 0,
        readonly: bool = False,
        slot: int | None = None,
        name: str = "",
        source: object = None,
    ) -> Region:
        """Add a private copy of what a descriptor has at ``offset``, copied as it is written.

        The descriptor stays the caller's and may be closed. ``source`` is kept as
        ``Region.source``. Other arguments as for ``add``.
        """
        size = parse_size(size)
        gpa, slot = self._map.place(gpa, size, slot)
        return self._insert(
            slot, gpa, backing.private(fd, size, offset, source), readonly, False, name
        )

    def _insert(
        self, slot: int, gpa: int, made: Backing, readonly: bool, log_dirty: bool, name: str
    ) -> Region:
        region = Region(slot, gpa, made, readonly=readonly, log_dirty=log_dirty, name=name)
        self._map.insert(region)
        try:
            for register in self._register:
                register(region)
        except BaseException:
            self._map.regions.remove(region)
            region.close()
            raise
        return region

    def attach(self, register: Callable[[Region], object]) -> None:
        """Call ``register(region)`` for every region there is, and for each one added later.

        This is how a machine hears of slots to tell KVM about. If ``register`` raises for a new
        region, that region is taken back and the error comes through ``add``.
        """
        self._map.check_open()
        for region in self._map.regions:
            register(region)
        self._register.append(register)

    def detach(self, register: Callable[[Region], object]) -> None:
        """Call ``register`` no more: the machine closes, the memory stays."""
        if register in self._register:
            self._register.remove(register)

    @property
    def regions(self) -> tuple[Region, ...]:
        """The regions, sorted by gpa."""
        return tuple(self._map.regions)

    @property
    def size(self) -> int:
        """Bytes of all regions together."""
        return sum(region.memory_size for region in self._map.regions)

    def region_at(self, gpa: int) -> Region:
        """Return the region that holds ``gpa``; GuestMemoryError outside RAM."""
        return self._map.readable(gpa, 1)[0][0]

    def covers(self, gpa: int, length: int = 1) -> bool:
        """Tell whether ``length`` bytes from ``gpa`` are all RAM or ROM."""
        try:
            self._map.readable(gpa, length)
        except GuestMemoryError:
            return False
        return True

    def __contains__(self, gpa: int) -> bool:
        return self.covers(gpa)
