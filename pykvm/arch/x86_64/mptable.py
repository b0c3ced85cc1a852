"""The MultiProcessor tables, for kernels without ACPI (MultiProcessor Specification 1.4, Intel).

A floating pointer, then the configuration table: processors, the ISA bus, the IOAPIC, and how
interrupts are wired. Where ACPI tables are found, Linux does not look at these.
"""

from __future__ import annotations

from pykvm.arch.x86_64 import pc
from pykvm.arch.x86_64.acpi_format import Layout, checksum

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, Self

    Entry = tuple[str, dict[str, Any]]

POINTER = Layout(
    ("signature", "4s"), ("table", "I"), ("length", "B"), ("revision", "B"), ("checksum", "B"),
    ("features", "5s"),
)  # fmt: skip
"""4.1; the length is in units of 16 bytes."""

HEADER = Layout(
    ("signature", "4s"), ("length", "H"), ("revision", "B"), ("checksum", "B"), ("oem", "8s"),
    ("product", "12s"), ("oem_table", "I"), ("oem_size", "H"), ("count", "H"), ("lapic", "I"),
    ("extended_length", "H"), ("extended_checksum", "B"), ("reserved", "B"),
)  # fmt: skip
"""4.2."""

_WIRE = Layout(
    ("kind", "B"), ("flags", "H"), ("bus", "B"), ("irq", "B"), ("apic", "B"), ("pin", "B")
)
KINDS = {
    "processor": (0, Layout(
        ("apic_id", "B"), ("version", "B"), ("flags", "B"), ("signature", "I"), ("features", "I"),
        ("reserved", "8s"),
    )),
    "bus": (1, Layout(("id", "B"), ("name", "6s"))),
    "io-apic": (2, Layout(("id", "B"), ("version", "B"), ("flags", "B"), ("address", "I"))),
    "interrupt": (3, _WIRE),
    "local-interrupt": (4, _WIRE),
}  # fmt: skip
"""Number and members of each kind of entry (4.3)."""

REVISION_1_4 = 4
APIC_VERSION, IOAPIC_VERSION = 0x14, 0x11
"""What KVM's version registers say; an integrated APIC."""
ENABLED, BOOTSTRAP = 1, 2
FPU_AND_APIC = 0x201
"""CPUID's feature bits that the table wants to know."""
INT, NMI, EXTINT = 0, 1, 3
LEVEL_ACTIVE_HIGH = 0b1101
EVERY_APIC = 0xFF
ISA = 0


