"""A kernel as it will lie in memory: ranges that start as zeros, and the bytes that do not.

Large parts of a kernel's file are zeros (half of Debian's vmlinux). Neither are they copied nor are
the host's pages behind them touched, which costs more than the copying.
"""

from __future__ import annotations

from pykvm.errors import BootError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from pykvm.boot.elf import ElfImage
    from pykvm.boot.placement import Placement
    from pykvm.boot.ram import Buffer

MOST_SEGMENTS = 1024
"""A kernel has some five. Each is held against each other, so there is a limit."""
_CHUNK = 1 << 16
_ZEROS = bytes(_CHUNK)


class Image:
    """What to load and where to start it.

    Attributes:
        entry: gpa of the first instruction.
        pvh_entry: gpa of the PVH entry, or None.
        ranges: (gpa, size), sorted, apart from each other: all memory that the image defines.
        runs: (gpa, bytes) within the ranges, sorted, apart from each other; the rest is zeros.
    """

    __slots__ = ("entry", "pvh_entry", "ranges", "runs")

    def __init__(
        self,
        entry: int,
        pvh_entry: int | None,
        ranges: Sequence[tuple[int, int]],
        runs: Sequence[tuple[int, Buffer]],
    ) -> None:
        self.entry = entry
        self.pvh_entry = pvh_entry
        self.ranges = tuple(ranges)
        self.runs = tuple(runs)

    @property
    def start(self) -> int:
        """The lowest gpa."""
        return self.ranges[0][0]

    @property
    def end(self) -> int:
        """The gpa after the highest byte."""
        return sum(self.ranges[-1])

    def place(self, placement: Placement) -> None:
        """Have it written on commit; the ranges have been claimed."""
        for gpa, size in self.ranges:
            placement.clear(gpa, size)
        for gpa, data in self.runs:
            placement.put(gpa, data)

    def claim(self, placement: Placement, what: str) -> None:
        """Claim its ranges and have it written on commit."""
        for gpa, size in self.ranges:
            placement.claim(gpa, size, what)
        self.place(placement)

    def __repr__(self) -> str:
        size = sum(len(data) for _, data in self.runs)
        return (
            f"<Image {self.start:#x}-{self.end - 1:#x}, {size:#x} bytes not zero, "
            f"entry {self.entry:#x}>"
        )


def from_elf(elf: ElfImage, pvh_entry: int | None = None) -> Image:
    """The image that an ELF executable describes.

    Raises:
        BootError: thousands of segments.
    """
    if len(elf.segments) > MOST_SEGMENTS:
        raise BootError(
            f"ELF image: e_phnum: expected at most {MOST_SEGMENTS} segments to load, found "
            f"{len(elf.segments)}"
        )
    view = memoryview(elf.data)
    runs: list[tuple[int, Buffer]] = []
    for segment in elf.segments:
        data = view[segment.offset : segment.offset + segment.file_size]
        runs += nonzero(segment.gpa, data)
    ranges = [(segment.gpa, segment.size) for segment in elf.segments]
    return Image(elf.entry, pvh_entry, ranges, runs)


def nonzero(gpa: int, data: memoryview) -> Iterable[tuple[int, memoryview]]:
    """Leave the zeros out: the parts of ``data`` with something in them, and their addresses.

    Looked at in pieces of 64 KiB that are aligned in guest memory; pieces that adjoin come as one.
    """
    begin = None
    for start, stop in _pieces(gpa, len(data)):
        if bytes(data[start:stop]) != _ZEROS[: stop - start]:
            if begin is None:
                begin = start
        elif begin is not None:
            yield gpa + begin, data[begin:start]
            begin = None
    if begin is not None:
        yield gpa + begin, data[begin:]


def _pieces(gpa: int, length: int) -> Iterator[tuple[int, int]]:
    start = 0
    while start < length:
        stop = min(length, start + _CHUNK - (gpa + start) % _CHUNK)
        yield start, stop
        start = stop
