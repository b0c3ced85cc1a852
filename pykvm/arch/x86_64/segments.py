"""Segment descriptors and interrupt gates: as KVM holds them, and as they lie in memory.

A ``Segment`` has the fields of ``struct kvm_segment``: what the processor caches when a selector
is loaded. ``encode`` and ``decode`` go to and from the descriptor in a GDT (Intel SDM Vol. 3A
§3.4.5; 16-byte system descriptors of long mode: §7.2.3; gates: §6.11 and §6.14.1).
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Self

FIELDS = (
    "base", "limit", "selector", "type", "present", "dpl", "db", "s", "l", "g", "avl", "unusable",
)  # fmt: skip

# System-descriptor types, Intel SDM Vol. 3A table 3-2.
TSS16_AVAILABLE, LDT, TSS16_BUSY, TSS_AVAILABLE, TSS_BUSY = 1, 2, 3, 9, 11
SYSTEM_NAMES = {
    1: "tss16", 2: "ldt", 3: "tss16 busy", 4: "call gate16", 5: "task gate", 6: "int gate16",
    7: "trap gate16", 9: "tss", 11: "tss busy", 12: "call gate", 14: "int gate", 15: "trap gate",
}  # fmt: skip


class Segment:
    """One segment register: the fields of ``struct kvm_segment``.

    Attributes:
        base: linear address of the first byte.
        limit: last valid offset in bytes, already scaled when ``g`` is set.
        selector: what the program sees in CS, DS, …
        type: the four type bits; for code and data 8 = code, 4 = conforming or expand-down,
            2 = readable code or writable data, 1 = accessed; for system segments table 3-2.
        s: 1 for code and data, 0 for system segments (TSS, LDT).
        dpl, present, avl: as in the descriptor.
        l, db: 64-bit code; default size 32 bits.
        g: granularity, 1 when ``limit`` counts pages of 4 KiB.
        unusable: 1 for a register that holds no segment (a null selector was loaded).
    """

    __slots__ = FIELDS
    __hash__ = None  # type: ignore[assignment]  # mutable

    def __init__(
        self, *, base: int = 0, limit: int = 0, selector: int = 0, type: int = 0,
        present: int = 0, dpl: int = 0, db: int = 0, s: int = 0, l: int = 0,  # noqa: E741
        g: int = 0, avl: int = 0, unusable: int = 0,
    ) -> None:  # fmt: skip
        self.base, self.limit, self.selector, self.type = base, limit, selector, type
        self.present, self.dpl, self.db, self.s = present, dpl, db, s
        self.l, self.g, self.avl, self.unusable = l, g, avl, unusable

    @classmethod
    def of(cls, kvm_segment: Any) -> Self:
        """A copy of any object with these fields, such as ``sregs.cs``."""
        return cls(**{name: int(getattr(kvm_segment, name)) for name in FIELDS})

    def apply(self, kvm_segment: Any) -> None:
        """Copy every field into another object, such as ``sregs.cs``."""
        to = kvm_segment  # spelled out, not looped: this is on the way to a guest's first byte
        to.base, to.limit, to.selector, to.type = self.base, self.limit, self.selector, self.type
        to.present, to.dpl, to.db, to.s = self.present, self.dpl, self.db, self.s
        to.l, to.g, to.avl, to.unusable = self.l, self.g, self.avl, self.unusable

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Segment):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in FIELDS)

    @property
    def access(self) -> int:
        """The access rights as a VMCS holds them (Intel SDM Vol. 3C table 24-2)."""
        rights = self.type & 15 | (self.s & 1) << 4 | (self.dpl & 3) << 5 | (self.present & 1) << 7
        rights |= (self.avl & 1) << 12 | (self.l & 1) << 13 | (self.db & 1) << 14
        return rights | (self.g & 1) << 15 | (self.unusable & 1) << 16

    @property
    def kind(self) -> str:
        """What it is, in a word: ``code64``, ``code32``, ``data``, ``tss busy``, ``ldt``."""
        if self.unusable:
            return "null"
        if not self.s:
            return SYSTEM_NAMES.get(self.type & 15, f"system type {self.type & 15}")
        if not self.type & 8:
            return "data" if self.db else "data16"
        return "code64" if self.l else "code32" if self.db else "code16"

    @property
    def rights(self) -> str:
        """The type bits of a code or data segment in letters, ``rxa`` or ``rwa``."""
        if not self.s:
            return ""
        letters = "xrca" if self.type & 8 else "rwea"  # c: conforming, e: expand-down
        bits = (1, self.type >> 1 & 1, self.type >> 2 & 1, self.type & 1)
        return "".join(letter * bit for letter, bit in zip(letters, bits, strict=True))

    def __repr__(self) -> str:
        text = f"{self.selector:#06x} {self.kind:<8}"
        if self.unusable:
            return f"{text} (unusable) base {self.base:#x}"
        extra = "" if self.present else " not-present"
        rights = f" {self.rights}" if self.s else ""
        return f"{text} DPL{self.dpl} base {self.base:#x} limit {self.limit:#x}{rights}{extra}"

    def encode(self, long: bool = False) -> bytes:
        """The descriptor: 8 bytes, or 16 for a system segment (TSS, LDT) of long mode.

        Raises:
            ValueError: the limit needs another granularity, or the base more than 32 bits.
        """
        limit = self.limit
        if self.g:
            if limit & 0xFFF != 0xFFF or limit > 0xFFFFFFFF:
                raise ValueError(
                    f"limit {limit:#x} with g=1 must end in 0xfff and fit into 32 bits"
                )
            limit >>= 12
        elif not 0 <= limit <= 0xFFFFF:
            raise ValueError(f"limit {limit:#x} needs g=1: without it the limit has 20 bits")
        wide = long and not self.s
        if not 0 <= self.base < (1 << 64 if wide else 1 << 32):
            raise ValueError(f"base {self.base:#x} does not fit into this descriptor")
        word = limit & 0xFFFF | (self.base & 0xFFFFFF) << 16
        word |= (self.access & 0xFF) << 40 | (limit >> 16) << 48
        word |= (self.access >> 12 & 0xF) << 52 | (self.base >> 24 & 0xFF) << 56
        raw = word.to_bytes(8, "little")
        return raw + (self.base >> 32).to_bytes(8, "little") if wide else raw

    @classmethod
    def decode(cls, raw: bytes, selector: int = 0) -> Self:
        """The segment that loading this descriptor gives; 16 bytes carry a 64-bit base.

        A descriptor that is not present decodes as ``unusable``.

        Raises:
            ValueError: ``raw`` is neither 8 nor 16 bytes long.
        """
        if len(raw) not in (8, 16):
            raise ValueError(f"a descriptor has 8 or 16 bytes, not {len(raw)}")
        word = int.from_bytes(raw[:8], "little")
        limit = word & 0xFFFF | (word >> 48 & 0xF) << 16
        g = word >> 55 & 1
        base = word >> 16 & 0xFFFFFF | (word >> 56 & 0xFF) << 24
        base |= int.from_bytes(raw[8:12], "little") << 32
        present = word >> 47 & 1
        return cls(
            base=base, limit=limit << 12 | 0xFFF if g else limit, selector=selector,
            type=word >> 40 & 0xF, s=word >> 44 & 1, dpl=word >> 45 & 3, present=present,
            avl=word >> 52 & 1, l=word >> 53 & 1, db=word >> 54 & 1, g=g, unusable=1 - present,
        )  # fmt: skip


def code64(selector: int = 0, dpl: int = 0) -> Segment:
    """64-bit code; base and limit are ignored by the processor, and flat all the same."""
    return Segment(selector=selector, limit=0xFFFFFFFF, type=11, present=1, dpl=dpl, s=1, l=1, g=1)


def code32(selector: int = 0, dpl: int = 0) -> Segment:
    """Flat 32-bit code, 4 GiB from 0."""
    return Segment(selector=selector, limit=0xFFFFFFFF, type=11, present=1, dpl=dpl, s=1, db=1, g=1)


def code16(selector: int = 0, base: int = 0, dpl: int = 0) -> Segment:
    """16-bit code of 64 KiB, the step between real and protected mode."""
    return Segment(selector=selector, base=base, limit=0xFFFF, type=11, present=1, dpl=dpl, s=1)


def data(selector: int = 0, dpl: int = 0) -> Segment:
    """Flat writable data, 4 GiB from 0, for 32-bit and 64-bit code alike."""
    return Segment(selector=selector, limit=0xFFFFFFFF, type=3, present=1, dpl=dpl, s=1, db=1, g=1)


def null(selector: int = 0) -> Segment:
    """No segment: what loading the null selector leaves behind."""
    return Segment(selector=selector, unusable=1)


def tss(base: int, limit: int = 0x67, selector: int = 0, busy: bool = True) -> Segment:
    """A 32-bit or 64-bit task state segment; TR always holds a busy one."""
    kind = TSS_BUSY if busy else TSS_AVAILABLE
    return Segment(selector=selector, base=base, limit=limit, type=kind, present=1)


def ldt(base: int, limit: int, selector: int = 0) -> Segment:
    """A local descriptor table."""
    return Segment(selector=selector, base=base, limit=limit, type=LDT, present=1)


def real_mode(selector: int, code: bool = False) -> Segment:
    """What a segment register holds in real mode: base = selector * 16, 64 KiB."""
    kind = 11 if code else 3
    return Segment(selector=selector, base=selector << 4, limit=0xFFFF, type=kind, present=1, s=1)


def v8086(selector: int) -> Segment:
    """What every segment register holds in virtual-8086 mode (Intel SDM Vol. 3C §26.3.1.2)."""
    return Segment(
        selector=selector, base=selector << 4, limit=0xFFFF, type=3, present=1, dpl=3, s=1
    )


INTERRUPT_GATE, TRAP_GATE, TASK_GATE = 14, 15, 5
GATE_NAMES = {5: "task", 6: "interrupt16", 7: "trap16", 12: "call", 14: "interrupt", 15: "trap"}


class Gate:
    """One entry of an IDT: where a vector leads.

    Attributes:
        offset: address of the handler.
        selector: code segment of the handler.
        type: 14 interrupt gate (clears IF), 15 trap gate (leaves IF), 5 task gate (32-bit only).
        dpl: the least privileged ring that may reach it with ``int n``.
        ist: 1-7 switches to that stack of the 64-bit TSS, 0 does not.
        present: 0 makes the vector raise #NP.
    """

    __slots__ = ("dpl", "ist", "offset", "present", "selector", "type")
    __hash__ = None  # type: ignore[assignment]  # mutable

    def __init__(
        self, offset: int = 0, selector: int = 0, type: int = INTERRUPT_GATE,
        dpl: int = 0, present: int = 1, ist: int = 0,
    ) -> None:  # fmt: skip
        self.offset, self.selector, self.type = offset, selector, type
        self.dpl, self.present, self.ist = dpl, present, ist

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Gate):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in self.__slots__)

    def __repr__(self) -> str:
        kind = GATE_NAMES.get(self.type, f"type {self.type}")
        text = f"{kind} → {self.selector:#x}:{self.offset:#x} DPL{self.dpl}"
        text += f" IST{self.ist}" if self.ist else ""
        return text if self.present else f"{text} not-present"

    def encode(self, long: bool = True) -> bytes:
        """The gate descriptor: 16 bytes in long mode, else 8.

        Raises:
            ValueError: a field does not fit.
        """
        bits = 64 if long else 32
        if not 0 <= self.offset < 1 << bits:
            raise ValueError(f"offset {self.offset:#x} does not fit into a {bits}-bit gate")
        if not (0 <= self.selector <= 0xFFFF and 0 <= self.dpl <= 3 and 0 <= self.type <= 15):
            raise ValueError(f"selector, DPL or type out of range in {self!r}")
        if not 0 <= self.ist <= (7 if long else 0):
            raise ValueError(f"IST {self.ist}: long mode has IST 1 to 7, other modes none")
        word = self.offset & 0xFFFF | self.selector << 16 | self.ist << 32 | self.type << 40
        word |= self.dpl << 45 | (self.present & 1) << 47 | (self.offset >> 16 & 0xFFFF) << 48
        raw = word.to_bytes(8, "little")
        return raw + (self.offset >> 32).to_bytes(8, "little") if long else raw

    @classmethod
    def decode(cls, raw: bytes) -> Self:
        """The gate in 16 bytes (long mode) or 8.

        Raises:
            ValueError: ``raw`` has another length.
        """
        if len(raw) not in (8, 16):
            raise ValueError(f"a gate has 8 or 16 bytes, not {len(raw)}")
        word = int.from_bytes(raw[:8], "little")
        offset = word & 0xFFFF | (word >> 48) << 16 | int.from_bytes(raw[8:12], "little") << 32
        ist = word >> 32 & 7 if len(raw) == 16 else 0
        return cls(
            offset, word >> 16 & 0xFFFF, word >> 40 & 15, word >> 45 & 3, word >> 47 & 1, ist
        )
