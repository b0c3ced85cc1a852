"""Building page tables in guest memory.

>>> tables = PageTables(memory, 0x1000, 0x7000)
>>> tables.identity(4 << 30)
>>> tables.map(0x400000_0000, 0x8000, 0x2000, "rxu")
>>> tables
PageTables 4-level, CR3 0x1000, 4 of 6 pages used
  0x0000000000000000-0x00000000ffffffff → 0x0, 1G pages, rwx-
  0x0000004000000000-0x0000004000001fff → 0x8000, 4K pages, r-xu

Rights are kept in the last entry of a walk; the entries above allow everything.
"""

from __future__ import annotations

from _struct import pack  # `struct` itself costs an import

from .walk import NX, PS, SHAPES, P, U, W, peek, size_name, walk

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Self

    from .walk import Walk

PAGE = 0x1000
# Sizes of page each mode has, smallest first.
PAGE_SIZES = {
    "32-bit": (PAGE, 1 << 22),
    "pae": (PAGE, 1 << 21),
    "4-level": (PAGE, 1 << 21, 1 << 30),
    "5-level": (PAGE, 1 << 21, 1 << 30),
}
_ADDRESS_BITS = {"32-bit": 32, "pae": 32, "4-level": 48, "5-level": 57}
# CR0, CR4 and EFER under which ``walk`` reads each mode: PG|WP|PE; PSE, PAE, LA57; LMA|NXE.
_REGISTERS = {
    "32-bit": (0x80010001, 0x10, 0),
    "pae": (0x80010001, 0x20, 0x800),
    "4-level": (0x80010001, 0x20, 0xC00),
    "5-level": (0x80010001, 0x1020, 0xC00),
}


_made: dict[tuple[int, int, int, int], bytes] = {}
_MADE_LIMIT = 64


def _entries(start: int, count: int, step: int, entry_size: int) -> bytes:
    """``count`` entries, ``step`` apart, as they lie in memory; kept, as machines are alike."""
    key = start, count, step, entry_size
    raw = _made.get(key)
    if raw is None:
        entries = range(start, start + count * step, step)
        raw = pack(f"<{count}{'Q' if entry_size == 8 else 'I'}", *entries)
        if len(_made) < _MADE_LIMIT:
            _made[key] = raw
    return raw


