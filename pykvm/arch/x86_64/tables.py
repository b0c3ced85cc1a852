"""GDT, IDT and TSS: built field by field, read back from guest memory, printed a line an entry.

>>> gdt = Gdt(base=0x500)
>>> gdt.add(code64())
8
>>> gdt.write(memory)          # and gdt.load(sregs.gdt) for GDTR
"""

from __future__ import annotations

from .segments import INTERRUPT_GATE, TASK_GATE, TRAP_GATE, Gate, Segment

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, ClassVar, Self

GATE_KINDS = {"interrupt": INTERRUPT_GATE, "trap": TRAP_GATE, "task": TASK_GATE}


class _Table:
    """Bytes that live at ``base`` and that a register (GDTR, IDTR) points to."""

    __slots__ = ("_raw", "base", "long")

    def __init__(self, base: int = 0, long: bool = True) -> None:
        self.base, self.long = base, long
        self._raw = bytearray()

    def __bytes__(self) -> bytes:
        return bytes(self._raw)

    @property
    def limit(self) -> int:
        """Size in bytes - 1, as the register holds it."""
        return max(len(self._raw) - 1, 0)

    def write(self, memory: Any) -> None:
        """Put the bytes into guest memory at ``base`` (taken as a guest-physical address)."""
        memory[self.base : self.base + len(self._raw)] = bytes(self._raw)

    def load(self, register: Any) -> None:
        """Set a ``kvm_dtable`` (``sregs.gdt``, ``sregs.idt``) to this table, as LGDT would."""
        register.base, register.limit = self.base, self.limit

    @classmethod
    def decode(cls, raw: bytes, base: int = 0, long: bool = True) -> Self:
        """The table in these bytes; a torn last entry is left out."""
        table = cls(base, long)
        table._raw = bytearray(raw[: len(raw) - len(raw) % cls._entry_size(long)])
        return table

    @staticmethod
    def _entry_size(long: bool) -> int:
        return 8

    @classmethod
    def _read(cls, memory: Any, sregs: Any, register: Any) -> Self:
        from .walk import read_virtual

        base = int(register.base)
        raw = read_virtual(memory, sregs, base, (int(register.limit) & 0xFFFF) + 1)
        return cls.decode(raw, base, long=bool(int(sregs.efer) >> 10 & 1))


class Gdt(_Table):
    """A global descriptor table; entry 0 is the null descriptor.

    Args:
        base: linear address where it lives.
        long: 16-byte system descriptors (TSS, LDT), as long mode has them.
    """

    __slots__ = ()

    def __init__(self, base: int = 0, long: bool = True) -> None:
        super().__init__(base, long)
        self._raw = bytearray(8)

    def copy(self, base: int) -> Self:
        """The same descriptors at another base, to be changed on their own."""
        new = type(self)(base, self.long)
        new._raw[:] = self._raw
        return new

    def add(self, segment: Segment) -> int:
        """Append a descriptor; sets ``segment.selector`` (RPL = DPL) and returns the selector."""
        return self.place(len(self._raw), segment)

    def place(self, selector: int, segment: Segment) -> int:
        """Put a descriptor at a chosen selector, growing the table with null descriptors.

        Returns the selector with the RPL that fits the segment: its DPL for code and data, 0 for
        system segments. ``segment.selector`` is set to it.

        Raises:
            ValueError: the selector is null, names an LDT, or the entry is taken.
        """
        index = selector & ~7
        if not index or selector & 4 or index > 0xFFF8:
            raise ValueError(f"selector {selector:#x} cannot name a GDT entry")
        raw = segment.encode(self.long)
        end = index + len(raw)
        if any(self._raw[index:end]):
            raise ValueError(f"selector {index:#x} is taken: {self[index]!r}")
        self._raw.extend(bytes(max(0, end - len(self._raw))))
        self._raw[index:end] = raw
        segment.selector = index | (segment.dpl if segment.s else 0)
        return segment.selector

    def __getitem__(self, selector: int) -> Segment:
        """The segment that loading ``selector`` gives.

        Raises:
            IndexError: the selector lies beyond the limit.
        """
        index = selector & 0xFFF8
        if index + 8 > len(self._raw):
            raise IndexError(f"selector {selector:#x} is beyond the limit {self.limit:#x}")
        wide = self.long and self._is_system(index) and index + 16 <= len(self._raw)
        return Segment.decode(bytes(self._raw[index : index + (16 if wide else 8)]), selector)

    def _is_system(self, index: int) -> bool:
        rights = self._raw[index + 5]
        return rights & 0x90 == 0x80 and rights & 0xF in (2, 9, 11)

    def __iter__(self) -> Iterator[tuple[int, Segment]]:
        """(selector, segment) of every entry that is not null."""
        index = 8
        while index + 8 <= len(self._raw):
            if any(self._raw[index : index + 8]):
                yield index, self[index]
            index += 16 if self.long and self._is_system(index) else 8

    def __repr__(self) -> str:
        lines = [f"GDT at {self.base:#x}, limit {self.limit:#x}"]
        lines += [f"  {segment!r}" for _, segment in self]
        return "\n".join(lines)

    @classmethod
    def read(cls, memory: Any, sregs: Any) -> Self:
        """The GDT that GDTR points to, as far as it can be read."""
        return cls._read(memory, sregs, sregs.gdt)


