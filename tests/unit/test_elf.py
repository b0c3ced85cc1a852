"""The ELF and flat loaders: good images land where they say, bad ones change nothing."""

from __future__ import annotations

import io
import itertools
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykvm import guestlib
from pykvm.boot import elf, flat
from pykvm.errors import BootError
from pykvm.memory import GuestMemory

RAM = 0x20000
CODE = b"\x90" * 12 + b"\xf4"

EHDR = {32: struct.Struct("<16sHHIIIIIHHHHHH"), 64: struct.Struct("<16sHHIQQQIHHHHHH")}
PHDR = {32: struct.Struct("<IIIIIIII"), 64: struct.Struct("<IIQQQQQQ")}
EHDR_FIELDS = (
    "e_ident", "e_type", "e_machine", "e_version", "e_entry", "e_phoff", "e_shoff", "e_flags",
    "e_ehsize", "e_phentsize", "e_phnum", "e_shentsize", "e_shnum", "e_shstrndx",
)  # fmt: skip


def program_header(bits: int, **fields: int) -> bytes:
    said = {
        "p_type": 1, "p_flags": 5, "p_offset": 0, "p_vaddr": 0x8000, "p_paddr": 0x8000,
        "p_filesz": 0, "p_memsz": 0, "p_align": 0x1000, **fields,
    }  # fmt: skip
    order = "p_type p_flags p_offset p_vaddr p_paddr p_filesz p_memsz p_align"
    if bits == 32:
        order = "p_type p_offset p_vaddr p_paddr p_filesz p_memsz p_flags p_align"
    return PHDR[bits].pack(*(said[name] for name in order.split()))


