"""Load a statically linked ELF guest.

Only what a loader needs is read: the ELF header, the program headers and, when somebody asks for
names, the symbol table (System V ABI, chapters "Object Files" and "Program Loading"). Every field
that decides where a byte goes is checked before the first byte is written, so a malformed image
leaves guest memory as it was.
"""

from __future__ import annotations

import itertools
import struct
from typing import TYPE_CHECKING, NamedTuple

from pykvm.boot.ram import require_ram, zero
from pykvm.errors import BootError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pykvm.boot.ram import Buffer, Memory

MAGIC = b"\x7fELF"

# The two layouts: ELF32 for i386, ELF64 for x86-64. Formats are struct's, little endian.
_EHDR = {32: struct.Struct("<16sHHIIIIIHHHHHH"), 64: struct.Struct("<16sHHIQQQIHHHHHH")}
_PHDR = {32: struct.Struct("<IIIIIIII"), 64: struct.Struct("<IIQQQQQQ")}
_SHDR = {32: struct.Struct("<IIIIIIIIII"), 64: struct.Struct("<IIQQQQIIQQ")}
_SYM = {32: struct.Struct("<IIIBBH"), 64: struct.Struct("<IBBHQQ")}

_MACHINES = {32: (3, "EM_386"), 64: (62, "EM_X86_64")}
_MODES = {32: "prot32", 64: "long64"}
_TYPES = {
    1: "ET_REL, an object file that is not linked yet",
    3: "ET_DYN, position independent: link with -static -no-pie",
    4: "ET_CORE, a core dump",
}
_ET_EXEC = 2
_PT_LOAD, _PT_INTERP, _PT_NOTE = 1, 3, 4
_NOTE = struct.Struct("<III")
_SHT_SYMTAB = 2
_SHN_UNDEF = 0
_STT_SECTION, _STT_FILE = 3, 4
_PN_XNUM = 0xFFFF
_LONGEST_NAME = 4096
_MOST_NOTES = 4096  # Linux has some twenty


class Segment(NamedTuple):
    """A PT_LOAD program header: ``file_size`` bytes of the file, then zeros up to ``size``."""

    gpa: int
    """Where it goes: p_paddr, or p_vaddr in a file whose p_paddr are all 0."""
    gva: int
    """p_vaddr, the address it was linked for."""
    offset: int
    """Where its bytes start in the file."""
    file_size: int
    """Bytes that come from the file."""
    size: int
    """Bytes in memory."""
    flags: int
    """p_flags: 4 read, 2 write, 1 execute."""

    @property
    def end(self) -> int:
        """First guest-physical address after the segment."""
        return self.gpa + self.size


class ElfImage:
    """A checked ELF executable.

    Attributes:
        data: the file.
        bits: 32 or 64.
        mode: the mode its code was compiled for, ``"prot32"`` or ``"long64"``.
        entry: guest-physical address of the first instruction.
        segments: what has to be loaded, in ascending order, without overlaps.
    """

    __slots__ = ("_symbols", "bits", "data", "entry", "mode", "segments")

    def __init__(self, data: Buffer, bits: int, entry: int, segments: tuple[Segment, ...]) -> None:
        self.data = data
        self.bits = bits
        self.mode = _MODES[bits]
        self.entry = entry
        self.segments = segments
        self._symbols: dict[str, int] | None = None

    @property
    def symbols(self) -> dict[str, int]:
        """Name → address of every named symbol defined in the file; empty for a stripped file.

        Read on first use. Raises BootError for a malformed symbol table, which does not stop
        ``load()``.
        """
        if self._symbols is None:
            self._symbols = _symbols(self.data, self.bits)
        return self._symbols

    def notes(self) -> Iterator[tuple[bytes, int, bytes]]:
        """Yield (name without its NUL, type, descriptor) of each note in the PT_NOTE segments.

        Raises BootError for a note that does not fit into its segment, and for thousands of them.
        """
        fields = _EHDR[self.bits].unpack_from(self.data)
        view = memoryview(self.data)
        count = 0
        for _, p_type, _, p_offset, _, _, p_filesz, _, p_align in _program_headers(
            self.data, self.bits, fields[5], fields[10]
        ):
            if p_type != _PT_NOTE:
                continue
            for note in _notes(view[p_offset : p_offset + p_filesz], p_filesz, p_align):
                count += 1
                if count > _MOST_NOTES:
                    raise _bad("PT_NOTE", f"at most {_MOST_NOTES} notes", "more")
                yield note

    def __repr__(self) -> str:
        parts = ", ".join(f"{s.gpa:#x}+{s.size:#x}" for s in self.segments)
        return f"<ElfImage {self.mode} entry={self.entry:#x} segments=[{parts}]>"


def is_elf(data: Buffer) -> bool:
    """Whether the file starts as an ELF file does."""
    return bytes(data[:4]) == MAGIC


