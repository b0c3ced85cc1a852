"""Translating a guest-virtual address as the processor does, and showing every step.

>>> print(walk_sregs(memory, sregs, 0x8000, "x"))
0x8000 → gpa 0x8000 (4-level, 1G page, rwx-)
  PML4[0] @ gpa 0x1000 = 0x2003 P W → PDPT @ gpa 0x2000
  PDPT[0] @ gpa 0x2000 = 0x83 P W PS → 1G page at gpa 0x0

Intel SDM Vol. 3A chapter 4; the bits of a page-fault error code: §4.7. Protection keys, shadow
stacks and nested translation are not modelled. Nothing in guest memory makes a walk raise.
"""

from __future__ import annotations

from ...errors import ClosedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

PF, GP = 14, 13

# Bits of an entry, the same at every level.
P, W, U, PWT, PCD, A, D, PS, G = (1 << bit for bit in range(9))
NX = 1 << 63
FLAG_NAMES = {0: "P", 1: "W", 2: "U", 3: "PWT", 4: "PCD", 5: "A", 6: "D", 8: "G", 63: "NX"}

# Paging mode → (entry size, [(name, lowest address bit, index bits)], from the root down).
# PAE's first level has two index bits only.
_LONG = (("PML5", 48, 9), ("PML4", 39, 9), ("PDPT", 30, 9), ("PD", 21, 9), ("PT", 12, 9))
SHAPES = {
    "32-bit": (4, (("PD", 22, 10), ("PT", 12, 10))),
    "pae": (8, (("PDPT", 30, 2), ("PD", 21, 9), ("PT", 12, 9))),
    "4-level": (8, _LONG[1:]),
    "5-level": (8, _LONG),
}


def size_name(size: int) -> str:
    """``4K``, ``2M``, ``1G``: a page size as people say it."""
    for shift, unit in ((30, "G"), (20, "M"), (10, "K")):
        if size and not size % (1 << shift):
            return f"{size >> shift}{unit}"
    return f"{size:#x}"


def peek(memory: Any, gpa: int, length: int) -> bytes | None:
    """``memory[gpa:gpa + length]``, or None where that is not (wholly) RAM."""
    if gpa < 0 or gpa + length > 1 << 63:
        return None
    try:
        raw = bytes(memory[gpa : gpa + length])
    except ClosedError:
        raise
    except (ValueError, LookupError):
        return None
    return raw if len(raw) == length else None


class Level:
    """One step of a walk.

    Attributes:
        name: ``PML5``, ``PML4``, ``PDPT``, ``PD`` or ``PT``.
        index: which entry of that table.
        gpa: where the entry lies.
        entry: its value, or None where that is not RAM.
        leads_to: the step in words.
    """

    __slots__ = ("entry", "gpa", "index", "leads_to", "name")

    def __init__(self, name: str, index: int, gpa: int, entry: int | None) -> None:
        self.name, self.index, self.gpa, self.entry = name, index, gpa, entry
        self.leads_to = ""

    @property
    def flags(self) -> str:
        """The flags set in the entry: ``P W U``; PS where the level knows it."""
        if self.entry is None:
            return ""
        names = dict(FLAG_NAMES)
        if self.name != "PT":
            names[7] = "PS"
        return " ".join(name for bit, name in sorted(names.items()) if self.entry >> bit & 1)

    def __repr__(self) -> str:
        value = "not RAM" if self.entry is None else f"{self.entry:#x} {self.flags}".rstrip()
        text = f"{self.name}[{self.index}] @ gpa {self.gpa:#x} = {value}"
        return f"{text} → {self.leads_to}" if self.leads_to else text


