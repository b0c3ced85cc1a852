"""Multiboot 1: images by their ELF headers or by the header's own addresses, and the info block."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pykvm import boot
from pykvm.arch.x86_64 import layout as cpu
from pykvm.boot import layout, multiboot
from pykvm.errors import BootError
from pykvm.memory import GuestMemory
from tests.support.kernels import CODE, FakeMemory, elf, multiboot_header, pvh_note

RAM = 16 << 20
BASE = 0x400000  # where kvm-unit-tests are linked


@pytest.fixture
def mem() -> Iterator[GuestMemory]:
    with GuestMemory(RAM) as made:
        yield made


def load(mem: Any, kernel: Any, **asked: Any) -> boot.BootPlan:
    return boot.load(mem, kernel, **{"cache": False, **asked})


def kernel(base: int = BASE, bits: int = 32, flags: int = 0, size: int = 0x3000) -> bytes:
    code = multiboot_header(flags) + CODE
    return elf([(base, code, size)], bits=bits, entry=base + 12)


def info(mem: GuestMemory, plan: boot.BootPlan) -> dict[str, int]:
    names = ("flags", "mem_lower", "mem_upper", "boot_device", "cmdline", "mods_count", "mods_addr")
    said = dict(zip(names, struct.unpack("<7I", mem.read(plan.info_gpa, 28)), strict=True))
    said["mmap_length"], said["mmap_addr"] = struct.unpack("<II", mem.read(plan.info_gpa + 44, 8))
    (said["boot_loader_name"],) = struct.unpack("<I", mem.read(plan.info_gpa + 64, 4))
    return said


@pytest.mark.parametrize("bits", [32, 64])
def test_an_elf_image_is_loaded_by_p_paddr_with_its_bss_zeroed(mem: GuestMemory, bits: int) -> None:
    mem.fill(BASE, 0x4000, 0xEE)
    plan = load(mem, kernel(bits=bits))
    assert (plan.protocol, plan.mode, plan.entry) == ("multiboot", "prot32", BASE + 12)
    assert plan.registers == {"rax": 0x2BADB002, "rbx": plan.info_gpa}
    assert plan.tables == 0 and plan.kernel == (BASE, 0x3000)
    end = BASE + 12 + len(CODE)
    assert mem[BASE + 12 : end] == CODE
    assert mem[end : BASE + 0x3000] == bytes(BASE + 0x3000 - end)
    assert mem[BASE + 0x3000] == 0xEE
    assert plan.elf is not None and plan.symbols == {}


def test_the_bios_data_area_says_where_conventional_memory_ends(mem: GuestMemory) -> None:
    """Xen takes the room for its trampoline from there, and from 4 GiB down where it reads 0."""
    load(mem, kernel())
    assert mem.read(0x413, 2) == (639).to_bytes(2, "little")
    assert mem.read(0x40E, 2) == (0x9FC0).to_bytes(2, "little")
    assert mem.read(0x400, 0x100).count(0) == 0x100 - 4


def test_a_kernel_that_is_linked_over_the_bios_data_area_has_it_to_itself(
    mem: GuestMemory,
) -> None:
    load(mem, kernel(base=0, size=0x3000))
    assert mem[12 : 12 + len(CODE)] == CODE


def test_with_less_than_640_kib_there_is_no_bios_data_area() -> None:
    with GuestMemory(0x80000) as small:
        load(small, kernel(base=0x40000))
        assert small.read(0x400, 0x100) == bytes(0x100)


def test_the_info_block_says_what_there_is(mem: GuestMemory, tmp_path: Path) -> None:
    path = tmp_path / "msr.flat"
    path.write_bytes(kernel())
    env = tmp_path / "env"
    env.write_bytes(b"KERNEL_VERSION=6\n")
    plan = load(mem, path, cmdline="a b", initrd=[env, b"second" * 1000])
    said = info(mem, plan)
    assert said["flags"] == 0x24D, "memory, command line, modules, memory map, loader's name"
    assert (said["mem_lower"], said["mem_upper"]) == (639, (RAM >> 10) - 1024)
    assert mem.cstring(said["cmdline"]) == b"msr.flat a b"
    assert (plan.cmdline, plan.cmdline_gpa) == (b"msr.flat a b", said["cmdline"])
    assert mem.cstring(said["boot_loader_name"]) == b"pykvm"
    assert said["mods_count"] == 2
    modules = [struct.unpack("<IIII", mem.read(said["mods_addr"] + 16 * n, 16)) for n in range(2)]
    assert [mem[start:end] for start, end, _, _ in modules] == [
        b"KERNEL_VERSION=6\n",
        b"second" * 1000,
    ]
    assert [mem.cstring(text) for _, _, text, _ in modules] == [str(env).encode(), b""]
    assert all(start % 4096 == 0 for start, *_ in modules)
    assert plan.modules == [(start, end - start) for start, end, _, _ in modules]
    assert plan.initrd == plan.modules[0]
    found, at = [], said["mmap_addr"]
    while at < said["mmap_addr"] + said["mmap_length"]:
        size, *entry = struct.unpack("<IQQI", mem.read(at, 24))
        found.append(tuple(entry))
        at += size + 4
    assert found == [tuple(entry) for entry in plan.e820]


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        ({}, b"kernel"),
        ({"cmdline": "x=1"}, b"kernel x=1"),
        ({"name": "apic", "cmdline": "x=1"}, b"apic x=1"),
        ({"name": "/a/b", "cmdline": b"\xff"}, b"/a/b \xff"),
    ],
)
def test_the_command_line_begins_with_the_programs_name(
    mem: GuestMemory, asked: Any, line: bytes
) -> None:
    plan = load(mem, kernel(), **asked)
    assert mem.cstring(plan.cmdline_gpa) == line


def test_without_modules_the_flag_says_so(mem: GuestMemory) -> None:
    said = info(mem, load(mem, kernel()))
    assert (said["flags"], said["mods_count"], said["mods_addr"]) == (0x245, 0, 0)


def test_mem_upper_ends_at_the_first_hole_below_4_gib() -> None:
    mem = FakeMemory(*layout.ram_ranges(5 << 30))
    plan = load(mem, kernel())
    block = mem.writes[plan.info_gpa]
    assert struct.unpack_from("<II", block, 4) == (639, (layout.PCI_HOLE >> 10) - 1024)


@pytest.mark.parametrize("base", [0, 0x500, 0x1000, 0x7000, 0x8000, 0xF000, 0x10000, 0x10058])
def test_tables_and_info_block_keep_clear_of_a_low_image(base: int) -> None:
    """Of all of it, with its .bss."""
    mem = FakeMemory((0, RAM))
    size = 0x20000
    plan = load(mem, kernel(base, size=size), initrd=b"module", cmdline="x" * 3000)
    taken = [
        (base, base + size),
        (plan.tables + cpu.GDT, plan.tables + cpu.END),
        (plan.info_gpa, plan.info_gpa + len(mem.writes[plan.info_gpa])),
        (plan.modules[0][0], sum(plan.modules[0])),
    ]
    free = base + size <= cpu.GDT or base >= cpu.END
    assert (plan.tables == 0) is free, "at their usual place if they can be"
    assert (plan.info_gpa == layout.MULTIBOOT_INFO) is (base + size <= layout.MULTIBOOT_INFO)
    for index, (start, end) in enumerate(taken):
        for other_start, other_end in taken[:index]:
            assert end <= other_start or other_end <= start, (hex(start), hex(other_start))
    assert plan.tables % 4096 == 0 and (plan.tables + cpu.END) < 1 << 20


def test_an_image_that_leaves_no_low_memory_gets_its_info_above_itself() -> None:
    mem = FakeMemory((0, RAM))
    plan = load(mem, kernel(0x1000, size=0x100000))
    assert plan.info_gpa >= 0x101000 and plan.tables >= 0x101000


# -- addresses in the header -----------------------------------------------------------------------

HEADER_AT = 0x20
LOAD = 0x300000


def flat(
    header: int = LOAD + HEADER_AT,
    load_addr: int = LOAD,
    load_end: int = 0,
    bss_end: int = 0,
    entry: int = LOAD + 0x80,
    front: int = HEADER_AT,
) -> bytes:
    """Not an ELF file: ``front`` bytes, the header, code."""
    made = b"\x90" * front + multiboot_header(1 << 16, header, load_addr, load_end, bss_end, entry)
    return made + CODE


def test_an_image_of_any_format_is_loaded_as_its_header_says(mem: GuestMemory) -> None:
    mem.fill(LOAD, 0x10000, 0xEE)
    image = flat()
    plan = load(mem, image)
    assert (plan.entry, plan.kernel) == (LOAD + 0x80, (LOAD, len(image)))
    assert mem[LOAD : LOAD + len(image)] == image and mem[LOAD + len(image)] == 0xEE
    assert plan.elf is None


def test_it_may_leave_out_parts_of_the_file_and_have_a_bss(mem: GuestMemory) -> None:
    mem.fill(LOAD, 0x10000, 0xEE)
    image = flat(load_end=LOAD + 0x200, bss_end=LOAD + 0x5000, front=HEADER_AT + 0x100)
    plan = load(mem, image)
    assert mem[LOAD : LOAD + 0x200] == image[0x100:0x300]
    assert mem[LOAD + 0x200 : LOAD + 0x5000] == bytes(0x4E00)
    assert mem[LOAD + 0x5000] == 0xEE and plan.kernel == (LOAD, 0x5000)


def test_the_headers_addresses_win_over_those_of_an_elf_file(mem: GuestMemory) -> None:
    at = 52 + 32
    head = multiboot_header(1 << 16, LOAD + at, LOAD, 0, 0, LOAD + at + 32)
    image = elf([(0x500000, b"code", 100)], bits=32, front=head)
    plan = load(mem, image)
    assert plan.kernel == (LOAD, len(image)) and mem[LOAD : LOAD + len(image)] == image


@pytest.mark.parametrize("entry", [LOAD, LOAD + 0x4FFF])
def test_the_entry_may_be_any_byte_of_it(mem: GuestMemory, entry: int) -> None:
    assert load(mem, flat(bss_end=LOAD + 0x5000, entry=entry)).entry == entry


@pytest.mark.parametrize(
    ("addresses", "message"),
    [
        ({"entry": LOAD + 0x5000, "bss_end": LOAD + 0x5000}, "entry_addr: .* found 0x305000"),
        ({"header": LOAD - 1}, "header_addr: expected load_addr .* found 0x2fffff"),
        ({"header": LOAD + HEADER_AT + 1}, "header_addr: expected load_addr"),
        ({"load_end": LOAD}, "load_end_addr: expected an end within the file"),
        ({"load_end": LOAD + 0x10000}, "load_end_addr: expected an end within the file"),
        ({"bss_end": LOAD + 1}, "bss_end_addr: expected at least load_end_addr"),
        ({"entry": LOAD - 1}, "entry_addr: expected 0x300000.*, found 0x2fffff"),
        ({"entry": 0}, "entry_addr: expected 0x300000.*, found 0x0"),
        ({"bss_end": 0xFFFFFFFF}, "the kernel: expected RAM at 0x300000"),
    ],
)
def test_addresses_that_make_no_sense_are_named(addresses: dict[str, int], message: str) -> None:
    mem = FakeMemory((0, RAM))
    with pytest.raises(BootError, match=message):
        load(mem, flat(**addresses))
    assert mem.untouched


def test_addresses_that_are_cut_off_are_refused() -> None:
    image = b"\x90" * HEADER_AT + multiboot_header(1 << 16, 0, 0, 0, 0)
    with pytest.raises(BootError, match="the header: expected 32 bytes with its addresses"):
        load(FakeMemory((0, RAM)), image)


# -- the header ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("front", "found"), [(0, True), (4, True), (2, False), (8180, True), (8184, False)]
)
def test_the_header_is_looked_for_on_4_byte_boundaries_in_the_first_8_kib(
    front: int, found: bool
) -> None:
    at = multiboot.find_header(memoryview(b"\x90" * front + multiboot_header() + CODE * 3))
    assert at == (front if found else None)


def test_a_wrong_checksum_is_no_header_and_a_right_one_may_follow() -> None:
    wrong = multiboot_header()[:8] + b"\1\2\3\4"
    assert multiboot.find_header(memoryview(wrong)) is None
    assert multiboot.find_header(memoryview(wrong + multiboot_header())) == 12
    assert multiboot.find_header(memoryview(multiboot_header()[:11])) is None
    assert multiboot.find_header(memoryview(b"")) is None


@pytest.mark.parametrize("flags", [0, 1, 2, 3, 3 | 0x20000, 0xFFFE0000])
def test_flags_that_are_understood_or_optional_are_fine(mem: GuestMemory, flags: int) -> None:
    assert load(mem, kernel(flags=flags)).protocol == "multiboot"


@pytest.mark.parametrize("bit", range(2, 16))
def test_required_flags_that_are_not_understood_are_refused(bit: int) -> None:
    mem = FakeMemory((0, RAM))
    with pytest.raises(BootError, match=f"multiboot: flags: .* found {1 << bit | 1:#x}"):
        load(mem, kernel(flags=1 << bit | 1))
    assert mem.untouched


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (multiboot_header() + CODE, "flags: expected bit 16 .* in a file that is not ELF"),
        (kernel(0xFFFFF000, 64), "p_paddr: expected segments below 4 GiB"),
        (kernel(RAM - 0x2000), "the kernel: expected RAM at 0xffe000"),
        (kernel(0x98000, size=0x10000), "free RAM|the kernel"),
    ],
)
def test_an_image_that_cannot_be_loaded_is_refused(image: bytes, message: str) -> None:
    mem = FakeMemory((0, 0xA0000), (0x100000, RAM - 0x100000))
    with pytest.raises(BootError, match=message):
        load(mem, image)
    assert mem.untouched


def test_multiboot_comes_before_pvh_and_only_if_asked_or_there() -> None:
    both = elf([(BASE, multiboot_header() + CODE, 8192)], bits=32, notes=pvh_note(BASE + 16, 4))
    mem = FakeMemory((0, RAM))
    assert load(mem, both).protocol == "multiboot"
    assert load(mem, both, protocol="pvh").entry == BASE + 16
    with pytest.raises(BootError, match="multiboot: header: expected 0x1badb002"):
        load(mem, elf([(BASE, CODE, 8192)], bits=32), protocol="multiboot")


def test_modules_go_as_high_as_32_bits_reach() -> None:
    mem = FakeMemory((0, 8 << 20), (4 << 30, 64 << 20))
    plan = load(mem, kernel(), initrd=[b"a" * 4097, b""])
    assert plan.modules == [((8 << 20) - 8192, 4097), ((8 << 20) - 12288, 0)]
    with pytest.raises(BootError, match="a module: expected 0x800000 bytes of free RAM"):
        load(mem, kernel(), initrd=bytes(8 << 20))
