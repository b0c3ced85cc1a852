"""Putting a processor into a mode: registers, descriptor tables and page tables, ready to run.

>>> entry = enter("long64", sregs=sregs, regs=regs, memory=memory, entry=0x8000)
>>> entry
long64, ring 0, entry 0x8000, stack 0x8000
GDT at 0x500, limit 0x4f
  ...

The registers are changed in place and the tables written to memory; telling KVM is the caller's
part. What lies where is drawn in ``layout``.
"""

from __future__ import annotations

from . import layout
from .segments import Segment, code32, code64, data, null, real_mode, tss

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .paging import PageTables
    from .tables import Gdt, Idt, Tss32, Tss64

MODES = ("real16", "prot32", "long64")

# CR0 without paging: PE|MP|ET|NE. MP and NE are what x87 and SSE code of today expects.
_CR0_PROTECTED = 0x33
_CR0_PAGING = 0x80010000  # PG|WP: ring 0 respects read-only pages, so that mistakes show
_CR0_REAL = 0x10  # ET, which is always 1
_CR4_SSE = 0x600  # OSFXSR|OSXMMEXCPT: SSE instructions work, as compilers take for granted
_CR4_PAE = 0x20
_EFER_LONG = 0x500  # LME|LMA
_EFER_NXE = 0x800


class Entry:
    """What ``enter()`` did.

    Attributes:
        mode, ring, entry, stack: as asked for, the stack with its default filled in.
        gdt: the ``Gdt`` written to memory, or None in real mode.
        tss: the ``Tss64`` or ``Tss32`` written, or None in real mode.
        idt: the ``Idt`` written, or None: then the limit of IDTR is 0 and every exception and
            interrupt ends in a triple fault (in real mode: the IVT at 0).
        page_tables: the ``PageTables``, or None where paging is off.
        star: the value for MSR_STAR under which SYSCALL and SYSRET use this GDT.
    """

    __slots__ = (
        "_gdt", "_made", "_memory", "_pages", "_rflags", "_rip", "_tss", "_writes", "entry", "idt",
        "mode", "ring", "stack",
    )  # fmt: skip
    star = layout.STAR

    def __init__(self, mode: str, ring: int, entry: int, stack: int, memory: Any) -> None:
        self.mode, self.ring, self.entry, self.stack = mode, ring, entry, stack
        self._memory = memory
        self._made: _Descriptors | None = None
        self._pages: PageTables | None = None
        self._gdt: Gdt | None = None
        self._tss: Tss64 | Tss32 | None = None
        self._writes: list[tuple[int, bytes]] = []
        self._rip, self._rflags = entry, 2
        self.idt: Idt | None = None

    def again(self, regs: Any, memory: Any) -> Entry:
        """The same for another guest: its memory, RIP, RSP and RFLAGS. SREGS are the caller's part.

        Raises:
            GuestMemoryError: the tables do not fit into RAM. No register was changed then.
        """
        for gpa, raw in self._writes:
            memory[gpa : gpa + len(raw)] = raw
        regs.rip, regs.rsp, regs.rflags = self._rip, self.stack, self._rflags
        return self.of(memory)

    def of(self, memory: Any) -> Entry:
        """This, said of another guest's memory; of None, to be kept without holding any."""
        other = Entry(self.mode, self.ring, self.entry, self.stack, memory)
        other._made, other._pages = self._made, self._pages
        other._writes, other._rip, other._rflags = self._writes, self._rip, self._rflags
        if memory is None and self._pages is not None:
            other._pages = self._pages.at_home_in(None)
        return other

    @property
    def page_tables(self) -> PageTables | None:
        """What CR3 points to."""
        pages = self._pages
        if pages is not None and pages.memory is not self._memory:
            pages = self._pages = pages.at_home_in(self._memory)
        return pages

    @property
    def gdt(self) -> Gdt | None:
        """What was written for GDTR to point to."""
        made = self._made
        if self._gdt is None and made is not None:
            from .tables import Gdt

            self._gdt = Gdt.decode(made.gdt, made.gdt_base, made.long)
        return self._gdt

    @property
    def tss(self) -> Tss64 | Tss32 | None:
        """What was written for TR to point to."""
        made = self._made
        if self._tss is None and made is not None:
            from .tables import Tss32, Tss64

            self._tss = (Tss64 if made.long else Tss32).decode(made.tss)
        return self._tss

    def __repr__(self) -> str:
        text = f"{self.mode}, ring {self.ring}, entry {self.entry:#x}, stack {self.stack:#x}"
        parts = (self.gdt, self.tss, self.idt, self.page_tables)
        return "\n".join([text, *(repr(part) for part in parts if part is not None)])