class MpTable:
    """The tables, placed.

    Attributes:
        base: guest-physical address of the floating pointer.
        entries: ``(kind, members)``.
        blob: the bytes.
    """

    def __init__(self, base: int, entries: Sequence[Entry]) -> None:
        self.base = base
        self.entries = tuple((kind, KINDS[kind][1].fill(members)) for kind, members in entries)
        body = b"".join(
            bytes([KINDS[kind][0]]) + KINDS[kind][1].pack(members) for kind, members in entries
        )
        header: dict[str, Any] = {
            "signature": b"PCMP", "length": HEADER.size + len(body), "revision": REVISION_1_4,
            "oem": b"PYKVM   ", "product": b"PC          ", "count": len(entries),
            "lapic": pc.LAPIC,
        }  # fmt: skip
        header["checksum"] = checksum(HEADER.pack(header) + body)
        pointer: dict[str, Any] = {
            "signature": b"_MP_", "table": base + POINTER.size, "length": 1,
            "revision": REVISION_1_4,
        }  # fmt: skip
        pointer["checksum"] = checksum(POINTER.pack(pointer))
        self.blob = POINTER.pack(pointer) + HEADER.pack(header) + body

    @classmethod
    def decode(cls, base: int, data: bytes) -> Self:
        """Make the table from the bytes that begin with the floating pointer.

        Raises:
            ValueError: a wrong signature, length, checksum, or an unknown entry.
        """
        size = POINTER.size
        if len(data) < size + HEADER.size or sum(data[:size]) & 0xFF:
            raise ValueError("the floating pointer is cut off, or does not sum up to 0")
        header = HEADER.unpack(data, size)
        if data[:4] != b"_MP_" or header["signature"] != b"PCMP":
            raise ValueError(f"signatures {data[:4]!r} and {header['signature']!r}")
        table = data[size : size + header["length"]]
        if len(table) != header["length"] or sum(table) & 0xFF:
            raise ValueError("the configuration table is cut off, or does not sum up to 0")
        kinds = {number: (kind, layout) for kind, (number, layout) in KINDS.items()}
        at, entries = HEADER.size, []
        for _ in range(header["count"]):
            kind, layout = kinds.get(table[at] if at < len(table) else -1, ("", None))
            if layout is None or at + 1 + layout.size > len(table):
                raise ValueError(f"entry at offset {at}: unknown, or cut off")
            entries.append((kind, layout.unpack(table, at + 1)))
            at += 1 + layout.size
        return cls(base, entries)

    def write(self, memory: Any) -> None:
        """Put the tables into guest memory."""
        memory[self.base : self.base + len(self.blob)] = self.blob

    def __repr__(self) -> str:
        lines = [f"<MP 1.4 at {self.base:#x}: {len(self.entries)} entries>"]
        for kind, members in self.entries:
            shown = ", ".join(
                f"{name} {value:#x}" if isinstance(value, int) else f"{name} {value.decode()!r}"
                for name, value in members.items()
                if name != "reserved"
            )
            lines.append(f"{kind}: {shown}")
        return "\n  ".join(lines)


def build_mptable(
    *, cpus: int, base: int = pc.MP_BASE, ioapic: int = pc.IOAPIC, timer_pin: int = pc.TIMER_PIN
) -> MpTable:
    """Make the tables of a PC.

    Args:
        cpus: how many processors, with APIC ids from 0 on; at most 254.
        base: guest-physical address, on a 16-byte boundary, from 0xf0000 to 0xfffff.
        ioapic: its guest-physical address.
        timer_pin: the IOAPIC's input at which GSI 0 arrives, as in ``pc.gsi_routes()``.
    """
    if not 1 <= cpus <= 254:
        raise ValueError(f"MP tables have room for 1..254 processors, not {cpus}")
    if base % 16 or not 0xF0000 <= base < 1 << 20:
        raise ValueError(
            f"MP tables begin on a 16-byte boundary in 0xf0000..0xfffff, not {base:#x}"
        )
    entries: list[Entry] = [
        (
            "processor",
            {
                "apic_id": apic_id,
                "version": APIC_VERSION,
                "flags": ENABLED | (0 if apic_id else BOOTSTRAP),
                "features": FPU_AND_APIC,
            },
        )
        for apic_id in range(cpus)
    ]
    chip = cpus  # ids are one number space
    entries.append(("bus", {"id": ISA, "name": b"ISA   "}))
    entries.append(
        (
            "io-apic",
            {"id": chip, "version": IOAPIC_VERSION, "flags": ENABLED, "address": ioapic},
        )
    )
    for gsi, to, pin in pc.gsi_routes(timer_pin):
        if to == "ioapic" and gsi < pc.ISA_IRQS:
            flags = LEVEL_ACTIVE_HIGH if gsi == pc.SCI_GSI else 0
            wire = {"kind": INT, "flags": flags, "bus": ISA, "irq": gsi, "apic": chip, "pin": pin}
            entries.append(("interrupt", wire))
    for kind, lint in ((EXTINT, 0), (NMI, 1)):
        wire = {"kind": kind, "bus": ISA, "apic": EVERY_APIC, "pin": lint}
        entries.append(("local-interrupt", wire))
    table = MpTable(base, entries)
    if base + len(table.blob) > 1 << 20:
        raise ValueError(f"{len(table.blob):#x} bytes of MP tables at {base:#x} pass 1 MiB")
    return table