class Idt(_Table):
    """An interrupt descriptor table.

    Args:
        base: linear address where it lives.
        long: 16-byte gates, as long mode has them; else 8-byte gates.
        vectors: how many entries the table has; a vector beyond is a #GP.
    """

    __slots__ = ()

    def __init__(self, base: int = 0, long: bool = True, vectors: int = 256) -> None:
        super().__init__(base, long)
        self._raw = bytearray(vectors * self._entry_size(long))

    @staticmethod
    def _entry_size(long: bool) -> int:
        return 16 if long else 8

    def set(
        self, vector: int, offset: int, selector: int = 0x10, kind: str = "interrupt",
        dpl: int = 0, ist: int = 0,
    ) -> None:  # fmt: skip
        """Let ``vector`` enter ``selector:offset``.

        Args:
            kind: ``"interrupt"`` clears IF on entry, ``"trap"`` leaves it, ``"task"`` switches
                tasks (32-bit only).
            dpl: least privileged ring that may use ``int vector``.
            ist: stack of the 64-bit TSS to switch to, 1 to 7; 0 for none.

        Raises:
            ValueError: no such vector or kind, or a field does not fit.
        """
        size = self._entry_size(self.long)
        if not 0 <= vector < len(self._raw) // size:
            raise ValueError(f"vector {vector}: this IDT has {len(self._raw) // size} entries")
        if kind not in GATE_KINDS:
            raise ValueError(f"gate kind {kind!r} is none of {', '.join(GATE_KINDS)}")
        raw = Gate(offset, selector, GATE_KINDS[kind], dpl, 1, ist).encode(self.long)
        self._raw[vector * size : (vector + 1) * size] = raw

    def __getitem__(self, vector: int) -> Gate | None:
        """The gate of ``vector``, or None if the entry is all zero or beyond the limit."""
        size = self._entry_size(self.long)
        raw = bytes(self._raw[vector * size : (vector + 1) * size]) if vector >= 0 else b""
        return Gate.decode(raw) if len(raw) == size and any(raw) else None

    def __iter__(self) -> Iterator[tuple[int, Gate]]:
        """(vector, gate) of every entry that is not zero."""
        for vector in range(len(self._raw) // self._entry_size(self.long)):
            gate = self[vector]
            if gate is not None:
                yield vector, gate

    def __repr__(self) -> str:
        lines = [f"IDT at {self.base:#x}, limit {self.limit:#x}"]
        lines += [f"  {vector:3} {exception_name(vector):<4} {gate!r}" for vector, gate in self]
        return "\n".join(lines)

    @classmethod
    def read(cls, memory: Any, sregs: Any) -> Self:
        """The IDT that IDTR points to, as far as it can be read. Not for real mode's IVT."""
        return cls._read(memory, sregs, sregs.idt)


EXCEPTIONS = (
    "#DE", "#DB", "NMI", "#BP", "#OF", "#BR", "#UD", "#NM", "#DF", "", "#TS", "#NP", "#SS", "#GP",
    "#PF", "", "#MF", "#AC", "#MC", "#XM", "#VE", "#CP",
)  # fmt: skip


def exception_name(vector: int) -> str:
    """``"#PF"`` for 14; "" for a vector without a name (Intel SDM Vol. 3A table 6-1)."""
    return EXCEPTIONS[vector] if 0 <= vector < len(EXCEPTIONS) else ""


class _Tss:
    """A task state segment: named fields at fixed offsets."""

    __slots__ = ("_raw",)
    _raw: bytearray
    SIZE = 104
    FIELDS: ClassVar[dict[str, tuple[int, int]]]  # name → (offset, size in bytes)

    def __init__(self, **fields: int) -> None:
        object.__setattr__(self, "_raw", bytearray(self.SIZE))
        # Beyond the limit means: no I/O permission bitmap, so ring 3 needs IOPL for every port.
        self.iomap_base = self.SIZE
        for name, value in fields.items():
            setattr(self, name, value)

    def __getattr__(self, name: str) -> int:
        try:
            offset, size = self.FIELDS[name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has no field {name}") from None
        return int.from_bytes(self._raw[offset : offset + size], "little")

    def __setattr__(self, name: str, value: int) -> None:
        if name not in self.FIELDS:
            raise AttributeError(f"{type(self).__name__} has no field {name}")
        offset, size = self.FIELDS[name]
        if not 0 <= value < 1 << 8 * size:
            raise ValueError(f"{name} holds {8 * size} bits, {value:#x} does not fit")
        self._raw[offset : offset + size] = value.to_bytes(size, "little")

    def __bytes__(self) -> bytes:
        return bytes(self._raw)

    @property
    def limit(self) -> int:
        """Size in bytes - 1, as the TSS descriptor holds it."""
        return self.SIZE - 1

    @classmethod
    def decode(cls, raw: bytes) -> Self:
        """The TSS in these bytes; what is missing counts as zero."""
        new = cls()
        new._raw[:] = bytes(raw[: cls.SIZE]).ljust(cls.SIZE, b"\0")
        return new

    def __repr__(self) -> str:
        fields = ((name, getattr(self, name)) for name in self.FIELDS)
        text = " ".join(f"{name}={value:#x}" for name, value in fields if value)
        return f"<{type(self).__name__} {text}>"


class Tss64(_Tss):
    """The 64-bit TSS: stacks for a switch to a lower ring (rsp0-2) and for gates (ist1-7).

    Intel SDM Vol. 3A §7.7.
    """

    __slots__ = ()
    FIELDS = (
        {f"rsp{n}": (4 + 8 * n, 8) for n in range(3)}
        | {f"ist{n}": (28 + 8 * n, 8) for n in range(1, 8)}
        | {"iomap_base": (102, 2)}
    )


_TSS32_REGISTERS = (
    "cr3", "eip", "eflags", "eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi",
)  # fmt: skip
_TSS32_SELECTORS = ("es", "cs", "ss", "ds", "fs", "gs", "ldt")


class Tss32(_Tss):
    """The 32-bit TSS: stacks for rings 0-2, and a whole task for task gates.

    Intel SDM Vol. 3A §7.2.1.
    """

    __slots__ = ()
    FIELDS = (
        {"link": (0, 2)}
        | {f"esp{n}": (4 + 8 * n, 4) for n in range(3)}
        | {f"ss{n}": (8 + 8 * n, 2) for n in range(3)}
        | {name: (28 + 4 * n, 4) for n, name in enumerate(_TSS32_REGISTERS)}
        | {name: (72 + 4 * n, 2) for n, name in enumerate(_TSS32_SELECTORS)}
        | {"trap": (100, 2), "iomap_base": (102, 2)}
    )
