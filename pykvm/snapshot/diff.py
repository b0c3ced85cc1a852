"""What differs between two snapshots of machines with the same memory map."""

from __future__ import annotations

from pykvm.memory.units import PAGE_SIZE
from pykvm.snapshot import image as images
from pykvm.snapshot import vcpu as vcpus

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any

    from pykvm.snapshot.image import Part
    from pykvm.snapshots import Snapshot

_MOST_SHOWN = 20


class Change:
    """A field of a vCPU that differs: ``regs.rip``, ``msr 0xc0000080``, ``xsave+0xa0``."""

    __slots__ = ("cpu", "name", "new", "old")

    def __init__(self, cpu: int, name: str, old: int, new: int) -> None:
        self.cpu = cpu
        self.name = name
        self.old = old
        self.new = new

    def __repr__(self) -> str:
        return f"cpu {self.cpu} {self.name}: {self.old:#x} → {self.new:#x}"


class Region:
    """A region of memory in both snapshots, whose pages are kept no longer than theirs.

    Attributes:
        gpa, pages, name: where it begins, how many pages it has, and its name.
        old, new: bitmaps (``uint64_t[]``) of the pages that are not zeros in the one and the other.
        differs: a bitmap of the pages that differ.
        count: how many these are.
    """

    __slots__ = ("_part", "count", "differs", "gpa", "name", "new", "old", "pages")

    def __init__(self, old: Part, new: Part, differs: Any, count: int) -> None:
        self._part = old
        self.gpa, self.pages, self.name = old.gpa, old.pages, old.name
        self.old, self.new = old.held, new.held
        self.differs, self.count = differs, count

    def runs(self) -> Iterator[tuple[int, int]]:
        """Runs of pages that differ: (number of the first, how many)."""
        return self._part.runs(self.differs)


class Diff:
    """What differs: ``pages``, guest-physical addresses in order; ``registers``; ``devices``.

    Prints as text; in notebooks it is a map of memory.

    Attributes:
        pages: the first address of each page.
        registers: a :class:`Change` each.
        devices: names of devices whose states differ.
        regions: a :class:`Region` each of all memory.
    """

    def __init__(
        self,
        pages: list[int],
        registers: list[Change],
        devices: list[str],
        regions: Sequence[Region] = (),
    ) -> None:
        self.pages = pages
        self.registers = registers
        self.devices = devices
        self.regions = regions

    def __bool__(self) -> bool:
        return bool(self.pages or self.registers or self.devices)

    def __repr__(self) -> str:
        lines = [f"<Diff: {_count(self.pages, 'page')}, {_count(self.registers, 'register')}>"]
        lines += [f"  page {gpa:#x}" for gpa in self.pages[:_MOST_SHOWN]]
        lines += [f"  {change!r}" for change in self.registers[:_MOST_SHOWN]]
        lines += [f"  device {name}" for name in self.devices]
        return "\n".join(lines)

    def _repr_svg_(self) -> str:
        from pykvm.snapshot.picture import svg

        return svg(self)

    def _repr_html_(self) -> str:
        from pykvm.snapshot.picture import html

        return html(self)


def _count(things: list[Any], name: str) -> str:
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"


def diff(old: Snapshot, new: Snapshot) -> Diff:
    """See ``Snapshot.diff``.

    Raises:
        SnapshotError: their memory maps differ.
    """
    regions = [
        Region(part, other, bitmap, count)
        for (part, bitmap, count), other in zip(
            images.differing(old.image, new.image), new.image.parts, strict=True
        )
    ]
    pages = [
        region.gpa + (first + number) * PAGE_SIZE
        for region in regions
        if region.count
        for first, length in region.runs()
        for number in range(length)
    ]
    registers = [
        Change(cpu, *change)
        for cpu, (a, b) in enumerate(zip(old.vcpus, new.vcpus, strict=False))
        for change in vcpus.differences(a, b)
    ]
    names = sorted({*old.devices, *new.devices})
    devices = [name for name in names if old.devices.get(name) != new.devices.get(name)]
    return Diff(pages, registers, devices, regions)
