"""ACPI tables as objects: encoded for a guest, decoded from bytes, printed by their fields.

After ACPI 6.5, chapter 5.2; members are named as the clauses name them.
"""

from __future__ import annotations

from struct import Struct

from pykvm.arch.x86_64 import aml
from pykvm.arch.x86_64.acpi_format import OEM, Layout, Table, checksum, in_words

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, Self


class _Pointers(Table):
    FORM = "I"

    def __init__(self, addresses: Sequence[int]) -> None:
        self.addresses = tuple(addresses)

    def body(self) -> bytes:
        return Struct(f"<{len(self.addresses)}{self.FORM}").pack(*self.addresses)

    @classmethod
    def from_body(cls, body: bytes) -> Self:
        return cls([address for (address,) in Struct(f"<{cls.FORM}").iter_unpack(body)])

    def lines(self) -> list[str]:
        return [f"{address:#x}" for address in self.addresses]


class Rsdt(_Pointers):
    """Root System Description Table (5.2.7): the other tables, by 32-bit addresses."""

    SIGNATURE = b"RSDT"


class Xsdt(_Pointers):
    """Extended System Description Table (5.2.8): the other tables, by 64-bit addresses."""

    SIGNATURE = b"XSDT"
    FORM = "Q"


class Fadt(Table):
    """Fixed ACPI Description Table (5.2.9), by its members: ``Fadt(sci_int=9, …)``."""

    SIGNATURE = b"FACP"
    REVISION = 6
    MINOR = 5
    LAYOUT = Layout(
        ("firmware_ctrl", "I"), ("dsdt", "I"), ("reserved", "B"), ("preferred_pm_profile", "B"),
        ("sci_int", "H"), ("smi_cmd", "I"), ("acpi_enable", "B"), ("acpi_disable", "B"),
        ("s4bios_req", "B"), ("pstate_cnt", "B"), ("pm1a_evt_blk", "I"), ("pm1b_evt_blk", "I"),
        ("pm1a_cnt_blk", "I"), ("pm1b_cnt_blk", "I"), ("pm2_cnt_blk", "I"), ("pm_tmr_blk", "I"),
        ("gpe0_blk", "I"), ("gpe1_blk", "I"), ("pm1_evt_len", "B"), ("pm1_cnt_len", "B"),
        ("pm2_cnt_len", "B"), ("pm_tmr_len", "B"), ("gpe0_blk_len", "B"), ("gpe1_blk_len", "B"),
        ("gpe1_base", "B"), ("cst_cnt", "B"), ("p_lvl2_lat", "H"), ("p_lvl3_lat", "H"),
        ("flush_size", "H"), ("flush_stride", "H"), ("duty_offset", "B"), ("duty_width", "B"),
        ("day_alrm", "B"), ("mon_alrm", "B"), ("century", "B"), ("iapc_boot_arch", "H"),
        ("reserved_2", "B"), ("flags", "I"), ("reset_reg", "12s"), ("reset_value", "B"),
        ("arm_boot_arch", "H"), ("fadt_minor_version", "B"), ("x_firmware_ctrl", "Q"),
        ("x_dsdt", "Q"), ("x_pm1a_evt_blk", "12s"), ("x_pm1b_evt_blk", "12s"),
        ("x_pm1a_cnt_blk", "12s"), ("x_pm1b_cnt_blk", "12s"), ("x_pm2_cnt_blk", "12s"),
        ("x_pm_tmr_blk", "12s"), ("x_gpe0_blk", "12s"), ("x_gpe1_blk", "12s"),
        ("sleep_control_reg", "12s"), ("sleep_status_reg", "12s"), ("hypervisor_vendor", "8s"),
    )  # fmt: skip

    WBINVD, PROC_C1, SLP_BUTTON, TMR_VAL_EXT, RESET_REG_SUP = (
        1 << 0,
        1 << 2,
        1 << 5,
        1 << 8,
        1 << 10,
    )
    """Of flags (5.2.9). SLP_BUTTON: the sleep button is not fixed hardware."""
    LEGACY_DEVICES, I8042, VGA_NOT_PRESENT, CMOS_RTC_NOT_PRESENT = 1 << 0, 1 << 1, 1 << 2, 1 << 5
    """Of iapc_boot_arch (5.2.9.3)."""

    def __init__(self, **members: Any) -> None:
        self.members = self.LAYOUT.fill({"fadt_minor_version": self.MINOR, **members})

    def body(self) -> bytes:
        """What follows the header."""
        return self.LAYOUT.pack(self.members)

    @classmethod
    def from_body(cls, body: bytes) -> Self:
        """Make the table from what follows the header."""
        return cls(**cls.LAYOUT.unpack(body))

    def lines(self) -> list[str]:
        """Every member that is not zero, flags by name."""
        shown = []
        for name, value in self.members.items():
            if value and (not isinstance(value, bytes) or value.strip(b"\0")):
                shown.append(f"{name:<20} {in_words(value)}{self._flags(name, value)}")
        return shown

    def _flags(self, member: str, value: Any) -> str:
        names = {
            "flags": ("WBINVD", "PROC_C1", "SLP_BUTTON", "TMR_VAL_EXT", "RESET_REG_SUP"),
            "iapc_boot_arch": (
                "LEGACY_DEVICES",
                "I8042",
                "VGA_NOT_PRESENT",
                "CMOS_RTC_NOT_PRESENT",
            ),
        }.get(member, ())
        return "".join(f" {name}" for name in names if value & getattr(self, name))