class Fault:
    """Why an access is refused.

    Attributes:
        vector: 14 (#PF) or 13 (#GP, for a non-canonical address).
        error_code: what the processor would push: P 1, W 2, U 4, RSVD 8, I/D 16.
        reason: in words, with the entry at fault.
        level: name of the table that refused, "" if the walk did not start.
    """

    __slots__ = ("error_code", "level", "reason", "vector")

    def __init__(self, vector: int, error_code: int, reason: str, level: str = "") -> None:
        self.vector, self.error_code, self.reason, self.level = vector, error_code, reason, level

    @property
    def error_names(self) -> str:
        """The bits of the error code in words: ``present write user``."""
        if self.vector != PF:
            return ""
        names = ("present", "write", "user", "reserved-bit", "fetch")
        first = [] if self.error_code & 1 else ["not-present"]
        return " ".join(
            first + [name for bit, name in enumerate(names) if self.error_code >> bit & 1]
        )

    def __repr__(self) -> str:
        if self.vector == PF:
            return f"#PF error code {self.error_code:#x} ({self.error_names}): {self.reason}"
        return f"#GP: {self.reason}"


class Walk:
    """A finished translation; true if the access is allowed.

    Attributes:
        gva: the address asked for.
        gpa: where it leads, or None if it faults before that is known. A walk that ends at a page
            which forbids the access has both a gpa and a fault.
        mode: ``none`` (paging off), ``32-bit``, ``pae``, ``4-level`` or ``5-level``.
        access: ``r``, ``w`` or ``x``; user: whether ring 3 asks.
        levels: every entry read, from the root down.
        page_size: of the page found, in bytes; 0 without one.
        perms: ``rwxu`` with dashes: what the tables as a whole allow.
        fault: None, or the ``Fault``.
    """

    __slots__ = ("access", "fault", "gpa", "gva", "levels", "mode", "page_size", "perms", "user")

    def __init__(self, gva: int, mode: str, access: str, user: bool) -> None:
        self.gva, self.mode, self.access, self.user = gva, mode, access, user
        self.gpa: int | None = None
        self.levels: list[Level] = []
        self.page_size = 0
        self.perms = "----"
        self.fault: Fault | None = None

    def __bool__(self) -> bool:
        return self.fault is None

    def __repr__(self) -> str:
        where = "no mapping" if self.gpa is None else f"gpa {self.gpa:#x}"
        if self.mode == "none":
            detail = "paging off"
        elif self.page_size:
            detail = f"{self.mode}, {size_name(self.page_size)} page, {self.perms}"
        else:
            detail = self.mode
        lines = [f"{self.gva:#x} → {where} ({detail})"]
        lines += [f"  {level!r}" for level in self.levels]
        if self.fault:
            lines.append(f"  {self.fault!r}")
        return "\n".join(lines)


def paging_mode(cr0: int, cr4: int, efer: int) -> str:
    """``none``, ``32-bit``, ``pae``, ``4-level`` or ``5-level`` (Intel SDM Vol. 3A §4.1.1)."""
    if not cr0 >> 31 & 1:
        return "none"
    if not cr4 >> 5 & 1:
        return "32-bit"
    if not efer >> 10 & 1:
        return "pae"
    return "5-level" if cr4 >> 12 & 1 else "4-level"


def canonical(address: int, bits: int = 48) -> bool:
    """Whether bits 63 down to ``bits - 1`` of a 64-bit address are all the same."""
    top = address >> (bits - 1)
    return top in (0, (1 << (65 - bits)) - 1)


def _reserved(mode: str, name: str, leaf: bool, nxe: bool, phys_bits: int, gigapages: bool) -> int:
    """The bits that must be 0 in this entry (Intel SDM Vol. 3A tables 4-4 to 4-20)."""
    if mode == "32-bit":
        # PSE-36: a 4 MiB page has address bits 39:32 in bits 20:13, as far as the CPU has them.
        return (1 << 22) - (1 << min(phys_bits, 40) - 19) if leaf and name == "PD" else 0
    reserved = (1 << 52) - (1 << phys_bits) if phys_bits < 52 else 0
    if mode == "pae":
        if name == "PDPT":
            return reserved | 0x7FF << 52 | NX | 0x1E6
        reserved |= 0x7FF << 52
    elif name in ("PML5", "PML4") or (name == "PDPT" and not gigapages):
        reserved |= PS
    if not nxe:
        reserved |= NX
    if leaf and name == "PDPT":
        reserved |= 0x3FFFE000
    if leaf and name == "PD":
        reserved |= 0x1FE000
    return reserved


