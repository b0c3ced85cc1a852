"""Registers of x86-64: names, parts, named bits, and dumps that a person can read.

``PARTS`` maps every name a programmer uses (``rax eax ax al ah``, ``r8d``, ``eflags``) to its full
register, so that a view over ``struct kvm_regs`` needs one table and two functions.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from .segments import Segment

GPRS = (
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
)  # fmt: skip
"""The sixteen general registers, named as the fields of ``struct kvm_regs``."""

SEGMENTS = ("cs", "ss", "ds", "es", "fs", "gs")
SYSTEM_SEGMENTS = ("tr", "ldt")
DESCRIPTOR_TABLES = ("gdt", "idt")
CONTROLS = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")
"""Fields of ``struct kvm_sregs``, by kind."""

# Bit numbers. Intel SDM Vol. 3A §2.5 (control registers) and §2.3 (EFLAGS), §2.2.1 (EFER);
# AMD APM Vol. 2 §3.1.7 for AMD's own EFER bits.
CR0_BITS = {
    "PE": 0, "MP": 1, "EM": 2, "TS": 3, "ET": 4, "NE": 5, "WP": 16, "AM": 18,
    "NW": 29, "CD": 30, "PG": 31,
}  # fmt: skip
CR4_BITS = {
    "VME": 0, "PVI": 1, "TSD": 2, "DE": 3, "PSE": 4, "PAE": 5, "MCE": 6, "PGE": 7, "PCE": 8,
    "OSFXSR": 9, "OSXMMEXCPT": 10, "UMIP": 11, "LA57": 12, "VMXE": 13, "SMXE": 14, "FSGSBASE": 16,
    "PCIDE": 17, "OSXSAVE": 18, "KL": 19, "SMEP": 20, "SMAP": 21, "PKE": 22, "CET": 23, "PKS": 24,
    "UINTR": 25, "LASS": 27, "LAM_SUP": 28, "FRED": 32,
}  # fmt: skip
EFER_BITS = {
    "SCE": 0, "LME": 8, "LMA": 10, "NXE": 11, "SVME": 12, "LMSLE": 13, "FFXSR": 14, "TCE": 15,
    "MCOMMIT": 17, "INTWB": 18, "UAIE": 20, "AIBRSE": 21,
}  # fmt: skip
RFLAGS_BITS = {
    "CF": 0, "PF": 2, "AF": 4, "ZF": 6, "SF": 7, "TF": 8, "IF": 9, "DF": 10, "OF": 11, "NT": 14,
    "RF": 16, "VM": 17, "AC": 18, "VIF": 19, "VIP": 20, "ID": 21,
}  # fmt: skip
APIC_BASE_BITS = {"BSP": 8, "X2APIC": 10, "ENABLE": 11}

MASK64 = (1 << 64) - 1


def _parts() -> dict[str, tuple[str, int, int]]:
    table: dict[str, tuple[str, int, int]] = {}
    for letter in "abcd":
        full = f"r{letter}x"
        table |= {full: (full, 0, 64), f"e{letter}x": (full, 0, 32), f"{letter}x": (full, 0, 16)}
        table |= {f"{letter}l": (full, 0, 8), f"{letter}h": (full, 8, 8)}
    for stem in ("si", "di", "bp", "sp"):
        full = f"r{stem}"
        table |= {full: (full, 0, 64), f"e{stem}": (full, 0, 32), stem: (full, 0, 16)}
        table[f"{stem}l"] = (full, 0, 8)
    for number in range(8, 16):
        full = f"r{number}"
        table |= {full: (full, 0, 64), f"{full}d": (full, 0, 32)}
        table |= {f"{full}w": (full, 0, 16), f"{full}b": (full, 0, 8)}
    table |= {"rip": ("rip", 0, 64), "eip": ("rip", 0, 32), "ip": ("rip", 0, 16)}
    table |= {"rflags": ("rflags", 0, 64), "eflags": ("rflags", 0, 32), "flags": ("rflags", 0, 16)}
    return table


PARTS: dict[str, tuple[str, int, int]] = _parts()
"""Register name → (field of ``struct kvm_regs``, shift, width in bits)."""

FLAGS: dict[str, tuple[int, int]] = {
    name.lower(): (bit, 1) for name, bit in RFLAGS_BITS.items()
} | {"iopl": (12, 2)}
"""Flag name in lower case → (lowest bit, width in bits) within RFLAGS."""


def read(regs: Any, name: str) -> int:
    """The value of register ``name`` (any key of ``PARTS``), taken out of ``regs``."""
    field, shift, bits = PARTS[name]
    return (int(getattr(regs, field)) >> shift) & ((1 << bits) - 1)


def write(regs: Any, name: str, value: int) -> None:
    """Set register ``name`` in ``regs`` as an instruction would.

    A write to a 32-bit register clears the upper half of its 64-bit register; a write to a 16-bit
    or 8-bit register leaves the rest alone (Intel SDM Vol. 1 §3.4.1.1). Negative values are taken
    as two's complement of that width.

    Raises:
        ValueError: ``value`` does not fit into the register.
    """
    field, shift, bits = PARTS[name]
    top = 1 << bits
    if not -(top >> 1) <= value < top:
        raise ValueError(f"{name} holds {bits} bits, {value:#x} does not fit")
    value &= top - 1
    if bits < 32:
        mask = (top - 1) << shift
        value = int(getattr(regs, field)) & ~mask & MASK64 | value << shift
    setattr(regs, field, value)


def flag_names(value: int, bits: dict[str, int]) -> str:
    """The names of the bits set in ``value``, in order, unnamed ones as ``bit 19``."""
    value = int(value)
    by_bit = {bit: name for name, bit in bits.items()}
    return " ".join(
        by_bit.get(bit, f"bit {bit}") for bit in range(value.bit_length()) if value >> bit & 1
    )


def rflags_names(value: int) -> str:
    """The flags set in an RFLAGS value; bit 1, which is always set, goes without saying."""
    value = int(value)
    iopl = value >> 12 & 3
    names = flag_names(value & ~0x3002, RFLAGS_BITS)
    return f"{names} IOPL={iopl}".lstrip() if iopl else names


def format_regs(regs: Any) -> str:
    """The whole of ``struct kvm_regs``: four registers a line, then RIP and RFLAGS in words."""
    lines = []
    for start in range(0, 16, 4):
        row = (f"{name.upper():<3}={int(getattr(regs, name)):016x}" for name in GPRS[start:][:4])
        lines.append(" ".join(row))
    rflags = int(regs.rflags)
    lines.append(f"RIP={int(regs.rip):016x} RFLAGS={rflags:08x} [{rflags_names(rflags)}]")
    return "\n".join(lines)


def _segment_rows(sregs: Any) -> Iterator[str]:
    from .segments import Segment

    for name in (*SEGMENTS, *SYSTEM_SEGMENTS):
        yield f"{name.upper():<3} {Segment.of(getattr(sregs, name))}"
    for name in DESCRIPTOR_TABLES:
        table = getattr(sregs, name)
        yield f"{name.upper():<3} base {int(table.base):#x} limit {int(table.limit):#x}"


def mode_name(sregs: Any, rflags: int = 2) -> str:
    """The processor mode that these registers amount to, with the ring: ``64-bit, ring 3``."""
    cr0, efer = int(sregs.cr0), int(sregs.efer)
    if not cr0 & 1:
        return "real mode"
    ring = int(sregs.ss.dpl) & 3
    if efer >> 10 & 1:
        kind = "64-bit" if int(sregs.cs.l) else "compatibility mode"
    elif rflags >> 17 & 1:
        return "virtual-8086 mode"
    else:
        width = 32 if int(sregs.cs.db) else 16
        paging = "" if cr0 >> 31 & 1 else ", paging off"
        kind = f"{width}-bit protected mode{paging}"
    return f"{kind}, ring {ring}"


def format_sregs(sregs: Any) -> str:
    """The whole of ``struct kvm_sregs`` (or sregs2): segments, tables, control registers."""
    lines = [*_segment_rows(sregs)]
    for name, bits in (("cr0", CR0_BITS), ("cr4", CR4_BITS), ("efer", EFER_BITS)):
        value = int(getattr(sregs, name))
        lines.append(f"{name.upper():<4} {value:#x} [{flag_names(value, bits)}]")
    lines.append(f"CR2  {int(sregs.cr2):#x}  CR3 {int(sregs.cr3):#x}  CR8 {int(sregs.cr8):#x}")
    apic = int(sregs.apic_base)
    names = flag_names(apic & 0xFFF, APIC_BASE_BITS)
    lines.append(f"APIC_BASE {apic & ~0xFFF:#x} [{names}]")
    bitmap = pending_vectors(sregs)
    if bitmap:
        lines.append(f"interrupt_bitmap: vector {', '.join(map(str, bitmap))} pending")
    lines.append(f"mode: {mode_name(sregs)}")
    return "\n".join(lines)


def pending_vectors(sregs: Any) -> list[int]:
    """The vectors set in ``sregs.interrupt_bitmap``; [] for ``kvm_sregs2``, which has none."""
    words = getattr(sregs, "interrupt_bitmap", None)
    if words is None:
        return []
    return [
        number * 64 + bit
        for number in range(4)
        for bit in range(64)
        if int(words[number]) >> bit & 1
    ]


class Regs:
    """A plain ``struct kvm_regs`` with the values of a processor after reset."""

    __slots__ = (*GPRS, "rflags", "rip")

    if TYPE_CHECKING:
        rax: int
        rbx: int
        rcx: int
        rdx: int
        rsi: int
        rdi: int
        rbp: int
        rsp: int
        r8: int
        r9: int
        r10: int
        r11: int
        r12: int
        r13: int
        r14: int
        r15: int

    def __init__(self) -> None:
        for name in GPRS:
            setattr(self, name, 0)
        self.rip, self.rflags = 0xFFF0, 2

    def __repr__(self) -> str:
        return format_regs(self)


class DescriptorTable:
    """A plain ``struct kvm_dtable``: linear base, and limit (size - 1) in bytes."""

    __slots__ = ("base", "limit")

    def __init__(self, base: int = 0, limit: int = 0xFFFF) -> None:
        self.base, self.limit = base, limit


class Sregs:
    """A plain ``struct kvm_sregs`` with the values of a processor after reset.

    Intel SDM Vol. 3A §9.1.1, table 9-1. Handy where no vCPU is at hand: in tests, for a state read
    from a file, to see what ``modes.enter()`` does.
    """

    __slots__ = (*CONTROLS, *DESCRIPTOR_TABLES, *SEGMENTS, *SYSTEM_SEGMENTS, "interrupt_bitmap")

    if TYPE_CHECKING:
        cs: Segment
        ss: Segment
        ds: Segment
        es: Segment
        fs: Segment
        gs: Segment
        tr: Segment
        ldt: Segment
        cr2: int
        cr3: int
        cr4: int
        cr8: int
        efer: int

    def __init__(self) -> None:
        from .segments import Segment, real_mode

        for name in SEGMENTS:
            setattr(self, name, real_mode(0))
        self.cs = real_mode(0xF000, code=True)
        self.cs.base = 0xFFFF0000
        self.tr = Segment(limit=0xFFFF, type=11, present=1)
        self.ldt = Segment(limit=0xFFFF, type=2, present=1)
        self.gdt, self.idt = DescriptorTable(), DescriptorTable()
        for name in CONTROLS:
            setattr(self, name, 0)
        self.cr0, self.apic_base = 0x60000010, 0xFEE00900
        self.interrupt_bitmap = [0, 0, 0, 0]

    def __repr__(self) -> str:
        return format_sregs(self)
