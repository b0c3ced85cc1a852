"""bzImage and vmlinux: where the parts land, and what the zero page says."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pykvm import boot
from pykvm.boot import layout, unpack
from pykvm.boot.bzimage import BzImage
from pykvm.errors import BootError
from pykvm.memory import GuestMemory
from tests.support.kernels import (
    CODE,
    DATA,
    FIELDS,
    INIT_SIZE,
    PACKERS,
    PREF,
    FakeMemory,
    bzimage,
    elf,
    vmlinux,
)

RAM = 16 << 20
U8, U16, U32, U64 = "<B", "<H", "<I", "<Q"


@pytest.fixture
def mem() -> Iterator[GuestMemory]:
    with GuestMemory(RAM) as made:
        yield made


def load(mem: Any, kernel: Any, **asked: Any) -> boot.BootPlan:
    return boot.load(mem, kernel, **{"cache": False, **asked})


def at(mem: GuestMemory, offset: int, form: str = U32) -> int:
    """A field of the zero page."""
    gpa = layout.ZERO_PAGE + offset
    value: int = struct.unpack(form, mem[gpa : gpa + struct.calcsize(form)])[0]
    return value


def header(mem: GuestMemory, name: str) -> int:
    offset, form, _ = FIELDS[name]
    return at(mem, offset, form)


# -- a good image ---------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", PACKERS)
def test_the_kernel_inside_is_unpacked_and_lies_as_its_segments_say(
    mem: GuestMemory, packed: str
) -> None:
    mem.fill(PREF, 0x80000, 0xEE)
    plan = load(mem, bzimage(packed=packed))
    assert (plan.protocol, plan.mode, plan.entry) == ("vmlinux", "long64", PREF)
    assert plan.format == packed and plan.version == "6.1.0-test (a@b) #1 SMP"
    assert plan.kernel == (PREF, INIT_SIZE)
    assert mem[PREF : PREF + len(CODE)] == CODE
    second = PREF + 0x10000
    assert mem[second : second + len(DATA)] == DATA
    zeros = second + len(DATA)
    assert mem[zeros : zeros + 0x28000] == bytes(0x28000), "zeros of the file"
    assert mem[zeros + 0x28000 : zeros + 0x28003] == b"end"
    assert mem[zeros + 0x28003 : zeros + 0x38003] == bytes(0x10000), ".bss"
    assert mem[zeros + 0x38003] == 0xEE
    assert plan.notes == [] and plan.symbols == {}


def test_the_kernel_is_told_all_it_needs(mem: GuestMemory) -> None:
    initrd = b"070701" * 1000
    plan = load(mem, bzimage(), initrd=initrd, cmdline="console=ttyS0 quiet", rsdp_gpa=layout.RSDP)
    assert plan.registers == {"rsi": layout.ZERO_PAGE} and plan.tables == 0
    assert plan.boot_params_gpa == layout.ZERO_PAGE
    assert mem.cstring(plan.cmdline_gpa) == b"console=ttyS0 quiet"
    assert header(mem, "heap_end_ptr") == 0x5555, "the image's own header is the base"
    assert header(mem, "kernel_info_offset") == 0x380, "to its very end"
    assert header(mem, "type_of_loader") == 0xFF
    assert header(mem, "loadflags") == 0x01, "without CAN_USE_HEAP and KASLR_FLAG"
    assert header(mem, "vid_mode") == 0xFFFF
    assert header(mem, "code32_start") == PREF
    assert header(mem, "setup_data") == 0, "a list that the file claims to have would be walked"
    assert at(mem, 0x228) == plan.cmdline_gpa and at(mem, 0x0C8) == 0
    assert plan.initrd is not None
    gpa, length = plan.initrd
    assert (at(mem, 0x218), at(mem, 0x21C)) == (gpa, length)
    assert (at(mem, 0x0C0), at(mem, 0x0C4)) == (0, 0)
    assert gpa == (RAM - len(initrd)) & -4096 and mem[gpa : gpa + length] == initrd
    assert at(mem, 0x070, U64) == layout.RSDP
    assert at(mem, 0x1EF, U8) == 0, "the sentinel"
    count = at(mem, 0x1E8, U8)
    table = [
        struct.unpack("<QQI", mem.read(layout.ZERO_PAGE + 0x2D0 + 20 * n, 20)) for n in range(count)
    ]
    assert table == [
        (0, 0x9FC00, 1),
        (0x9FC00, 0x400, 2),
        (0xE0000, 0x20000, 2),
        (0x100000, RAM - 0x100000, 1),
    ]
    assert [tuple(entry) for entry in plan.e820] == table


def test_without_initrd_or_command_line_the_zero_page_says_so(mem: GuestMemory) -> None:
    plan = load(mem, bzimage())
    assert plan.initrd is None and at(mem, 0x218) == at(mem, 0x21C) == 0
    assert mem.cstring(plan.cmdline_gpa) == b"" and at(mem, 0x228) == plan.cmdline_gpa


def test_the_zero_page_is_clean_whatever_was_there(mem: GuestMemory) -> None:
    mem.fill(layout.ZERO_PAGE, 0x1000, 0xFF)
    load(mem, bzimage())
    assert mem[layout.ZERO_PAGE : layout.ZERO_PAGE + 0x1E8] == bytes(0x1E8)
    assert mem[layout.ZERO_PAGE + 0xCD0 : layout.ZERO_PAGE + 0x1000] == bytes(0x330)


@pytest.mark.parametrize("asked", [{"kaslr": True}, {"protocol": "bzimage"}])
def test_the_image_unpacks_itself_when_asked_to(mem: GuestMemory, asked: Any) -> None:
    image = bzimage()
    plan = load(mem, image, **asked)
    assert (plan.protocol, plan.mode, plan.entry) == ("bzimage", "long64", PREF + 0x200)
    assert plan.registers == {"rsi": layout.ZERO_PAGE}
    code = image[0x800:]
    assert mem[PREF : PREF + len(code)] == code
    assert "unpack" not in plan.timings and plan.notes == []


@pytest.mark.parametrize(
    ("payload", "why"),
    [
        (b"\x89LZO\0\r\n\x1a\n" + bytes(100), "no library here unpacks lzo"),
        (b"who knows what this is", "the payload's format is unknown"),
    ],
)
def test_what_cannot_be_unpacked_here_unpacks_itself_and_a_note_says_why(
    mem: GuestMemory, payload: bytes, why: str
) -> None:
    plan = load(mem, bzimage(payload))
    assert plan.protocol == "bzimage" and plan.entry == PREF + 0x200
    assert plan.notes == [f"the image unpacks itself: {why}"]
    for protocol in ("vmlinux", "pvh"):
        with pytest.raises(BootError, match=f"payload: expected one that .* found {why}"):
            load(mem, bzimage(payload), protocol=protocol)


def test_a_missing_library_is_named(mem: GuestMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone() -> Any:
        raise unpack.MissingLibrary("lz4 needs a package: pip install lz4")

    monkeypatch.setitem(unpack._OPENERS, "lz4", gone)
    plan = load(mem, bzimage(packed="lz4"))
    assert plan.protocol == "bzimage"
    assert plan.notes == ["the image unpacks itself: lz4 needs a package: pip install lz4"]


def test_an_image_without_a_payload_field_unpacks_itself(mem: GuestMemory) -> None:
    plan = load(mem, bzimage(payload_offset=0, payload_length=0))
    assert plan.notes == ["the image unpacks itself: payload_offset is 0"]


@pytest.mark.parametrize(
    "fields",
    [
        {"version": 0x20C},
        {"jump": 0x62EB},
        {"jump": 0x8EEB},
        {"cmdline_size": 0},
        {"kernel_version": 0},
        {"kernel_version": 0xFFFF},
        {"kernel_alignment": PREF // 2},
        {"init_size": RAM - PREF},
        {"xloadflags": 1},
    ],
)
def test_the_last_value_within_its_limits_is_fine(mem: GuestMemory, fields: dict[str, Any]) -> None:
    assert load(mem, bzimage(**fields)).entry == PREF


def test_the_header_is_copied_to_its_end_and_no_further(mem: GuestMemory) -> None:
    load(mem, bzimage(jump=0x62EB))
    assert header(mem, "init_size") == INIT_SIZE and header(mem, "handover_offset") == 0


def test_what_is_no_bzimage_is_refused_by_its_reader() -> None:
    with pytest.raises(BootError, match="header: expected 48 64 72 53, found 00 00 00 00"):
        BzImage(memoryview(bzimage(header=0)))


def test_a_signature_behind_the_image_is_not_part_of_it(mem: GuestMemory) -> None:
    plan = load(mem, bzimage(trailer=b"signed" * 1000), protocol="bzimage")
    assert b"signed" not in mem[PREF : PREF + plan.kernel[1]]


def test_a_setup_of_0_sectors_means_4(mem: GuestMemory) -> None:
    image = bzimage()
    longer = bytearray(image[:0x800] + bytes(0x200) + image[0x800:])
    longer[0x1F1] = 0
    load(mem, bytes(longer))
    assert mem[PREF : PREF + len(CODE)] == CODE


def test_kernel_and_initrd_may_be_files(mem: GuestMemory, tmp_path: Path) -> None:
    kernel, initrd = tmp_path / "vmlinuz", tmp_path / "initrd"
    kernel.write_bytes(bzimage())
    initrd.write_bytes(b"070701")
    plan = load(mem, str(kernel), initrd=initrd)
    assert plan.initrd is not None and mem.read(*plan.initrd) == b"070701"
    assert mem[PREF : PREF + len(CODE)] == CODE


def test_a_file_that_cannot_be_mapped_is_read(mem: GuestMemory, tmp_path: Path) -> None:
    import os
    import threading

    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(bzimage(),))
    writer.start()
    load(mem, pipe)
    writer.join(60)
    assert mem[PREF : PREF + len(CODE)] == CODE


def test_a_plan_reads_as_a_summary(mem: GuestMemory) -> None:
    text = repr(load(mem, bzimage(), initrd=b"070701", cmdline="quiet"))
    for part in ("vmlinux, long64 at 0x200000", "6.1.0-test", "0x20000: quiet", "rsi=0x10000"):
        assert part in text


# -- vmlinux --------------------------------------------------------------------------------------


def test_an_elf_kernel_starts_like_one_that_was_unpacked(mem: GuestMemory) -> None:
    plan = load(mem, vmlinux(pvh=False), cmdline="quiet", initrd=b"070701")
    assert (plan.protocol, plan.mode, plan.entry) == ("vmlinux", "long64", PREF)
    assert mem[PREF : PREF + len(CODE)] == CODE
    assert header(mem, "header") == FIELDS["header"][2] and header(mem, "boot_flag") == 0xAA55
    assert header(mem, "version") == 0x20F and header(mem, "loadflags") == 1
    assert header(mem, "type_of_loader") == 0xFF
    assert at(mem, 0x228) == plan.cmdline_gpa and at(mem, 0x21C) == 6
    assert plan.elf is not None and plan.elf.entry == PREF


def test_protocol_vmlinux_passes_a_pvh_note_over(mem: GuestMemory) -> None:
    assert load(mem, vmlinux(), protocol="vmlinux").protocol == "vmlinux"


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (elf([(PREF, CODE, 4096)], bits=32), r"EI_CLASS\]: expected 2 \(ELF64\) .* found 1"),
        (elf([(0x80000, CODE, 4096)]), "p_paddr: expected segments between 1 MiB and 4 GiB"),
        (elf([(0xFFFFF000, CODE, 8192)]), "p_paddr: expected segments between 1 MiB and 4 GiB"),
        (elf([(0x40000000, CODE, 4096)]), "the kernel: expected RAM at 0x40000000"),
    ],
)
def test_an_elf_kernel_that_cannot_be_linux_is_refused(
    mem: GuestMemory, kernel: bytes, message: str
) -> None:
    with pytest.raises(BootError, match=message):
        load(mem, kernel)


# -- command line and initrd ----------------------------------------------------------------------


def test_the_command_line_is_as_long_as_the_header_allows(mem: GuestMemory) -> None:
    plan = load(mem, bzimage(cmdline_size=100), cmdline=b"x" * 100)
    assert mem.cstring(plan.cmdline_gpa) == b"x" * 100
    with pytest.raises(BootError, match="command line: expected at most 100 bytes, found 101"):
        load(mem, bzimage(cmdline_size=100), cmdline=b"x" * 101)
    with pytest.raises(BootError, match="expected at most 65535 bytes, found 65536"):
        load(mem, bzimage(cmdline_size=1 << 30), cmdline=b"x" * 65536)
    with pytest.raises(BootError, match="expected at most 2047 bytes, found 2048"):
        load(mem, vmlinux(pvh=False), cmdline=b"x" * 2048)


def test_a_nul_in_the_command_line_is_refused() -> None:
    with pytest.raises(BootError, match="command line: expected no NUL, found one at 5"):
        load(FakeMemory((0, RAM)), bzimage(), cmdline="quiet\0init=/x")


def test_bytes_of_a_command_line_come_through_as_the_shell_gave_them(mem: GuestMemory) -> None:
    line = b"a=\xff\xc3\xa9".decode("utf-8", "surrogateescape")
    plan = load(mem, bzimage(), cmdline=line)
    assert mem.cstring(plan.cmdline_gpa) == b"a=\xff\xc3\xa9"


def test_the_initrd_ends_where_the_header_says() -> None:
    mem = FakeMemory((0, 64 << 20))
    plan = load(mem, bzimage(initrd_addr_max=0x1FFFFFF, xloadflags=1), initrd=b"x" * 5000)
    assert plan.initrd == (0x2000000 - 8192, 5000)
    assert mem.writes[0x2000000 - 8192] == b"x" * 5000


def test_an_initrd_that_fits_nowhere_below_goes_above_4_gib_if_the_kernel_can_take_it() -> None:
    mem = FakeMemory((0, 4 << 20), (4 << 30, 16 << 20))
    big = bytes(5 << 20)
    plan = load(mem, bzimage(), initrd=big)
    assert plan.initrd == ((4 << 30) + (11 << 20), 5 << 20)
    page = mem.writes[layout.ZERO_PAGE]
    assert struct.unpack_from("<I", page, 0x0C0) == (1,), "ext_ramdisk_image"
    assert struct.unpack_from("<I", page, 0x218) == (11 << 20,)
    with pytest.raises(BootError, match=r"the initrd: expected 0x500000 bytes of free RAM"):
        load(mem, bzimage(xloadflags=1), initrd=big)


def test_the_initrd_goes_around_the_kernel() -> None:
    mem = FakeMemory((0, PREF + INIT_SIZE + 4096))
    assert load(mem, bzimage(), initrd=b"x").initrd == (PREF + INIT_SIZE, 1)
    assert load(mem, bzimage(), initrd=bytes(4097)).initrd == (PREF - 8192, 4097)
    with pytest.raises(BootError, match=r"found at most 0x100000"):
        load(mem, bzimage(xloadflags=1), initrd=bytes(0x100001))


def test_an_empty_initrd_and_more_than_one_are_refused() -> None:
    mem = FakeMemory((0, RAM))
    with pytest.raises(BootError, match="initrd: expected at least 1 byte, found 0"):
        load(mem, bzimage(), initrd=b"")
    with pytest.raises(BootError, match="initrd: expected one file, found 2"):
        load(mem, bzimage(), initrd=[b"a", b"b"])


def test_too_little_memory_for_what_every_kernel_is_told_is_refused() -> None:
    for size in (0x8000, 0x10000, 0x20000):
        mem = FakeMemory((0, size), (0x200000, 0x100000))
        with pytest.raises(BootError, match=r"expected RAM at|free RAM"):
            load(mem, bzimage())
        assert mem.untouched


def test_a_memory_map_of_ones_own_is_passed_on_and_obeyed(mem: GuestMemory) -> None:
    mine = [(0x100000, 7 << 20, 1), (0, 0x80000, 1), (8 << 20, 1 << 20, 2), (9 << 20, 0, 1)]
    plan = load(mem, bzimage(), e820=mine, initrd=b"x")
    assert [tuple(e) for e in plan.e820] == [mine[1], mine[0], mine[2]], "sorted, without empties"
    assert at(mem, 0x1E8, U8) == 3
    assert plan.initrd == ((8 << 20) - 4096, 1)
    with pytest.raises(BootError, match="e820_table: expected at most 128 entries, found 129"):
        load(mem, bzimage(), e820=[(n << 20, 4096, 1) for n in range(129)])
    with pytest.raises(ValueError, match="no range of 64-bit addresses"):
        load(mem, bzimage(), e820=[(1 << 63, 1 << 63 | 1, 1)])
