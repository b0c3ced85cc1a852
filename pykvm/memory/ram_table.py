"""The map of regions as C sees it, for devices whose rings lie in guest memory."""

from __future__ import annotations

from pykvm._abi import ffi

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .guest_memory import GuestMemory
    from .region import Region


class RamTable:
    """A ``struct pykvm_ram`` that follows a :class:`GuestMemory`. ``mem.table()`` makes it.

    As long as it is alive the host memory is, also past the memory's ``close()``.

    Attributes:
        c: the ``struct pykvm_ram``.
        views: of each region, by its id in C, all of it; read-only where the host may not write.
            Whoever writes beyond a chain's buffers, which are noted as it is popped, says so:
            :meth:`expose`.
    """

    __slots__ = ("_maps", "_memory_map", "_regions", "c", "views")

    def __init__(self, memory: GuestMemory) -> None:
        self.c = ffi.new("struct pykvm_ram *")
        self.views: list[memoryview] = []
        self._memory_map = memory._map
        self._regions: list[Region] = []
        self._maps: list[Any] = []  # a thread in C may still be using an old one
        self.publish()
        memory.attach(self._add)

    def _add(self, region: Region) -> None:
        view = region.cells(1)[:]
        writable = region.writable_by_host and not region.readonly
        self.views.append(view if writable else view.toreadonly())
        self._regions.append(region)
        self.publish()

    def expose(self, gpa: int, length: int) -> None:
        """Say that C writes here whenever it likes."""
        for piece in self._memory_map.readable(gpa, length):
            self._memory_map.expose(*piece)

    def publish(self) -> None:
        """Have C use the regions as they are now, and note what is written if that is wanted."""
        numbered = sorted(enumerate(self._regions), key=lambda each: each[1].guest_phys_addr)
        writes = self._memory_map.writes
        regions = ffi.new("struct pykvm_ram_region[]", max(len(numbered), 1))
        for c, (number, region) in zip(regions, numbered, strict=False):
            c.first, c.last = region.guest_phys_addr, region.end - 1
            c.host = ffi.cast("uint8_t *", region.userspace_addr)
            c.id = number
            c.readonly = self.views[number].readonly
            if writes is not None:
                c.touched = writes.of(region).touched
        table = ffi.new("struct pykvm_ram_map *", {"count": len(numbered), "regions": regions})
        self._maps.append((table, regions, writes))
        self.c.map = table