_MADT_KINDS = {
    "local-apic": (0, Layout(("uid", "B"), ("apic_id", "B"), ("flags", "I"))),
    "io-apic": (1, Layout(("id", "B"), ("reserved", "B"), ("address", "I"), ("gsi_base", "I"))),
    "override": (2, Layout(("bus", "B"), ("source", "B"), ("gsi", "I"), ("flags", "H"))),
    "local-apic-nmi": (4, Layout(("uid", "B"), ("flags", "H"), ("lint", "B"))),
    "local-x2apic": (
        9, Layout(("reserved", "H"), ("apic_id", "I"), ("flags", "I"), ("uid", "I")),
    ),
    "local-x2apic-nmi": (
        10, Layout(("flags", "H"), ("uid", "I"), ("lint", "B"), ("reserved", "3s")),
    ),
}  # fmt: skip
"""Number and members of each kind of entry (5.2.12.2 and on)."""


class Madt(Table):
    """Multiple APIC Description Table (5.2.12): ``(kind, members)`` for each entry."""

    SIGNATURE = b"APIC"
    REVISION = 5
    PCAT_COMPAT = 1
    """There is a pair of 8259 as well."""
    KINDS = _MADT_KINDS
    ENABLED = 1
    LEVEL_ACTIVE_HIGH = 0b1101
    """Of an override's flags: polarity 01, trigger mode 11. 0 conforms to the bus."""

    _HEAD = Layout(("address", "I"), ("flags", "I"))

    def __init__(
        self, address: int, entries: Sequence[tuple[str, dict[str, Any]]], flags: int = PCAT_COMPAT
    ) -> None:
        self.address = address
        self.flags = flags
        self.entries = tuple((kind, self.KINDS[kind][1].fill(it)) for kind, it in entries)

    def body(self) -> bytes:
        """What follows the header."""
        body = self._HEAD.pack({"address": self.address, "flags": self.flags})
        for kind, members in self.entries:
            number, layout = self.KINDS[kind]
            body += bytes([number, 2 + layout.size]) + layout.pack(members)
        return body

    @classmethod
    def from_body(cls, body: bytes) -> Self:
        """Make the table from what follows the header."""
        kinds = {number: (kind, layout) for kind, (number, layout) in cls.KINDS.items()}
        head = cls._HEAD.unpack(body)
        at, entries = cls._HEAD.size, []
        while at < len(body):
            number, length = body[at], body[at + 1]
            kind, layout = kinds.get(number, ("", None))
            if layout is None or length != 2 + layout.size:
                raise ValueError(f"APIC: entry of type {number} and length {length}")
            entries.append((kind, layout.unpack(body, at + 2)))
            at += length
        return cls(head["address"], entries, head["flags"])

    def lines(self) -> list[str]:
        """Every entry."""
        shown = [f"local APICs at {self.address:#x}, flags {self.flags:#x}"]
        for kind, members in self.entries:
            values = ", ".join(
                f"{name} {in_words(value)}"
                for name, value in members.items()
                if not name.startswith("reserved")
            )
            shown.append(f"{kind}: {values}")
        return shown


class Dsdt(Table):
    """Differentiated System Description Table (5.2.11.1): a definition block of AML."""

    SIGNATURE = b"DSDT"
    REVISION = 2
    """From 2 on integers have 64 bits."""

    def __init__(self, code: bytes) -> None:
        self.code = code

    def body(self) -> bytes:
        """What follows the header."""
        return self.code

    @classmethod
    def from_body(cls, body: bytes) -> Self:
        """Make the table from what follows the header."""
        return cls(body)

    def lines(self) -> list[str]:
        """The code as ASL, as far as ``aml.disassemble`` knows it."""
        try:
            return aml.disassemble(self.code).splitlines()
        except ValueError as error:
            return [f"{len(self.code)} bytes of AML: {error}"]