def enter(
    mode: str, *, sregs: Any, regs: Any, memory: Any, entry: int, stack: int | None = None,
    ring: int = 0, iopl: int = 0, map_size: int = layout.MAP_SIZE, gigapages: bool = False,
    tables: int = 0, perms: str | None = None, idt: Idt | None = None,
) -> Entry:  # fmt: skip
    """Set the registers and write the tables so that the next instruction is at ``entry``.

    Args:
        mode: ``real16``; ``prot32``, flat and without paging; ``long64``, flat and identity-mapped.
        sregs, regs: changed in place. Of ``regs`` RIP, RSP and RFLAGS are set, all of the segments
            and descriptor tables of ``sregs``, CR0, CR3, CR4 and EFER; the rest is left alone.
        memory: guest-physical memory; real16 does not touch it.
        entry: guest-physical address of the first instruction.
        stack: first stack pointer; by default 0x8000 above ``tables``.
        ring: 0, or 3 in prot32 and long64.
        iopl: 0 to 3; with 3, ring 3 may use I/O ports, CLI and STI. A KVM that runs ring 3 without
            hardware support loses RFLAGS.IOPL, so in long64 the TSS also permits the ports below
            ``layout.IO_PORTS``.
        map_size: bytes mapped from address 0 in long64, a multiple of 2 MiB.
        gigapages: use 1 GiB pages; only where CPUID offers ``pdpe1gb``.
        tables: where the block with GDT, TSS, stacks and page tables starts, 4 KiB aligned.
        perms: rights of the identity map; by default ``rwx``, and ``rwxu`` for ring 3.
        idt: written to memory at ``idt.base`` and loaded.

    Raises:
        ValueError: an unknown mode or ring, or an address that does not fit the mode or lies
            inside the tables. No register was changed then.
        GuestMemoryError: the tables do not fit into RAM.
    """
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is none of {', '.join(MODES)}")
    if ring not in (0, 3) or (mode == "real16" and ring):
        raise ValueError(f"ring {ring}: real16 has only ring 0, prot32 and long64 have 0 and 3")
    if not 0 <= iopl <= 3:
        raise ValueError(f"iopl {iopl} is none of 0 to 3")
    if tables & 0xFFF or tables < 0:
        raise ValueError(f"tables {tables:#x}: must be a multiple of 4 KiB")
    if stack is None:
        stack = layout.STACK_TOP + (tables if mode != "real16" else 0)
    done = Entry(mode, ring, entry, stack, memory)
    done._rflags = 2 | iopl << 12
    if mode == "real16":
        _real16(done, sregs, idt)
    else:
        _check_addresses(done, tables)
        if mode == "prot32":
            _prot32(done, sregs, memory, tables)
        else:
            rights = perms or ("rwxu" if ring else "rwx")
            _long64(done, sregs, memory, tables, iopl, map_size, gigapages, rights)
        _load_idt(done, sregs, memory, idt)
    regs.rip, regs.rsp, regs.rflags = done._rip, stack, done._rflags
    return done


def _real16(done: Entry, sregs: Any, idt: Idt | None) -> None:
    if idt is not None:
        raise ValueError("real16 has no IDT: its vectors are four bytes each at gpa 0 (the IVT)")
    if not 0 <= done.entry < 0x110000 - 16:
        raise ValueError(f"entry {done.entry:#x}: real mode reaches the first MiB only")
    if not 0 <= done.stack <= 0xFFFF:
        raise ValueError(f"stack {done.stack:#x}: SP has 16 bits in real mode, and SS is 0")
    # Below 64 KiB CS is 0, so that the offsets in the code are the addresses it is loaded at.
    selector = min(done.entry >> 4, 0xFFFF) if done.entry > 0xFFFF else 0
    done._rip = done.entry - (selector << 4)
    real_mode(selector, code=True).apply(sregs.cs)
    segment = real_mode(0)
    for register in (sregs.ss, sregs.ds, sregs.es, sregs.fs, sregs.gs):
        segment.apply(register)
    Segment(limit=0xFFFF, type=11, present=1).apply(sregs.tr)
    Segment(limit=0xFFFF, type=2, present=1).apply(sregs.ldt)
    sregs.gdt.base, sregs.gdt.limit = 0, 0xFFFF
    sregs.idt.base, sregs.idt.limit = 0, 0x3FF
    sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = _CR0_REAL, 0, 0, 0


def _check_addresses(done: Entry, tables: int) -> None:
    bits = 32 if done.mode == "prot32" else 52
    for name, value in (("entry", done.entry), ("stack", done.stack)):
        if not 0 <= value < 1 << bits:
            raise ValueError(f"{name} {value:#x} does not fit into {bits} bits")
    first = tables + layout.GDT
    end = tables + (layout.PAGE_TABLES_END if done.mode == "long64" else layout.RSP0_TOP)
    if first <= done.entry < end:
        raise ValueError(
            f"entry {done.entry:#x} lies in {first:#x}-{end - 1:#x}, where {done.mode} keeps its "
            f"GDT, TSS and page tables: load the code elsewhere, or pass tables=gpa to move them"
        )