def _large(mode: str, name: str, entry: int, cr4: int) -> bool:
    """Whether an entry above the PT maps a page itself; 32-bit paging wants CR4.PSE for that."""
    if name == "PD":
        return bool(entry & PS and (mode != "32-bit" or cr4 >> 4 & 1))
    return bool(entry & PS) and name == "PDPT" and mode != "pae"


def walk(
    memory: Any, gva: int, *, cr0: int, cr3: int, cr4: int, efer: int, access: str = "r",
    user: bool = False, ac: bool = False, phys_bits: int = 52, gigapages: bool = True,
) -> Walk:  # fmt: skip
    """Translate ``gva`` under these control registers.

    Args:
        memory: guest-physical memory, read by slices.
        access: ``"r"``, ``"w"`` or ``"x"`` (instruction fetch).
        user: whether the access is made by ring 3.
        ac: RFLAGS.AC, which suspends SMAP.
        phys_bits: width of guest-physical addresses (CPUID 0x80000008); bits above are reserved.
        gigapages: whether CPUID offers 1 GiB pages (``pdpe1gb``); without, they are reserved.

    Raises:
        ValueError: ``access`` is none of the three.
    """
    if access not in ("r", "w", "x"):
        raise ValueError(f"access {access!r} is none of 'r', 'w', 'x'")
    mode = paging_mode(cr0, cr4, efer)
    result = Walk(gva, mode, access, user)
    if mode == "none":
        # Linear addresses are 32 bits wide without paging, which excludes long mode.
        result.gpa, result.perms = gva & 0xFFFFFFFF, "rwxu"
        return result
    if mode in ("32-bit", "pae"):
        gva &= 0xFFFFFFFF
    bits = {"5-level": 57, "4-level": 48}.get(mode)
    if bits and not (gva < 1 << 64 and gva >= 0 and canonical(gva, bits)):
        result.fault = Fault(GP, 0, f"{gva:#x} is not canonical: bits 63:{bits - 1} differ")
        return result
    nxe = bool(efer >> 11 & 1) and mode != "32-bit"
    _descend(result, memory, gva, cr3, cr4, nxe, phys_bits, gigapages)
    if result.fault is None:
        _permit(result, cr0, cr4, nxe, ac)
    else:
        result.fault.error_code |= _access_bits(result, nxe, cr4)
    return result


def _access_bits(result: Walk, nxe: bool, cr4: int) -> int:
    """The W, U and I/D bits of an error code; fetches are told apart only under NXE or SMEP."""
    fetch = result.access == "x" and (nxe or cr4 >> 20 & 1)
    return (result.access == "w") << 1 | result.user << 2 | bool(fetch) << 4


def _descend(
    result: Walk, memory: Any, gva: int, cr3: int, cr4: int, nxe: bool, phys_bits: int,
    gigapages: bool,
) -> None:  # fmt: skip
    """Follow the tables; fill in levels, page, permissions, or the fault that stops the walk."""
    mode = result.mode
    entry_size, shape = SHAPES[mode]
    if mode == "32-bit":
        table = cr3 & 0xFFFFF000
    elif mode == "pae":
        table = cr3 & 0xFFFFFFE0
    else:
        table = cr3 & 0xFFFFFFFFFF000 & ((1 << phys_bits) - 1)
    write = user = True
    execute = True
    for depth, (name, shift, bits) in enumerate(shape):
        index = gva >> shift & (1 << bits) - 1
        gpa = table + index * entry_size
        raw = peek(memory, gpa, entry_size)
        level = Level(name, index, gpa, None if raw is None else int.from_bytes(raw, "little"))
        result.levels.append(level)
        entry = level.entry
        if entry is None:
            reason = f"the {name} at gpa {table:#x} lies outside RAM"
            result.fault = Fault(PF, 0, reason, name)
            return
        if not entry & P:
            result.fault = Fault(PF, 0, f"{name}[{index}] is not present", name)
            return
        leaf = name == "PT" or _large(mode, name, entry, cr4)
        reserved = entry & _reserved(mode, name, leaf, nxe, phys_bits, gigapages)
        if reserved:
            reason = f"{name}[{index}] has reserved bits set: {reserved:#x}"
            if reserved == NX:
                reason += " (NX, but EFER.NXE is 0)"
            elif name == "PDPT" and reserved == PS:
                reason += " (a 1 GiB page, which CPUID does not offer)"
            result.fault = Fault(PF, 9, reason, name)
            return
        if not (mode == "pae" and name == "PDPT"):  # those four have no rights
            write, user = write and bool(entry & W), user and bool(entry & U)
            execute = execute and not (entry & NX and nxe)
        if leaf:
            size = 1 << shift
            page = entry & 0xFFFFFFFFFF000 & ~(size - 1)
            if mode == "32-bit":
                page = entry & 0xFFFFFFFF & ~(size - 1)
                if name == "PD":
                    page |= (entry >> 13 & 0xFF) << 32
            result.gpa, result.page_size = page | gva & size - 1, size
            level.leads_to = f"{size_name(size)} page at gpa {page:#x}"
            break
        table = entry & (0xFFFFF000 if mode == "32-bit" else 0xFFFFFFFFFF000)
        level.leads_to = f"{shape[depth + 1][0]} @ gpa {table:#x}"
    result.perms = f"r{'w' if write else '-'}{'x' if execute else '-'}{'u' if user else '-'}"


