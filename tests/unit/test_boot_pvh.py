"""PVH: the entry that the note names, and the start info that the kernel is handed."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from pykvm import boot
from pykvm.boot import elf as elf_loader
from pykvm.boot import layout, pvh
from pykvm.errors import BootError
from pykvm.memory import GuestMemory
from tests.support.kernels import CODE, INIT_SIZE, PREF, FakeMemory, bzimage, elf, note, pvh_note

RAM = 16 << 20
ENTRY = PREF + 0x40


@pytest.fixture
def mem() -> Iterator[GuestMemory]:
    with GuestMemory(RAM) as made:
        yield made


def load(mem: Any, kernel: Any, **asked: Any) -> boot.BootPlan:
    return boot.load(mem, kernel, **{"cache": False, **asked})


def kernel(notes: bytes | None = None, **more: Any) -> bytes:
    said = pvh_note(ENTRY) if notes is None else notes
    return elf([(PREF, CODE, len(CODE) + 100)], notes=said, **more)


@pytest.mark.parametrize("bits", [32, 64])
def test_a_note_makes_it_pvh_and_names_the_entry(mem: GuestMemory, bits: int) -> None:
    mem.fill(PREF, 0x10000, 0xEE)
    plan = load(mem, kernel(bits=bits))
    assert (plan.protocol, plan.mode, plan.entry) == ("pvh", "prot32", ENTRY)
    assert plan.registers == {"rbx": layout.PVH_INFO} and plan.info_gpa == layout.PVH_INFO
    assert plan.boot_params_gpa == 0 and plan.tables == 0
    assert mem[PREF : PREF + len(CODE)] == CODE
    assert mem[PREF + len(CODE) : PREF + len(CODE) + 100] == bytes(100)
    assert mem[PREF + len(CODE) + 100] == 0xEE
    assert plan.elf is not None and plan.kernel == (PREF, len(CODE) + 100)


def test_the_start_info_says_where_everything_is(mem: GuestMemory) -> None:
    plan = load(mem, kernel(), initrd=b"070701", cmdline="quiet", rsdp_gpa=0xE0000)
    info = struct.unpack("<IIIIQQQQII", mem.read(plan.info_gpa, 56))
    magic, version, flags, modules, modlist, cmdline, rsdp, memmap, entries, reserved = info
    assert (magic, version, flags, reserved) == (0x336EC578, 1, 0, 0)
    assert magic.to_bytes(4, "little") == bytes([ord("x"), ord("E") | 0x80, ord("n"), ord("3")])
    assert rsdp == 0xE0000 and mem.cstring(cmdline) == b"quiet"
    assert plan.cmdline_gpa == cmdline
    assert modules == 1
    paddr, size, module_cmdline, zero = struct.unpack("<QQQQ", mem.read(modlist, 32))
    assert (paddr, size) == plan.initrd and (module_cmdline, zero) == (0, 0)
    assert mem.read(paddr, size) == b"070701"
    table = [struct.unpack("<QQII", mem.read(memmap + 24 * n, 24)) for n in range(entries)]
    assert table == [(*entry, 0) for entry in plan.e820] and len(table) == 4


def test_without_an_initrd_there_is_no_list_of_modules(mem: GuestMemory) -> None:
    plan = load(mem, kernel())
    modules, modlist = struct.unpack("<12xIQ", mem.read(plan.info_gpa, 24))
    assert (modules, modlist) == (0, 0)


def test_the_kernel_inside_a_bzimage_can_be_entered_so_too(mem: GuestMemory) -> None:
    plan = load(mem, bzimage(), protocol="pvh", initrd=b"x" * 5000, cmdline="quiet")
    assert (plan.protocol, plan.entry, plan.mode) == ("pvh", ENTRY, "prot32")
    assert plan.kernel == (PREF, INIT_SIZE) and plan.version.startswith("6.1.0-test")
    assert plan.initrd == (RAM - 8192, 5000) and mem[PREF : PREF + len(CODE)] == CODE


@pytest.mark.parametrize("size", [4, 8])
@pytest.mark.parametrize("align", [4, 8])
def test_the_note_is_found_among_others(size: int, align: int) -> None:
    notes = (
        note(b"GNU", 3, b"\xab" * 20, align)
        + note(b"Xen", 6, b"linux\0", align)
        + note(b"xen", 18, b"\0" * 8, align)
        + note(b"Linux", 18, b"\1\2\3", align)
        + note(b"Xen", 18, ENTRY.to_bytes(size, "little"), align)
    )
    image = elf_loader.parse(kernel(notes, align=align))
    assert pvh.find_entry(image) == ENTRY


def test_notes_read_as_pyelftools_reads_them() -> None:
    elffile = pytest.importorskip("elftools.elf.elffile")
    notes = (
        note(b"Xen", 6, b"linux\0") + note(b"", 7, b"") + pvh_note(ENTRY) + note(b"abc", 1, b"x")
    )
    data = kernel(notes)
    theirs = elffile.ELFFile(io.BytesIO(data))
    segment = next(s for s in theirs.iter_segments() if s["p_type"] == "PT_NOTE")
    assert [(name, len(value)) for name, _, value in elf_loader.parse(data).notes()] == [
        (n["n_name"].encode(), n["n_descsz"]) for n in segment.iter_notes()
    ]


@pytest.mark.parametrize(
    ("notes", "message"),
    [
        (note(b"Xen", 18, b"\0" * 7), "XEN_ELFNOTE_PHYS32_ENTRY: expected 4 or 8 bytes, found 7"),
        (pvh_note(PREF - 1), "PHYS32_ENTRY: expected an address in a PT_LOAD .* found 0x1fffff"),
        (pvh_note(1 << 63), "PHYS32_ENTRY: expected an address in a PT_LOAD segment"),
        (pvh_note(ENTRY)[:-1], "n_namesz and n_descsz: expected a note within its segment"),
        (struct.pack("<III", 0xFFFFFFFF, 0, 18), "n_namesz and n_descsz: expected a note"),
        (struct.pack("<III", 4, 0xFFFFFFFF, 18) + b"Xen\0", "n_namesz and n_descsz: expected"),
    ],
)
def test_a_note_that_is_wrong_is_named_and_nothing_is_written(notes: bytes, message: str) -> None:
    mem = FakeMemory((0, RAM))
    with pytest.raises(BootError, match=message):
        load(mem, kernel(notes))
    assert mem.untouched


def test_a_note_segment_outside_the_file_is_refused() -> None:
    data = bytearray(kernel())
    struct.pack_into("<Q", data, 64 + 56 + 8, len(data))  # p_offset of PT_NOTE
    with pytest.raises(BootError, match="p_offset and p_filesz of PT_NOTE"):
        load(FakeMemory((0, RAM)), bytes(data))


def test_without_the_note_there_is_no_pvh() -> None:
    mem = FakeMemory((0, RAM))
    for image in (kernel(b""), kernel(note(b"GNU", 18, b"1234"))):
        with pytest.raises(BootError, match=r"notes: expected XEN_ELFNOTE_PHYS32_ENTRY \(18\)"):
            load(mem, image, protocol="pvh")
    assert mem.untouched


def test_a_kernel_may_be_linked_at_1_mib_but_not_where_it_is_told_things() -> None:
    low = elf([(0x100000, CODE, 4096)], notes=pvh_note(0x100000, 4))
    assert load(FakeMemory((0, RAM)), low).entry == 0x100000
    for gpa, owner in (
        (0x7000, "the processor's tables"),
        (0x11000, "PVH's start info"),
        (0x20000, "the command line"),
        (0x9FC00, "the BIOS area"),
    ):
        with pytest.raises(BootError, match=f"{owner}|the kernel: expected .* free"):
            load(FakeMemory((0, RAM)), elf([(gpa, CODE, 4096)], notes=pvh_note(gpa, 4)))


def test_a_map_that_linux_cannot_take_is_refused() -> None:
    e820 = [(n << 16, 4096, 1) for n in range(128)]
    with pytest.raises(BootError, match="PVH memory map: expected at most 127 entries, found 128"):
        load(FakeMemory((0, RAM)), kernel(), e820=e820)
    assert load(FakeMemory((0, RAM)), kernel(), e820=e820[:127]).protocol == "pvh"
