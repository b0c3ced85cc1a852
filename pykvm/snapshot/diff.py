"""What differs between two snapshots of machines with the same memory map."""

from __future__ import annotations

from pykvm.memory.units import PAGE_SIZE
from pykvm.snapshot import image as images
from pykvm.snapshot import vcpu as vcpus

TYPE_CHECKING = False
if TYPE_CHECKING:
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


class Diff:
    """What differs: ``pages``, guest-physical addresses in order; ``registers``; ``devices``.

    Attributes:
        pages: the first address of each page.
        registers: a :class:`Change` each.
        devices: names of devices whose states differ.
    """

    def __init__(self, pages: list[int], registers: list[Change], devices: list[str]) -> None:
        self.pages = pages
        self.registers = registers
        self.devices = devices

    def __bool__(self) -> bool:
        return bool(self.pages or self.registers or self.devices)

    def __repr__(self) -> str:
        lines = [f"<Diff: {len(self.pages)} pages, {len(self.registers)} registers>"]
        lines += [f"  page {gpa:#x}" for gpa in self.pages[:_MOST_SHOWN]]
        lines += [f"  {change!r}" for change in self.registers[:_MOST_SHOWN]]
        lines += [f"  device {name}" for name in self.devices]
        return "\n".join(lines)


def diff(old: Snapshot, new: Snapshot) -> Diff:
    """See ``Snapshot.diff``.

    Raises:
        SnapshotError: their memory maps differ.
    """
    pages = [
        part.gpa + (first + number) * PAGE_SIZE
        for part, bitmap, count in images.differing(old.image, new.image)
        if count
        for first, length in part.runs(bitmap)
        for number in range(length)
    ]
    registers = [
        Change(cpu, *change)
        for cpu, (a, b) in enumerate(zip(old.vcpus, new.vcpus, strict=False))
        for change in vcpus.differences(a, b)
    ]
    names = sorted({*old.devices, *new.devices})
    devices = [name for name in names if old.devices.get(name) != new.devices.get(name)]
    return Diff(pages, registers, devices)