def _permit(result: Walk, cr0: int, cr4: int, nxe: bool, ac: bool) -> None:
    """Apply the access rights (Intel SDM Vol. 3A §4.6) to a walk that reached a page."""
    _, write, execute, user = (letter != "-" for letter in result.perms)
    reason = ""
    if result.user and not user:
        reason = "ring 3 may not touch a supervisor page (U is 0 at some level)"
    elif result.access == "x" and not execute:
        reason = "the page is not executable (NX is 1 at some level)"
    elif result.access == "w" and not write and (result.user or cr0 >> 16 & 1):
        reason = "the page is read-only (W is 0 at some level)"
    elif not result.user and user and result.access == "x" and cr4 >> 20 & 1:
        reason = "SMEP: ring 0 may not execute a user page"
    elif not result.user and user and result.access != "x" and cr4 >> 21 & 1 and not ac:
        reason = "SMAP: ring 0 may not touch a user page while RFLAGS.AC is 0"
    if reason:
        level = result.levels[-1].name
        result.fault = Fault(PF, 1 | _access_bits(result, nxe, cr4), reason, level)


def walk_sregs(
    memory: Any, sregs: Any, gva: int, access: str = "r", *, user: bool | None = None,
    ac: bool = False, phys_bits: int = 52, gigapages: bool = True,
) -> Walk:  # fmt: skip
    """``walk()`` with the control registers of ``sregs``; ``user`` defaults to SS.DPL = 3.

    SS.DPL is the current privilege level (Intel SDM Vol. 3C §24.4.1; AMD APM Vol. 2 §15.5.1).
    """
    if user is None:
        user = bool(int(sregs.cr0) & 1) and int(sregs.ss.dpl) & 3 == 3
    return walk(
        memory, gva, cr0=int(sregs.cr0), cr3=int(sregs.cr3), cr4=int(sregs.cr4),
        efer=int(sregs.efer), access=access, user=user, ac=ac, phys_bits=phys_bits,
        gigapages=gigapages,
    )  # fmt: skip


def translate(memory: Any, sregs: Any, gva: int) -> int | None:
    """The guest-physical address behind ``gva`` whatever its rights, or None."""
    return walk_sregs(memory, sregs, gva, user=False, ac=True).gpa


def _chunks(memory: Any, sregs: Any, gva: int, length: int) -> Iterator[bytes]:
    while length > 0:
        step = min(length, 0x1000 - (gva & 0xFFF))
        gpa = translate(memory, sregs, gva)
        raw = None if gpa is None else peek(memory, gpa, step)
        if raw is None and gpa is not None:
            # RAM may end inside the page: hand out the bytes in front of its end.
            while step > 1 and raw is None:
                step -= 1
                raw = peek(memory, gpa, step)
            if raw is not None:
                yield raw
            return
        if raw is None:
            return
        yield raw
        gva, length = gva + step, length - step


def read_virtual(memory: Any, sregs: Any, gva: int, length: int) -> bytes:
    """``length`` bytes at ``gva``, cut short at the first byte that is not mapped to RAM."""
    return b"".join(_chunks(memory, sregs, gva, length))