def load(mem: Memory, data: Buffer) -> ElfImage:
    """Copy a static ELF executable into guest memory and zero its .bss.

    Raises BootError for an image that is malformed, not static, or does not fit into RAM; then
    nothing has been written.
    """
    image = parse(data)
    for segment in image.segments:
        require_ram(mem, segment.gpa, segment.size, f"the segment at {segment.gpa:#x}")
    view = memoryview(data)
    for segment in image.segments:
        if segment.file_size:
            mem.load(segment.gpa, view[segment.offset : segment.offset + segment.file_size])
        zero(mem, segment.gpa + segment.file_size, segment.size - segment.file_size)
    return image


def parse(data: Buffer) -> ElfImage:
    """Check an ELF executable; guest memory is not needed.

    Raises BootError naming the field, what was expected and what was found.
    """
    bits = _check_ident(data)
    header = _EHDR[bits]
    if len(data) < header.size:
        raise _bad("the ELF header", f"{header.size} bytes", f"a file of {len(data)} bytes")
    (_, e_type, e_machine, e_version, e_entry, e_phoff, _, _, _, e_phentsize, e_phnum, *_) = (
        header.unpack_from(data)
    )
    if e_type != _ET_EXEC:
        raise _bad("e_type", "2 (ET_EXEC)", f"{e_type} ({_TYPES.get(e_type, 'unknown')})")
    number, name = _MACHINES[bits]
    if e_machine != number:
        raise _bad("e_machine", f"{number} ({name}) in an ELF{bits} file", str(e_machine))
    if e_version != 1:
        raise _bad("e_version", "1", str(e_version))
    if not e_phnum:
        raise _bad("e_phnum", "at least 1 program header", "0")
    if e_phnum == _PN_XNUM:
        raise _bad("e_phnum", "fewer than 65535 program headers", "PN_XNUM")
    if e_phentsize != _PHDR[bits].size:
        raise _bad("e_phentsize", str(_PHDR[bits].size), str(e_phentsize))
    end = e_phoff + e_phnum * e_phentsize
    if end > len(data):
        raise _bad("e_phoff and e_phnum", f"an end within {len(data)} bytes", f"{end}")
    segments = _segments(data, bits, e_phoff, e_phnum)
    if not segments:
        raise _bad("the program headers", "a PT_LOAD segment with bytes in it", "none")
    return ElfImage(data, bits, _entry(e_entry, segments), segments)


def flatten(data: Buffer) -> tuple[bytes, dict[str, int]]:
    """The bytes of all segments as one flat image, gaps and .bss as zeros, and the symbols.

    For what the assembler links; an executable without bytes becomes an empty image.
    """
    bits = _check_ident(data)
    fields = _EHDR[bits].unpack_from(data)
    segments = _segments(data, bits, fields[5], fields[10])
    base = segments[0].gpa if segments else 0
    image = bytearray(segments[-1].end - base if segments else 0)
    for segment in segments:
        start = segment.gpa - base
        piece = data[segment.offset : segment.offset + segment.file_size]
        image[start : start + segment.file_size] = piece
    return bytes(image), _symbols(data, bits)


def read_symbols(data: Buffer) -> dict[str, int]:
    """Name → address of every named symbol that an ELF file defines, whatever kind of file it is.

    Raises BootError for what is none, and for a malformed table.
    """
    return _symbols(data, _check_ident(data))


def _check_ident(data: Buffer) -> int:
    """Check e_ident; 32 or 64."""
    ident = bytes(data[:16])
    if len(ident) < 16:
        raise _bad("e_ident", "16 bytes", f"a file of {len(ident)} bytes")
    if ident[:4] != MAGIC:
        raise _bad("e_ident magic", MAGIC.hex(" "), ident[:4].hex(" "))
    if ident[4] not in (1, 2):
        raise _bad("e_ident[EI_CLASS]", "1 (ELF32) or 2 (ELF64)", str(ident[4]))
    if ident[5] != 1:
        raise _bad("e_ident[EI_DATA]", "1 (little endian)", str(ident[5]))
    if ident[6] != 1:
        raise _bad("e_ident[EI_VERSION]", "1", str(ident[6]))
    return 32 * ident[4]


def _program_headers(
    data: Buffer, bits: int, offset: int, count: int
) -> Iterator[tuple[int, int, int, int, int, int, int, int, int]]:
    """Yield index and fields of the program headers, in ELF64's order for both classes."""
    for index in range(count):
        fields = _PHDR[bits].unpack_from(data, offset + index * _PHDR[bits].size)
        if bits == 32:
            p_type, p_offset, p_vaddr, p_paddr, p_filesz, p_memsz, p_flags, p_align = fields
            fields = p_type, p_flags, p_offset, p_vaddr, p_paddr, p_filesz, p_memsz, p_align
        yield index, *fields