class Facs:
    """Firmware ACPI Control Structure (5.2.10): 64 bytes that kernel and firmware share.

    It has no checksum, lies on a 64-byte boundary, and its lock is written by the kernel.
    """

    SIGNATURE = b"FACS"
    LAYOUT = Layout(
        ("signature", "4s"), ("length", "I"), ("hardware_signature", "I"), ("waking_vector", "I"),
        ("global_lock", "I"), ("flags", "I"), ("x_waking_vector", "Q"), ("version", "B"),
        ("reserved", "3s"), ("ospm_flags", "I"), ("reserved_2", "24s"),
    )  # fmt: skip

    def __init__(self, **members: Any) -> None:
        first = {"signature": self.SIGNATURE, "length": self.LAYOUT.size, "version": 2}
        self.members = self.LAYOUT.fill({**first, **members})

    def encode(self) -> bytes:
        """Give its bytes."""
        return self.LAYOUT.pack(self.members)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Make it from its bytes. ValueError: another signature, or too few."""
        if data[:4] != cls.SIGNATURE or len(data) < cls.LAYOUT.size:
            raise ValueError(f"FACS: {len(data)} bytes that begin with {data[:4]!r}")
        return cls(**cls.LAYOUT.unpack(data))

    def __repr__(self) -> str:
        version, lock = self.members["version"], self.members["global_lock"]
        return f"<FACS version {version}, global lock {lock:#x}>"


class GenerationId:
    """The VM generation ID: 128 bits in guest memory that tell a clone from its original.

    After Microsoft's "Virtual Machine Generation ID" (2012): on an 8-byte boundary, in memory that
    is neither RAM nor ACPI tables in the memory map. A device of the DSDT names its address.
    """

    SIZE = 16
    ALIGN = 8

    def __init__(self, value: bytes) -> None:
        if len(value) != self.SIZE:
            raise ValueError(f"a VM generation ID has {self.SIZE} bytes, not {len(value)}")
        self.value = bytes(value)

    def encode(self) -> bytes:
        """Give its bytes."""
        return self.value

    def __repr__(self) -> str:
        return f"<VM generation ID {self.value.hex()}>"


class Rsdp:
    """Root System Description Pointer (5.2.5.3), with which a kernel begins."""

    SIGNATURE = b"RSD PTR "
    LAYOUT = Layout(
        ("signature", "8s"), ("checksum", "B"), ("oem", "6s"), ("revision", "B"), ("rsdt", "I"),
        ("length", "I"), ("xsdt", "Q"), ("extended_checksum", "B"), ("reserved", "3s"),
    )  # fmt: skip
    OLD_SIZE = 20
    """What ACPI 1.0 had, with a checksum of its own."""

    def __init__(self, rsdt: int, xsdt: int) -> None:
        self.rsdt = rsdt
        self.xsdt = xsdt

    def encode(self) -> bytes:
        """Give its bytes, with both checksums."""
        members: dict[str, Any] = {
            "signature": self.SIGNATURE, "oem": OEM, "revision": 2, "length": self.LAYOUT.size,
            "rsdt": self.rsdt, "xsdt": self.xsdt,
        }  # fmt: skip
        members["checksum"] = checksum(self.LAYOUT.pack(members)[: self.OLD_SIZE])
        members["extended_checksum"] = checksum(self.LAYOUT.pack(members))
        return self.LAYOUT.pack(members)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Make it from its bytes. ValueError: signature, length, checksums or revision."""
        size = cls.LAYOUT.size
        if len(data) < size or data[:8] != cls.SIGNATURE:
            raise ValueError(f"RSDP: {len(data)} bytes that begin with {data[:8]!r}")
        if sum(data[: cls.OLD_SIZE]) & 0xFF or sum(data[:size]) & 0xFF:
            raise ValueError("RSDP: the bytes do not sum up to 0")
        members = cls.LAYOUT.unpack(data)
        if members["revision"] < 2:
            raise ValueError(f"RSDP: revision {members['revision']} has no XSDT")
        return cls(members["rsdt"], members["xsdt"])

    def __repr__(self) -> str:
        return f"<RSDP revision 2: RSDT at {self.rsdt:#x}, XSDT at {self.xsdt:#x}>"
