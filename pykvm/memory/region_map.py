"""The sorted map of regions, and the one way from a guest-physical address to host memory.

Every access is turned into pieces here, each within one region: ``readable()`` for reads,
``writable()`` for writes, where a read-only region is refused. Every write of the API goes through
``writable()``, or to a region that it lets every write into and that its caller remembers for
speed; who must see each single write has those callers forget and not remember.
"""

from __future__ import annotations

from pykvm.errors import ClosedError, GuestMemoryError

from .units import check_pages, checked_int, format_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from .host_writes import HostWrites
    from .region import Region

    # (region, offset within it, length)
    Piece = tuple[Region, int, int]

# MAXPHYADDR is at most 52 (Intel SDM volume 3A, 4.1.4; AMD APM volume 2, 5.1).
GPA_LIMIT = 1 << 52
# KVM keeps the slot number in 16 bits (api.rst 4.35); how many it has, KVM_CAP_NR_MEMSLOTS tells.
_SLOT_LIMIT = 1 << 16

_MOST_SHOWN = 8
_MOST_EXPOSED = 256


class RegionMap:
    """Regions sorted by gpa, which never overlap.

    Attributes:
        regions: the regions, sorted.
        closed: True once nothing may be looked up any more.
        writes: who must see each single write of the host, or None.
        exposed: writable views that were handed out: (region, offset, length), each once or so.
    """

    __slots__ = ("closed", "exposed", "regions", "writes")

    def __init__(self) -> None:
        self.regions: list[Region] = []
        self.closed = False
        self.writes: HostWrites | None = None
        self.exposed: list[Piece] = []

    def check_open(self) -> None:
        """Raise ClosedError once the memory was closed."""
        if self.closed:
            raise ClosedError("this guest memory was closed")

    def index(self, gpa: int) -> int:
        """Return how many regions begin at or below ``gpa``."""
        regions = self.regions
        low, high = 0, len(regions)
        while low < high:
            middle = (low + high) // 2
            if regions[middle].guest_phys_addr <= gpa:
                low = middle + 1
            else:
                high = middle
        return low

    def find(self, gpa: int) -> Region | None:
        """Return the region that holds ``gpa``, or None for a hole."""
        index = self.index(gpa)
        if index and gpa < (region := self.regions[index - 1]).end:
            return region
        return None

    def overlap(self, gpa: int, size: int) -> Region | None:
        """Return a region with an address in ``gpa .. gpa+size``, or None."""
        index = self.index(gpa + size - 1)
        if index and gpa < (region := self.regions[index - 1]).end:
            return region
        return None

    def place(self, gpa: int, size: int, slot: int | None) -> tuple[int, int]:
        """Check where a new region is to lie, and return its gpa and its slot.

        Args:
            gpa: its first guest-physical address.
            size: its length in bytes.
            slot: KVM's number for it, or None for the lowest that is free.

        Raises:
            ValueError: not whole pages, empty, beyond 2**52, an overlap, or a slot in use.
        """
        self.check_open()
        gpa = check_pages(checked_int(gpa, "a gpa"), "gpa")
        check_pages(size, "size")
        if size == 0:
            raise ValueError("a region of no bytes")
        if gpa < 0 or gpa + size > GPA_LIMIT:
            raise ValueError(
                f"{gpa:#x}..{gpa + size:#x} is not within the 52 bits of a physical address"
            )
        if slot is None and not self.regions:
            return gpa, 0
        if (other := self.overlap(gpa, size)) is not None:
            raise ValueError(
                f"{gpa:#x}-{gpa + size - 1:#x} ({format_size(size)}) overlaps the region "
                f"{other.describe()}"
            )
        taken = {region.slot: region for region in self.regions}
        if slot is None:
            slot = 0
            while slot in taken:
                slot += 1
        if not 0 <= checked_int(slot, "a slot") < _SLOT_LIMIT:
            raise ValueError(f"slot {slot} is not within 0..{_SLOT_LIMIT - 1}")
        if slot in taken:
            raise ValueError(f"slot {slot} is in use by the region {taken[slot].describe()}")
        return gpa, slot

    def insert(self, region: Region) -> None:
        """Add a region; the caller has seen that it overlaps none."""
        self.regions.insert(self.index(region.guest_phys_addr), region)

    def readable(self, gpa: int, length: int) -> list[Piece]:
        """Split an access into pieces, one a region, in order.

        No bytes are no pieces: an empty access is right anywhere, as a zero-length DMA is.

        Raises:
            GuestMemoryError: a byte of it is outside RAM, or an argument is negative.
            TypeError: an argument is no int.
            ClosedError: the memory was closed.
        """
        gpa = checked_int(gpa, "a gpa")
        length = checked_int(length, "a length")
        self.check_open()
        if gpa < 0:
            raise GuestMemoryError(f"a gpa cannot be negative: {gpa:#x}", gpa, length)
        if length < 0:
            raise GuestMemoryError(f"a length cannot be negative: {length}", gpa, length)
        pieces: list[Piece] = []
        at, end = gpa, gpa + length
        while at < end:
            region = self.find(at)
            if region is None:
                self._outside(gpa, length, at)
            step = min(end, region.end) - at
            pieces.append((region, at - region.guest_phys_addr, step))
            at += step
        return pieces

    def writable(self, gpa: int, length: int, rom: bool = False) -> list[Piece]:
        """As ``readable``, for a write. All of it is checked before a byte is written.

        Args:
            gpa: first guest-physical address.
            length: bytes.
            rom: also let the host write read-only regions.
        """
        pieces = self.readable(gpa, length)
        for region, _, _ in pieces:
            if region.readonly and not rom:
                raise GuestMemoryError(
                    f"write of {length} bytes at {gpa:#x}: the region is read-only, "
                    f"only load() writes it: {region.describe()}",
                    gpa,
                    length,
                )
            if not region.writable_by_host:
                raise GuestMemoryError(
                    f"write of {length} bytes at {gpa:#x}: the file is mapped shared and "
                    f"read-only, nothing here can write it: {region.describe()}",
                    gpa,
                    length,
                )
        return pieces

    def expose(self, region: Region, at: int, length: int) -> None:
        """Remember that a view lets somebody write here at any time, unseen."""
        exposed = self.exposed
        if exposed and exposed[-1] == (region, at, length):
            return
        if len(exposed) >= _MOST_EXPOSED:  # then it is all the same
            exposed[:] = {each: (each, 0, each.memory_size) for each, _, _ in exposed}.values()
            if (region, 0, region.memory_size) in exposed:
                return
        exposed.append((region, at, length))
        if self.writes is not None:
            self.writes.expose(region, at, length)

    def _outside(self, gpa: int, length: int, at: int) -> NoReturn:
        """Raise for an access whose byte ``at`` is in no region."""
        what = f"{gpa:#x}" if length == 1 else f"{gpa:#x}..{gpa + length:#x}"
        # Where the access began in RAM, the reader wants to know where it left it.
        where = "is outside RAM" if at == gpa else f"leaves RAM at {at:#x}"
        raise GuestMemoryError(f"{what} {where}; {self.describe(at)}", gpa, length)

    def describe(self, near: int = 0) -> str:
        """Return the map in one line; of a long one the regions around the gpa ``near``."""
        if not self.regions:
            return "there is no RAM"
        first = max(0, min(self.index(near) - _MOST_SHOWN // 2, len(self.regions) - _MOST_SHOWN))
        shown = self.regions[first : first + _MOST_SHOWN]
        text = "; ".join(region.describe() for region in shown)
        left = len(self.regions) - len(shown)
        return f"RAM is {text}" + (f"; and {left} more" if left else "")