class _Descriptors:
    """GDT and TSS, and the segments that are loaded out of them.

    Args:
        tables: where the block with both starts.
        ring: whose segments are loaded.
        iopl: 3 for a TSS whose bitmap permits ports.
        long: for long mode.
    """

    __slots__ = ("code", "gdt", "gdt_base", "long", "stack", "task", "tss", "tss_base")

    def __init__(self, tables: int, ring: int, iopl: int, long: bool) -> None:
        from .tables import Gdt, Tss32, Tss64

        self.long = long
        self.gdt_base, self.tss_base = tables + layout.GDT, tables + layout.TSS
        if long:
            tss_itself = bytes(Tss64(rsp0=tables + layout.RSP0_TOP, ist1=tables + layout.IST1_TOP))
        else:
            tss_itself = bytes(Tss32(esp0=tables + layout.RSP0_TOP, ss0=layout.KERNEL_DS))
        if long and ring and iopl == 3:
            # Bit n forbids port n; a byte of ones ends the map (SDM Vol. 1 §19.5.2).
            tss_itself += bytes(layout.IO_PORTS // 8) + b"\xff"
        gdt = Gdt(self.gdt_base, long)
        for selector, segment in (
            (layout.KERNEL_CS32, code32()),
            (layout.KERNEL_CS, code64()),
            (layout.KERNEL_DS, data()),
            (layout.USER_CS32, code32(dpl=3)),
            (layout.USER_DS, data(dpl=3)),
            (layout.USER_CS, code64(dpl=3)),
            (layout.TSS_SELECTOR, tss(self.tss_base, limit=len(tss_itself) - 1)),
        ):
            gdt.place(selector, segment)
        code, stack = (
            (layout.USER_CS if long else layout.USER_CS32, layout.USER_DS)
            if ring
            else (layout.KERNEL_CS if long else layout.KERNEL_CS32, layout.KERNEL_DS)
        )
        self.code, self.stack = gdt[code | ring], gdt[stack | ring]
        self.task = gdt[layout.TSS_SELECTOR]
        self.gdt, self.tss = bytes(gdt), tss_itself

    def load(self, sregs: Any) -> None:
        """Load every segment register."""
        self.code.apply(sregs.cs)
        stack = self.stack
        for register in (sregs.ss, sregs.ds, sregs.es, sregs.fs, sregs.gs):
            stack.apply(register)
        self.task.apply(sregs.tr)
        null().apply(sregs.ldt)
        sregs.gdt.base, sregs.gdt.limit = self.gdt_base, len(self.gdt) - 1


def _segments(done: Entry, sregs: Any, memory: Any, tables: int, iopl: int, long: bool) -> None:
    """Write GDT and TSS, and load every segment register for the ring."""
    done._made = made = _Descriptors(tables, done.ring, iopl, long)
    for gpa, raw in ((made.gdt_base, made.gdt), (made.tss_base, made.tss)):
        memory[gpa : gpa + len(raw)] = raw
        done._writes.append((gpa, raw))
    made.load(sregs)


def _prot32(done: Entry, sregs: Any, memory: Any, tables: int) -> None:
    if tables >= 1 << 32:
        raise ValueError(f"tables {tables:#x} does not fit into 32 bits")
    _segments(done, sregs, memory, tables, 0, long=False)
    sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = _CR0_PROTECTED, 0, _CR4_SSE, 0


def _long64(
    done: Entry, sregs: Any, memory: Any, tables: int, iopl: int, map_size: int, gigapages: bool,
    perms: str,
) -> None:  # fmt: skip
    if map_size <= 0 or map_size % (1 << 21):
        raise ValueError(f"map_size {map_size:#x} must be a multiple of 2 MiB")
    if not gigapages and map_size > layout.MAP_SIZE:
        raise ValueError(
            f"map_size {map_size:#x}: without 1 GiB pages the tables have room for 4 GiB; build "
            "your own with PageTables and set cr3"
        )
    from .paging import PageTables

    pages = PageTables(memory, tables + layout.PAGE_TABLES, tables + layout.PAGE_TABLES_END)
    if not gigapages:
        pages.page_sizes = pages.page_sizes[:2]
    pages.identity(map_size, perms=perms)
    done._pages = pages
    first, end = pages.used
    done._writes.append((first, memory[first:end]))
    _segments(done, sregs, memory, tables, iopl, long=True)
    sregs.cr0 = _CR0_PROTECTED | _CR0_PAGING
    sregs.cr3, sregs.cr4 = pages.cr3, _CR4_PAE | _CR4_SSE
    sregs.efer = _EFER_LONG | (_EFER_NXE if pages.needs_nx else 0)


def _load_idt(done: Entry, sregs: Any, memory: Any, idt: Idt | None) -> None:
    if idt is None:
        sregs.idt.base, sregs.idt.limit = 0, 0
        return
    idt.write(memory)
    idt.load(sregs.idt)
    done.idt = idt