class PageTables:
    """Page tables that live in guest memory and grow as ranges are mapped.

    Args:
        memory: guest-physical memory, read and written by slices.
        tables: guest-physical address of the root table, 4 KiB aligned; tables that are needed
            later follow it.
        end: first guest-physical address that may not be used for tables; None for no bound
            but the memory's own.
        mode: ``4-level`` and ``5-level`` of long mode, ``pae``, or ``32-bit``.

    Attributes:
        cr3: what CR3 must hold.
        page_sizes: sizes that may be used, smallest first. Take 1 GiB out where CPUID lacks
            ``pdpe1gb``.
        needs_nx: whether a range without ``x`` was mapped, so that EFER.NXE must be 1.

    Raises:
        ValueError: a bad mode or address.
    """

    __slots__ = ("_end", "_next", "cr3", "memory", "mode", "needs_nx", "page_sizes")

    def __init__(
        self, memory: Any, tables: int, end: int | None = None, mode: str = "4-level"
    ) -> None:
        if mode not in SHAPES:
            raise ValueError(f"paging mode {mode!r} is none of {', '.join(SHAPES)}")
        if tables & 0xFFF or tables < 0:
            raise ValueError(f"page tables at {tables:#x}: must be a multiple of 4 KiB")
        if mode in ("32-bit", "pae") and tables >= 1 << 32:
            raise ValueError(f"page tables at {tables:#x}: CR3 holds 32 bits in {mode} mode")
        self.memory, self.mode = memory, mode
        self._next, self._end = tables, end
        self.page_sizes = PAGE_SIZES[mode]
        self.needs_nx = False
        self.cr3 = self._allocate()

    def _allocate(self) -> int:
        gpa = self._next
        if self._end is not None and gpa + PAGE > self._end:
            raise ValueError(
                f"no room for another page table at {gpa:#x}: the range for tables ends at "
                f"{self._end:#x}; give it more pages, or use larger page sizes"
            )
        self.memory[gpa : gpa + PAGE] = bytes(PAGE)
        self._next = gpa + PAGE
        return gpa

    def at_home_in(self, memory: Any) -> Self:
        """These tables as they are, byte for byte at the same place, in another guest's memory."""
        other = type(self).__new__(type(self))
        other.memory, other.mode = memory, self.mode
        other._next, other._end = self._next, self._end
        other.page_sizes, other.needs_nx, other.cr3 = self.page_sizes, self.needs_nx, self.cr3
        return other

    @property
    def used(self) -> tuple[int, int]:
        """First gpa of the tables, and the first gpa after them."""
        return self.cr3, self._next

    def identity(
        self, length: int, start: int = 0, perms: str = "rwx", page_size: int | None = None
    ) -> None:
        """Map ``[start, start + length)`` to itself; arguments as for ``map``."""
        self.map(start, start, length, perms, page_size)

    def map(
        self, gva: int, gpa: int, length: int, perms: str = "rwx", page_size: int | None = None
    ) -> None:
        """Map ``length`` bytes of virtual addresses from ``gva`` on to ``gpa`` on.

        Args:
            perms: letters of ``rwxu``; dashes are ignored. ``r`` is always needed, ``u`` lets
                ring 3 in. A range without ``x`` needs EFER.NXE (see ``needs_nx``).
            page_size: 4096, 2 MiB (4 MiB in 32-bit mode), 1 GiB; None takes the largest that
                fits at each place.

        Raises:
            ValueError: misaligned, out of range, already mapped, unknown rights, or no room for
                tables. What lies in front of an offending page stays mapped.
        """
        flags = self._flags(perms)
        sizes = self._sizes(page_size)
        unit = sizes[0]
        if gva % unit or gpa % unit or length % unit or length <= 0:
            raise ValueError(
                f"gva {gva:#x}, gpa {gpa:#x} and length {length:#x} must be multiples of the "
                f"{size_name(unit)} page"
            )
        self._check_range(gva, gpa, length)
        while length:
            size = next(s for s in reversed(sizes) if not gva % s and not gpa % s and s <= length)
            done = self._fill(gva, gpa, length, size, flags)
            self.needs_nx = self.needs_nx or bool(flags & NX)
            gva, gpa, length = gva + done, gpa + done, length - done

    def _sizes(self, page_size: int | None) -> tuple[int, ...]:
        if page_size is None:
            return self.page_sizes
        if page_size not in self.page_sizes:
            known = ", ".join(size_name(size) for size in self.page_sizes)
            raise ValueError(f"page size {page_size:#x}: {self.mode} paging has {known}")
        return (page_size,)

    def _flags(self, perms: str) -> int:
        if set(perms) - set("rwxu-") or "r" not in perms:
            raise ValueError(f"rights {perms!r}: letters of 'rwxu', and r among them")
        flags = P | W * ("w" in perms) | U * ("u" in perms)
        if "x" not in perms:
            if self.mode == "32-bit":
                raise ValueError(f"rights {perms!r}: 32-bit paging cannot forbid execution")
            flags |= NX
        return flags

    def _check_range(self, gva: int, gpa: int, length: int) -> None:
        bits = _ADDRESS_BITS[self.mode]
        last = gva + length - 1
        if bits == 32:
            fits = gva >= 0 and last < 1 << 32
        else:
            half = 1 << (bits - 1)
            fits = 0 <= gva <= last < half or (1 << 64) - half <= gva <= last < 1 << 64
        if not fits:
            raise ValueError(f"{gva:#x}-{last:#x} are not virtual addresses of {self.mode} paging")
        # 32-bit tables hold 32 address bits (PSE-36 is left out), the others 52.
        width = 32 if self.mode == "32-bit" else 52
        if gpa < 0 or gpa + length > 1 << width:
            raise ValueError(f"gpa {gpa:#x} + {length:#x} is beyond {width} address bits")

    def _fill(self, gva: int, gpa: int, length: int, size: int, flags: int) -> int:
        """Write the entries of ``size`` that share one table; returns the bytes mapped."""
        entry_size, shape = SHAPES[self.mode]
        table = self.cr3
        for name, shift, bits in shape:
            index = gva >> shift & (1 << bits) - 1
            if 1 << shift == size:
                break
            table = self._step(table, name, index, gva)
        count = min(length // size, (1 << bits) - index)
        first, last = table + index * entry_size, table + (index + count) * entry_size
        old = peek(self.memory, first, last - first)
        if old is None or old != bytes(len(old)):
            self._refuse(old, entry_size, gva, size, name)
        if size != PAGE:
            flags |= PS
        # The flags include NX, so the numbers have all of their 64 bits.
        self.memory[first:last] = _entries(gpa | flags, count, size, entry_size)
        return count * size

    def _step(self, table: int, name: str, index: int, gva: int) -> int:
        """The table under entry ``index``, made if there is none."""
        entry_size, _ = SHAPES[self.mode]
        gpa = table + index * entry_size
        raw = peek(self.memory, gpa, entry_size)
        entry = 0 if raw is None else int.from_bytes(raw, "little")
        if entry & P:
            if entry & PS and name in ("PDPT", "PD"):
                raise ValueError(f"{gva:#x} is already mapped, by a large page in {name}[{index}]")
            return entry & 0xFFFFFFFFFF000
        new = self._allocate()
        # The four entries of a PAE PDPT have no rights: W and U are reserved there.
        entry = new | (P if self.mode == "pae" and name == "PDPT" else P | W | U)
        self.memory[gpa : gpa + entry_size] = entry.to_bytes(entry_size, "little")
        return new

    def _refuse(self, old: bytes | None, entry_size: int, gva: int, size: int, name: str) -> None:
        if old is None:
            raise ValueError(f"the {name} for {gva:#x} is not in RAM any more")
        first = next(n for n, byte in enumerate(old) if byte) // entry_size
        taken = gva + first * size
        entry = int.from_bytes(old[first * entry_size :][:entry_size], "little")
        by = "a page" if name == "PT" or entry & PS else f"smaller pages under {name}"
        raise ValueError(f"{taken:#x} is already mapped, by {by} (entry {entry:#x})")

    def walk(self, gva: int, access: str = "r", user: bool = False) -> Walk:
        """Translate ``gva`` through these tables, with CR0.WP and, where it exists, NX on."""
        cr0, cr4, efer = _REGISTERS[self.mode]
        return walk(
            self.memory, gva, cr0=cr0, cr3=self.cr3, cr4=cr4, efer=efer, access=access, user=user
        )

    def _leaves(self) -> list[tuple[int, int, int, str, str]]:
        """Every page as (gva, gpa, size, perms, path), read back from memory."""
        found: list[tuple[int, int, int, str, str]] = []
        self._collect(found, self.cr3, 0, 0, P | W | U, "")
        return found

    def _collect(
        self, found: list[tuple[int, int, int, str, str]], table: int, depth: int, gva: int,
        rights: int, path: str,
    ) -> None:  # fmt: skip
        entry_size, shape = SHAPES[self.mode]
        name, shift, index_bits = shape[depth]
        raw = peek(self.memory, table, entry_size << index_bits) or b""
        for index in range(len(raw) // entry_size):
            entry = int.from_bytes(raw[index * entry_size :][:entry_size], "little")
            if not entry & P:
                continue
            here = gva | index << shift
            step = f"{path}{name}[{index}]"
            bare = self.mode == "pae" and name == "PDPT"
            now = rights if bare else (rights & entry & (W | U)) | (rights | entry) & NX
            if name == "PT" or (entry & PS and name in ("PD", "PDPT")):
                bits = _ADDRESS_BITS[self.mode]
                negative = bits > 32 and here >> bits - 1 & 1
                linear = here | (1 << 64) - (1 << bits) if negative else here
                perms = f"r{'w' if now & W else '-'}{'-' if now & NX else 'x'}"
                perms += "u" if now & U else "-"
                page = entry & 0xFFFFFFFFFF000 & ~((1 << shift) - 1)
                found.append((linear, page, 1 << shift, perms, step))
            else:
                self._collect(found, entry & 0xFFFFFFFFFF000, depth + 1, here, now, f"{step} → ")

    def ranges(self) -> list[tuple[int, int, int, str, int]]:
        """What is mapped, as (gva, gpa, length, perms, page size), neighbours joined."""
        merged: list[tuple[int, int, int, str, int]] = []
        for gva, gpa, size, perms, _ in self._leaves():
            if merged:
                start, target, length, kind, page = merged[-1]
                adjoins = start + length == gva and target + length == gpa
                if adjoins and (kind, page) == (perms, size):
                    merged[-1] = (start, target, length + size, kind, page)
                    continue
            merged.append((gva, gpa, size, perms, size))
        return merged

    def tree(self) -> str:
        """Every page with the entries that lead to it, one a line."""
        return "\n".join(
            f"{path} → {size_name(size)} page at gpa {gpa:#x} {perms} (gva {gva:#x})"
            for gva, gpa, size, perms, path in self._leaves()
        )

    def __repr__(self) -> str:
        used = (self._next - self.cr3) // PAGE
        room = "" if self._end is None else f" of {(self._end - self.cr3) // PAGE}"
        digits = 8 if _ADDRESS_BITS[self.mode] == 32 else 16
        lines = [f"PageTables {self.mode}, CR3 {self.cr3:#x}, {used}{room} pages used"]
        for gva, gpa, length, perms, size in self.ranges():
            last = gva + length - 1
            lines.append(
                f"  {gva:#0{digits + 2}x}-{last:#0{digits + 2}x} → {gpa:#x}, "
                f"{size_name(size)} pages, {perms}"
            )
        return "\n".join(lines)