def _notes(data: memoryview, size: int, align: int) -> Iterator[tuple[bytes, int, bytes]]:
    """The notes of one segment; name and descriptor are padded to 4 bytes, or to p_align 8."""
    if len(data) < size:
        raise _bad("p_offset and p_filesz of PT_NOTE", "an end within the file", "one outside")
    align = 8 if align == 8 else 4
    at = 0
    while at + _NOTE.size <= size:
        n_namesz, n_descsz, n_type = _NOTE.unpack_from(data, at)
        name = at + _NOTE.size
        desc = -(-(name + n_namesz) // align) * align
        if desc + n_descsz > size:
            found = f"{n_namesz} and {n_descsz} in {size - at}"
            raise _bad("n_namesz and n_descsz", "a note within its segment", found)
        text = bytes(data[name : name + n_namesz]).removesuffix(b"\0")
        yield text, n_type, bytes(data[desc : desc + n_descsz])
        at = -(-(desc + n_descsz) // align) * align


def _segments(data: Buffer, bits: int, offset: int, count: int) -> tuple[Segment, ...]:
    """The checked PT_LOAD headers, sorted by address."""
    loads = []
    for (
        index,
        p_type,
        p_flags,
        p_offset,
        p_vaddr,
        p_paddr,
        p_filesz,
        p_memsz,
        _,
    ) in _program_headers(data, bits, offset, count):
        if p_type == _PT_INTERP:
            raise _bad(
                f"program header {index}", "a static executable", "PT_INTERP: link with -static"
            )
        if p_type != _PT_LOAD or not p_memsz:
            continue
        where = f"of program header {index}"
        if p_filesz > p_memsz:
            raise _bad(f"p_filesz {where}", f"at most p_memsz ({p_memsz:#x})", f"{p_filesz:#x}")
        if p_offset + p_filesz > len(data):
            raise _bad(
                f"p_offset and p_filesz {where}",
                f"an end within {len(data):#x} bytes",
                f"{p_offset + p_filesz:#x} (a truncated file?)",
            )
        loads.append(Segment(p_paddr, p_vaddr, p_offset, p_filesz, p_memsz, p_flags))
    if not any(segment.gpa for segment in loads):  # a linker that leaves p_paddr out
        loads = [segment._replace(gpa=segment.gva) for segment in loads]
    loads.sort()
    for segment in loads:
        if segment.end > 1 << bits:
            raise _bad("p_memsz", f"an end within {bits} bits of address", f"{segment.end:#x}")
    for low, high in itertools.pairwise(loads):
        if high.gpa < low.end:
            raise _bad(
                "p_paddr",
                "segments that do not overlap",
                f"{low.gpa:#x}+{low.size:#x} and {high.gpa:#x}+{high.size:#x}",
            )
    return tuple(loads)


def _entry(e_entry: int, segments: tuple[Segment, ...]) -> int:
    """e_entry as a guest-physical address.

    The ABI says that e_entry is virtual, yet kernels linked for the upper half often put the
    physical address there, so an address that lies in a loaded segment as it stands is believed.
    """
    for segment in segments:
        if segment.gpa <= e_entry < segment.end:
            return e_entry
    for segment in segments:
        if segment.gva <= e_entry < segment.gva + segment.size:
            return segment.gpa + e_entry - segment.gva
    raise _bad("e_entry", "an address in a PT_LOAD segment", f"{e_entry:#x}")


def _symbols(data: Buffer, bits: int) -> dict[str, int]:
    """Read the SHT_SYMTAB section: the ABI allows one, so a second is not looked at."""
    fields = _EHDR[bits].unpack_from(data)
    e_shoff, e_shentsize, e_shnum = fields[6], fields[11], fields[12]
    symbols: dict[str, int] = {}
    if not e_shoff or not e_shnum:
        return symbols
    if e_shentsize != _SHDR[bits].size:
        raise _bad("e_shentsize", str(_SHDR[bits].size), str(e_shentsize))
    if e_shoff + e_shnum * e_shentsize > len(data):
        raise _bad("e_shoff and e_shnum", f"an end within {len(data)} bytes", "one outside")
    sections = [
        _SHDR[bits].unpack_from(data, e_shoff + index * e_shentsize) for index in range(e_shnum)
    ]
    raw = memoryview(data)
    for _, sh_type, _, _, sh_offset, sh_size, sh_link, _, _, sh_entsize in sections:
        if sh_type != _SHT_SYMTAB:
            continue
        if sh_entsize != _SYM[bits].size or sh_offset + sh_size > len(raw):
            raise _bad("the symbol table", "whole entries inside the file", "something else")
        if sh_link >= len(sections):
            raise _bad("sh_link of the symbol table", f"below {len(sections)}", str(sh_link))
        start, size = sections[sh_link][4:6]
        names = bytes(raw[start : start + size])
        for position in range(sh_offset, sh_offset + sh_size - sh_entsize + 1, sh_entsize):
            if bits == 64:
                st_name, st_info, _, st_shndx, st_value, _ = _SYM[bits].unpack_from(raw, position)
            else:
                st_name, st_value, _, st_info, _, st_shndx = _SYM[bits].unpack_from(raw, position)
            if st_shndx == _SHN_UNDEF or st_info & 15 in (_STT_SECTION, _STT_FILE):
                continue
            stop = names.find(b"\0", st_name, st_name + _LONGEST_NAME)
            if stop < 0:
                raise _bad("st_name", "a string that ends inside its table", f"{st_name:#x}")
            if stop > st_name:
                symbols[names[st_name:stop].decode("utf-8", "replace")] = st_value
        break
    return symbols


def _bad(field: str, expected: str, found: str) -> BootError:
    return BootError(f"ELF image: {field}: expected {expected}, found {found}")