def image(
    bits: int = 64, segments: list[dict[str, int]] | None = None, code: bytes = CODE, **header: Any
) -> bytes:
    """An executable; its code follows the program headers, where p_offset is not given."""
    if segments is None:
        segments = [{"p_filesz": len(code), "p_memsz": len(code) + 0x20}]
    start = EHDR[bits].size + len(segments) * PHDR[bits].size
    table = b"".join(program_header(bits, **{"p_offset": start, **each}) for each in segments)
    said = {
        "e_ident": b"\x7fELF" + bytes([bits // 32, 1, 1]) + bytes(9), "e_type": 2,
        "e_machine": {32: 3, 64: 62}[bits], "e_version": 1, "e_entry": 0x8000,
        "e_phoff": EHDR[bits].size, "e_shoff": 0, "e_flags": 0, "e_ehsize": EHDR[bits].size,
        "e_phentsize": PHDR[bits].size, "e_phnum": len(segments), "e_shentsize": 0, "e_shnum": 0,
        "e_shstrndx": 0, **header,
    }  # fmt: skip
    return EHDR[bits].pack(*(said[name] for name in EHDR_FIELDS)) + table + code


@pytest.fixture
def mem() -> Any:
    with GuestMemory(RAM) as made:
        yield made


# -- good images ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "mode"), [(32, "prot32"), (64, "long64")])
def test_a_segment_lands_at_its_address_and_its_bss_is_zeroed(
    mem: GuestMemory, bits: int, mode: str
) -> None:
    mem.fill(0x7000, 0x2000, 0xCC)
    loaded = elf.load(mem, image(bits))
    assert mem[0x8000 : 0x8000 + len(CODE)] == CODE
    assert mem[0x8000 + len(CODE) : 0x8000 + len(CODE) + 0x20] == bytes(0x20)
    assert mem[0x8000 + len(CODE) + 0x20] == 0xCC and mem[0x7FFF] == 0xCC
    assert (loaded.mode, loaded.entry, loaded.bits) == (mode, 0x8000, bits)
    assert [(s.gpa, s.file_size, s.size, s.flags) for s in loaded.segments] == [
        (0x8000, len(CODE), len(CODE) + 0x20, 5)
    ]
    assert loaded.symbols == {}
    assert repr(loaded) == f"<ElfImage {mode} entry=0x8000 segments=[0x8000+0x2d]>"


def test_p_paddr_decides_and_a_virtual_entry_is_translated(mem: GuestMemory) -> None:
    high = {"p_vaddr": 0xFFFFFFFF80000000, "p_paddr": 0x9000, "p_filesz": 13, "p_memsz": 13}
    loaded = elf.load(mem, image(segments=[high], e_entry=0xFFFFFFFF80000004))
    assert mem[0x9000 : 0x9000 + 13] == CODE
    assert loaded.entry == 0x9004


def test_an_entry_that_is_physical_already_is_believed() -> None:
    high = {"p_vaddr": 0xFFFFFFFF80000000, "p_paddr": 0x9000, "p_filesz": 13, "p_memsz": 13}
    assert elf.parse(image(segments=[high], e_entry=0x9004)).entry == 0x9004


def test_without_any_p_paddr_p_vaddr_decides(mem: GuestMemory) -> None:
    two = [
        {"p_paddr": 0, "p_filesz": 13, "p_memsz": 13},
        {"p_paddr": 0, "p_vaddr": 0xA000, "p_filesz": 2, "p_memsz": 2},
    ]
    elf.load(mem, image(segments=two))
    assert mem[0x8000:0x800D] == CODE and mem[0xA000:0xA002] == CODE[:2]


def test_a_segment_at_physical_zero_beside_others_is_at_zero() -> None:
    two = [
        {"p_filesz": 13, "p_memsz": 13},
        {"p_paddr": 0, "p_vaddr": 0x500000, "p_filesz": 2, "p_memsz": 2},
    ]
    assert [s.gpa for s in elf.parse(image(segments=two)).segments] == [0, 0x8000]


def test_headers_that_are_not_pt_load_are_passed_over() -> None:
    more = [{"p_type": 4, "p_offset": 1 << 40}, {"p_filesz": 13, "p_memsz": 13}, {"p_type": 1}]
    assert len(elf.parse(image(segments=more)).segments) == 1


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer_will_do(mem: GuestMemory, kind: Any) -> None:
    elf.load(mem, kind(image()))
    assert mem[0x8000:0x800D] == CODE


def test_a_large_bss_is_zeroed_in_pieces() -> None:
    with GuestMemory("4M") as mem:
        mem.fill(0x10000, 0x300000, 0xFF)
        bss = {"p_vaddr": 0x10000, "p_paddr": 0x10000, "p_memsz": 0x2FFFFF}
        elf.load(mem, image(segments=[{"p_filesz": 1, "p_memsz": 1}, bss]))
        assert mem[0x10000 : 0x10000 + 0x2FFFFF] == bytes(0x2FFFFF)
        assert mem[0x30FFFF] == 0xFF


@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")
@pytest.mark.parametrize("bits", [32, 64])
def test_what_gcc_builds_reads_as_pyelftools_reads_it(tmp_path: Path, bits: int) -> None:
    elftools = pytest.importorskip("elftools.elf.elffile")
    source, built = tmp_path / "a.S", tmp_path / "a.elf"
    source.write_text(
        ".globl _start, table\n_start: hlt\nhere: nop\n.data\ntable: .long 1,2,3\n"
        ".bss\nroom: .skip 100\n"
    )
    subprocess.run(
        ["gcc", f"-m{bits}", "-nostdlib", "-static", "-no-pie", source, "-o", built],
        check=True,
        timeout=100,
    )
    mine = elf.parse(built.read_bytes())
    theirs = elftools.ELFFile(io.BytesIO(built.read_bytes()))
    loads = sorted(
        (s["p_paddr"], s["p_vaddr"], s["p_offset"], s["p_filesz"], s["p_memsz"], s["p_flags"])
        for s in theirs.iter_segments("PT_LOAD")
    )
    assert [tuple(segment) for segment in mine.segments] == loads
    assert mine.entry == theirs["e_entry"]
    expected = {
        symbol.name: symbol["st_value"]
        for symbol in theirs.get_section_by_name(".symtab").iter_symbols()
        if symbol.name
        and symbol["st_shndx"] != "SHN_UNDEF"
        and symbol["st_info"]["type"] not in ("STT_FILE", "STT_SECTION")
    }
    assert {"_start", "here", "table", "room"} <= set(expected)
    assert mine.symbols == expected


# -- bad images ----------------------------------------------------------------------------------

LOAD = {"p_filesz": 13, "p_memsz": 13}
BAD = {
    "empty": (b"", "e_ident"),
    "short": (image()[:15], "e_ident"),
    "header cut": (image()[:50], "the ELF header"),
    "magic": (b"MZ" + image()[2:], "magic: expected 7f 45 4c 46, found 4d 5a 4c 46"),
    "class": (image(e_ident=b"\x7fELF\x03\x01\x01" + bytes(9)), "EI_CLASS"),
    "big endian": (image(e_ident=b"\x7fELF\x02\x02\x01" + bytes(9)), "EI_DATA"),
    "ident version": (image(e_ident=b"\x7fELF\x02\x01\x00" + bytes(9)), "EI_VERSION"),
    "object file": (image(e_type=1), "e_type: expected 2 .* found 1 .*not linked"),
    "pie": (image(e_type=3), "-no-pie"),
    "strange type": (image(e_type=999), "e_type"),
    "arm": (image(e_machine=183), r"e_machine: expected 62 \(EM_X86_64\).*found 183"),
    "x32": (image(32, e_machine=62), r"e_machine: expected 3 \(EM_386\)"),
    "version": (image(e_version=0), "e_version"),
    "no headers": (image(segments=[]), "e_phnum"),
    "PN_XNUM": (image(e_phnum=0xFFFF), "e_phnum"),
    "many headers": (image(e_phnum=0xFFFE), "e_phoff and e_phnum"),
    "phoff": (image(e_phoff=1 << 63), "e_phoff"),
    "phentsize": (image(e_phentsize=32), "e_phentsize: expected 56, found 32"),
    "phentsize 0": (image(e_phentsize=0), "e_phentsize"),
    "nothing to load": (image(segments=[{"p_type": 4}]), "PT_LOAD"),
    "dynamic": (image(segments=[{"p_type": 3}, LOAD]), "-static"),
    "filesz": (image(segments=[{"p_filesz": 13, "p_memsz": 12}]), "p_filesz of program header 0"),
    "truncated": (image()[:-1], "truncated"),
    "offset": (image(segments=[{**LOAD, "p_offset": (1 << 64) - 1}]), "p_offset"),
    "wraps": (image(segments=[{**LOAD, "p_paddr": (1 << 64) - 5}]), "p_memsz"),
    "wraps 32": (
        image(32, segments=[{**LOAD, "p_paddr": (1 << 32) - 5, "p_vaddr": 0}]),
        "32 bits of address",
    ),
    "overlap": (image(segments=[LOAD, {**LOAD, "p_paddr": 0x800C}]), "do not overlap"),
    "same place": (image(segments=[LOAD, LOAD]), "0x8000.0xd and 0x8000.0xd"),
    "entry outside": (image(e_entry=0x7FFF), "e_entry: expected .* found 0x7fff"),
    "entry at the end": (image(segments=[LOAD], e_entry=0x800D), "e_entry"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_malformed_image_is_refused_by_field_and_nothing_is_written(
    mem: GuestMemory, name: str
) -> None:
    data, expected = BAD[name]
    mem.fill(0, RAM, 0xCC)
    with pytest.raises(BootError, match=expected):
        elf.load(mem, data)
    assert mem[0:RAM] == b"\xcc" * RAM


@pytest.mark.parametrize(
    ("gpa", "size"), [(RAM, 13), (RAM - 12, 13), (0x8000, RAM), (1 << 40, 13), (0x8000, 1 << 62)]
)
def test_a_segment_outside_ram_is_refused_before_the_first_is_written(
    mem: GuestMemory, gpa: int, size: int
) -> None:
    far = {"p_paddr": gpa, "p_vaddr": gpa, "p_filesz": 13, "p_memsz": size}
    data = image(segments=[{**LOAD, "p_paddr": 0x1000, "p_vaddr": 0x1000}, far], e_entry=0x1000)
    with pytest.raises(BootError, match=f"expected RAM at {gpa:#x}"):
        elf.load(mem, data)
    assert mem[0:RAM] == bytes(RAM)


class RecordingMemory:
    """Guest memory as a plain model: RAM in one or more pieces, and a list of what was written."""

    def __init__(self, *ranges: tuple[int, int]) -> None:
        self.ranges = ranges
        self.writes: list[tuple[int, int]] = []

    def covers(self, gpa: int, length: int) -> bool:
        return any(start <= gpa and gpa + length <= end for start, end in self.ranges)

    def load(self, gpa: int, data: Any) -> None:
        assert self.covers(gpa, len(data)), f"a write outside RAM: {gpa:#x}+{len(data):#x}"
        self.writes.append((gpa, gpa + len(data)))


BASES = [
    image(64, [LOAD, {"p_vaddr": 0xA000, "p_paddr": 0xA000, "p_memsz": 64}]),
    image(32, [LOAD, {"p_vaddr": 0xA000, "p_paddr": 0xA000, "p_memsz": 64}]),
]
HEADERS = 64 + 2 * 56
NASTY = st.sampled_from(
    [0, 1, 0x7F, 0x80, 0xFFFF, 0x7FFF, 1 << 31, (1 << 32) - 1, 1 << 63, (1 << 64) - 1, 0x1FFF0]
)
EDITS = st.lists(
    st.tuples(
        st.integers(0, HEADERS - 1), st.sampled_from([1, 2, 4, 8]), NASTY | st.integers(0, 2**64)
    ),
    min_size=1,
    max_size=4,
)


@given(base=st.sampled_from(BASES), edits=EDITS, cut=st.none() | st.integers(0, 200))
def test_mutated_headers_load_inside_ram_without_overlap_or_raise_booterror(
    base: bytes, edits: list[tuple[int, int, int]], cut: int | None
) -> None:
    data = bytearray(base)
    for offset, width, value in edits:
        data[offset : offset + width] = (value % (1 << 8 * width)).to_bytes(width, "little")
    mem = RecordingMemory((0x1000, RAM))
    try:
        loaded = elf.load(mem, bytes(data[:cut]))
    except BootError:
        assert mem.writes == []
        return
    assert any(s.gpa <= loaded.entry < s.end for s in loaded.segments)
    writes = sorted(mem.writes)
    assert all(low[1] <= high[0] for low, high in itertools.pairwise(writes))
    assert sum(end - start for start, end in writes) == sum(s.size for s in loaded.segments)


@given(edits=EDITS, data=st.data())
def test_mutated_symbol_tables_give_names_or_booterror(
    edits: list[tuple[int, int, int]], data: st.DataObject
) -> None:
    damaged = bytearray(REAL)
    sections = int.from_bytes(REAL[0x28:0x30], "little")
    for offset, width, value in edits:
        place = data.draw(st.sampled_from([0x28, sections, len(REAL) - 600])) + offset % 512
        damaged[place : place + width] = (value % (1 << 8 * width)).to_bytes(width, "little")
    try:
        symbols = elf.ElfImage(bytes(damaged), 64, 0, ()).symbols
    except BootError:
        return
    assert all(isinstance(k, str) and 0 <= v < 1 << 64 for k, v in symbols.items())


REAL = guestlib.find("c-guest").data()


def test_a_malformed_symbol_table_does_not_stop_loading() -> None:
    damaged = bytearray(REAL)
    damaged[0x3A:0x3C] = b"\x01\x00"  # e_shentsize
    with GuestMemory("4M") as mem:
        loaded = elf.load(mem, bytes(damaged))
    with pytest.raises(BootError, match="e_shentsize: expected 64, found 1"):
        _ = loaded.symbols


def test_only_the_first_symbol_table_is_read() -> None:
    """Else 65,000 section headers that share one table make a small file cost hours."""
    at = len(image())
    symbols = struct.pack("<IBBHQQ", 1, 0, 0, 1, 0x11, 0) + struct.pack(
        "<IBBHQQ", 3, 0, 0, 1, 0x22, 0
    )
    names = b"\0a\0b\0"
    tables = b"".join(
        struct.pack("<IIQQQQIIQQ", 0, 2, 0, 0, at + offset, 24, 2, 0, 0, 24) for offset in (0, 24)
    ) + struct.pack("<IIQQQQIIQQ", 0, 3, 0, 0, at + 48, len(names), 0, 0, 0, 0)
    data = image(e_shoff=at + 48 + len(names), e_shentsize=64, e_shnum=3)
    assert elf.parse(data + symbols + names + tables).symbols == {"a": 0x11}


# -- flat ----------------------------------------------------------------------------------------


def test_flat_goes_where_it_is_told_and_starts_there(mem: GuestMemory) -> None:
    assert flat.load(mem, CODE, 0x7C00) == 0x7C00
    assert mem[0x7C00 : 0x7C00 + 13] == CODE


def test_flat_may_span_regions_that_touch() -> None:
    with GuestMemory() as mem:
        mem.add(0, 0x1000)
        mem.add(0x1000, 0x1000)
        flat.load(mem, CODE, 0xFFA)
        assert mem[0xFFA : 0xFFA + 13] == CODE


@pytest.mark.parametrize("at", [RAM, RAM - 12, -1, 1 << 64])
def test_flat_outside_ram_is_refused_and_nothing_is_written(mem: GuestMemory, at: int) -> None:
    with pytest.raises(BootError, match="flat image: expected RAM"):
        flat.load(mem, CODE, at)
    assert mem[0:RAM] == bytes(RAM)


def test_flat_without_bytes_is_refused(mem: GuestMemory) -> None:
    with pytest.raises(BootError, match="at least 1 byte"):
        flat.load(mem, b"", 0x8000)
