"""The memory map that a PC's BIOS gives by INT 15h, E820: what is RAM, what is reserved.

Linux, PVH and multiboot all take it, each in a record of its own (ACPI 6.5, 15 "System Address Map
Interfaces" defines the types).
"""

from __future__ import annotations

from pykvm.boot import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pykvm.boot.ram import Region

RAM, RESERVED, ACPI, NVS, UNUSABLE = 1, 2, 3, 4, 5
_NAMES = {RAM: "RAM", RESERVED: "reserved", ACPI: "ACPI", NVS: "ACPI NVS", UNUSABLE: "unusable"}


class E820(tuple[int, int, int]):
    """One entry, (base, size, type): ``size`` bytes from ``base``, guest-physical."""

    __slots__ = ()

    def __new__(cls, base: int, size: int, type: int) -> E820:
        """Make an entry."""
        return super().__new__(cls, (base, size, type))

    @property
    def base(self) -> int:
        """The first gpa."""
        return self[0]

    @property
    def size(self) -> int:
        """Bytes."""
        return self[1]

    @property
    def type(self) -> int:
        """``RAM``, ``RESERVED``, …"""
        return self[2]

    @property
    def end(self) -> int:
        """The gpa after the last byte."""
        return self.base + self.size

    def __repr__(self) -> str:
        kind = _NAMES.get(self.type, f"type {self.type}")
        return f"<E820 {self.base:#x}-{self.end - 1:#x} {kind}>"


def memory_map(regions: Iterable[Region]) -> list[E820]:
    """Build the map of a PC that has these regions: RAM as RAM, ROM as reserved.

    The first megabyte has its PC's holes: the EBDA and the ACPI tables are reserved, and what lies
    between (VGA, option ROMs) is left out whether or not there is RAM behind it.
    """
    entries: list[E820] = []
    for region in regions:
        end = region.guest_phys_addr + region.memory_size
        for start, stop, kind in _pieces(region.guest_phys_addr, end, region.readonly):
            if entries and entries[-1].type == kind and entries[-1].end == start:
                start = entries.pop().base
            entries.append(E820(start, stop - start, kind))
    return entries


def _pieces(start: int, end: int, readonly: bool) -> Iterable[tuple[int, int, int]]:
    """Cut a region where the PC's map of the first megabyte changes."""
    kind = RESERVED if readonly else RAM
    for low, high, here in (
        (0, layout.EBDA, kind),
        (layout.EBDA, layout.VGA, RESERVED),
        (layout.RSDP, layout.ACPI_END, RESERVED),
        (layout.HIGH_MEMORY, end, kind),
    ):
        first, last = max(start, low), min(end, high)
        if first < last:
            yield first, last, here


def normalized(entries: Sequence[tuple[int, int, int]]) -> list[E820]:
    """Return entries given by a caller as ``E820``, sorted; empty ones are dropped.

    Raises:
        ValueError: a negative number, or an end beyond 64 bits.
    """
    made = sorted(E820(*entry) for entry in entries)
    for entry in made:
        if min(entry) < 0 or entry.end > 1 << 64:
            raise ValueError(f"{tuple(entry)} is no range of 64-bit addresses")
    return [entry for entry in made if entry.size]


def ram_below(entries: Iterable[E820], start: int) -> int:
    """Bytes of RAM that follow ``start`` without a gap."""
    end = start
    for entry in sorted(entries):
        if entry.type == RAM and entry.base <= end < entry.end:
            end = entry.end
    return end - start
