"""Who gets which guest-physical addresses; checked in full before the first byte is written.

A loader claims what must lie where it lies (the image), lets the rest be placed where there is room
(initrd, command line), and commits: until then guest memory is as it was.
"""

from __future__ import annotations

from pykvm.errors import BootError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import NoReturn

    from pykvm.boot.e820 import E820
    from pykvm.boot.ram import Buffer, MappedMemory

_PAGE = 0x1000
_RAM = 1
_4GIB = 1 << 32


class Placement:
    """Claims on guest memory, and what is to be written.

    Args:
        mem: the memory. What lies in a hole or in a ROM is refused.
        e820: the map the guest will see. Only RAM in it is given out by ``lowest`` and ``highest``.
    """

    def __init__(self, mem: MappedMemory, e820: Sequence[E820]) -> None:
        self._mem = mem
        self._e820 = e820
        self._claims: list[tuple[int, int, str]] = []
        self._zeros: list[tuple[int, int]] = []
        self._writes: list[tuple[int, Buffer]] = []

    def claim(self, gpa: int, length: int, what: str) -> int:
        """Take ``length`` bytes at ``gpa``; returns ``gpa``.

        Raises:
            BootError: not all of it is RAM, or somebody has it.
        """
        self.require_ram(gpa, length, what)
        self.reserve(gpa, length, what)
        return gpa

    def require_ram(self, gpa: int, length: int, what: str) -> None:
        """Raise BootError unless all of a range is RAM, which a ROM is not."""
        found = self._ram_end(gpa)
        if found < gpa + length:
            top = max((r.guest_phys_addr + r.memory_size for r in self._mem.regions), default=0)
            if found >= top:
                raise BootError(
                    f"{what}: expected RAM at {gpa:#x}..{gpa + length - 1:#x}, found its end at "
                    f"{top:#x}: the machine needs more memory"
                )
            where = f"a hole or a ROM at {found:#x} in {self._mem!r}"
            raise BootError(
                f"{what}: expected RAM at {gpa:#x}..{gpa + length - 1:#x}, found {where}"
            )

    def reserve(self, gpa: int, length: int, what: str) -> None:
        """Keep everything else out of a range, RAM or not.

        Raises:
            BootError: somebody has some of it.
        """
        for start, stop, owner in self._claims:
            if start < gpa + length and gpa < stop:
                raise BootError(
                    f"{what}: expected {gpa:#x}..{gpa + length - 1:#x} to be free, found "
                    f"{owner} at {start:#x}..{stop - 1:#x}"
                )
        self._claims.append((gpa, gpa + length, what))

    def is_free(self, gpa: int, length: int) -> bool:
        """Whether ``claim`` would succeed."""
        return self._ram_end(gpa) >= gpa + length and not any(
            start < gpa + length and gpa < stop for start, stop, _ in self._claims
        )

    def highest(self, length: int, what: str, limit: int = _4GIB, start: int = 0) -> int:
        """Claim a range as high as possible in ``start .. limit``, from a page's beginning on."""
        best = -1
        for low, high in self._free(start, limit):
            gpa = (high - length) & -_PAGE
            if gpa >= low:
                best = max(best, gpa)
        if best < 0:
            self._no_room(length, what, start, limit)
        return self.claim(best, length, what)

    def lowest(
        self, length: int, what: str, start: int = 0, limit: int = _4GIB, align: int = _PAGE
    ) -> int:
        """Claim a range as low as possible in ``start .. limit``."""
        for low, high in sorted(self._free(start, limit)):
            gpa = (low + align - 1) & -align
            if gpa + length <= high:
                return self.claim(gpa, length, what)
        self._no_room(length, what, start, limit)

    def _no_room(self, length: int, what: str, start: int, limit: int) -> NoReturn:
        largest = max((high - low for low, high in self._free(start, limit)), default=0)
        raise BootError(
            f"{what}: expected {length:#x} bytes of free RAM in {start:#x}..{limit - 1:#x}, "
            f"found at most {largest:#x}"
        )

    def put(self, gpa: int, data: Buffer) -> None:
        """Write ``data`` on commit; the range has been claimed."""
        self._writes.append((gpa, data))

    def clear(self, gpa: int, length: int) -> None:
        """Zero a claimed range on commit, before anything is written."""
        self._zeros.append((gpa, length))

    def commit(self) -> None:
        """Write it all."""
        for gpa, length in self._zeros:
            self._mem.fill(gpa, length)
        for gpa, data in self._writes:
            self._mem.load(gpa, data)

    def _ram_end(self, gpa: int) -> int:
        """Where writable memory that contains ``gpa`` ends; ``gpa`` itself where there is none."""
        for region in self._mem.regions:
            start = region.guest_phys_addr
            if start <= gpa < start + region.memory_size and not region.readonly:
                gpa = start + region.memory_size
        return gpa

    def _free(self, start: int, limit: int) -> Iterator[tuple[int, int]]:
        """Ranges of RAM within ``start .. limit`` that nobody claimed."""
        taken = sorted((first, stop) for first, stop, _ in self._claims)
        for entry in self._e820:
            if entry.type != _RAM:
                continue
            low, end = max(entry.base, start), min(entry.end, limit)
            for first, stop in taken:
                if stop <= low or first >= end:
                    continue
                if low < first:
                    yield low, first
                low = max(low, stop)
            if low < end:
                yield low, end
