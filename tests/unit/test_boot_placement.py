"""Who gets which addresses; the memory map; the layout; giving pages back."""

from __future__ import annotations

import itertools
import os
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykvm.arch.x86_64 import layout as cpu
from pykvm.arch.x86_64 import pc
from pykvm.boot import layout
from pykvm.boot.e820 import E820, RAM, RESERVED, memory_map, normalized, ram_below
from pykvm.boot.image import nonzero
from pykvm.boot.placement import Placement
from pykvm.errors import BootError
from pykvm.memory import GuestMemory
from tests.support.kernels import FakeMemory, FakeRegion

MIB = 1 << 20


def placement(*regions: tuple[int, int]) -> Placement:
    mem = FakeMemory(*(regions or ((0, 16 * MIB),)))
    return Placement(mem, memory_map(mem.regions))


# -- claims ----------------------------------------------------------------------------------------


def test_two_claims_may_touch_but_not_overlap_and_the_message_names_both() -> None:
    made = placement()
    made.claim(0x1000, 0x1000, "first")
    made.claim(0x2000, 0x1000, "second")
    made.claim(0, 0x1000, "third")
    with pytest.raises(
        BootError, match=r"fourth: expected 0x1fff\.\.0x1fff to be free, found first"
    ):
        made.claim(0x1FFF, 1, "fourth")


def test_a_claim_must_be_ram_to_its_end_over_regions_that_adjoin() -> None:
    made = placement((0, MIB), (MIB, MIB), (3 * MIB, MIB))
    made.claim(MIB - 4096, 8192, "across")
    with pytest.raises(
        BootError, match=r"beyond: expected RAM .* found a hole or a ROM at 0x200000"
    ):
        made.claim(2 * MIB - 1, 2, "beyond")
    with pytest.raises(BootError, match="found a hole or a ROM at 0x280000"):
        made.claim(0x280000, 1, "nowhere")


@pytest.mark.parametrize(("gpa", "length"), [(16 * MIB - 1, 2), (16 * MIB, 1), (1 << 40, MIB)])
def test_what_lies_above_all_ram_needs_more_of_it(gpa: int, length: int) -> None:
    found = r"kernel: expected RAM at .*, found its end at 0x1000000: the machine needs more memory"
    with pytest.raises(BootError, match=found):
        placement((0, 15 * MIB), (15 * MIB, MIB)).claim(gpa, length, "kernel")


def test_a_rom_is_no_ram() -> None:
    with GuestMemory(MIB) as mem:
        mem.add(MIB, MIB, readonly=True)
        made = Placement(mem, memory_map(mem.regions))
        with pytest.raises(BootError, match="found a hole or a ROM at 0x100000"):
            made.claim(MIB - 4096, 8192, "kernel")
        assert not made.is_free(MIB, 1) and made.is_free(MIB - 1, 1)
        with pytest.raises(BootError, match="free RAM"):
            made.highest(4096, "initrd", start=MIB)


def test_nothing_is_written_before_the_commit_and_zeros_come_first() -> None:
    mem = FakeMemory((0, MIB))
    made = Placement(mem, memory_map(mem.regions))
    made.put(made.claim(0x1000, 4, "a"), b"data")
    made.clear(0x1000, 0x1000)
    assert mem.untouched
    made.commit()
    assert mem.cleared == [(0x1000, 0x1000)] and mem.writes == {0x1000: b"data"}


def test_highest_and_lowest_go_around_what_is_taken() -> None:
    made = placement()
    made.claim(15 * MIB, MIB, "top")
    assert made.highest(5000, "a") == 15 * MIB - 8192
    assert made.highest(1, "b", limit=0x100000) == 0x9F000
    assert made.highest(0xC01, "b", limit=0x100000) == 0x9E000, "RAM ends at 0x9fc00"
    assert made.lowest(5000, "c", start=0x1001) == 0x2000
    assert made.lowest(0x1000, "d", start=0x1001) == 0x4000
    assert made.lowest(1, "e") == 0
    with pytest.raises(BootError, match=r"f: expected 0x10000000 bytes of free RAM in 0x0\.\."):
        made.highest(16 * MIB * 16, "f")


@given(st.data())
def test_what_is_given_out_is_free_ram_and_never_given_twice(data: st.DataObject) -> None:
    edges = sorted(data.draw(st.sets(st.integers(0, 400), min_size=2, max_size=8)))
    regions = [(a << 12, (b - a) << 12) for a, b in list(itertools.pairwise(edges))[::2]]
    mem = FakeMemory(*regions)
    made = Placement(mem, e820 := memory_map(mem.regions))
    given_out: list[tuple[int, int]] = []
    for _ in range(data.draw(st.integers(1, 12))):
        size = data.draw(st.integers(1, 0x30000))
        low = data.draw(st.integers(0, 400)) << 12
        limit = low + (data.draw(st.integers(0, 400)) << 12)
        up = data.draw(st.booleans())
        try:
            gpa = (made.highest if up else made.lowest)(size, "x", start=low, limit=limit)
        except BootError:
            # It says the truth: no page-aligned place is left.
            for at in range(low + -low % 4096, limit - size + 1, 4096):
                free = all(at + size <= a or b <= at for a, b in given_out)
                ram = any(e.type == RAM and e.base <= at and at + size <= e.end for e in e820)
                assert not (free and ram), hex(at)
            continue
        assert low <= gpa and gpa + size <= limit and gpa % 4096 == 0
        assert any(e.type == RAM and e.base <= gpa and gpa + size <= e.end for e in e820)
        assert all(gpa + size <= a or b <= gpa for a, b in given_out)
        given_out.append((gpa, gpa + size))


# -- the memory map --------------------------------------------------------------------------------


def test_the_map_has_a_pcs_first_megabyte_whatever_the_regions() -> None:
    expected = [
        (0, 0x9FC00, RAM),
        (0x9FC00, 0x400, RESERVED),
        (0xE0000, 0x20000, RESERVED),
        (MIB, MIB, RAM),
    ]
    whole = memory_map([FakeRegion(0, 2 * MIB)])
    assert [tuple(entry) for entry in whole] == expected
    assert memory_map([FakeRegion(0, MIB), FakeRegion(MIB, MIB)]) == whole
    assert memory_map([FakeRegion(0, 0x9F000), FakeRegion(0x9F000, 2 * MIB - 0x9F000)]) == whole
    small = memory_map([FakeRegion(0, 0x8000)])
    assert [tuple(entry) for entry in small] == [(0, 0x8000, RAM)]


def test_a_rom_is_reserved_and_a_hole_is_left_out() -> None:
    regions = [FakeRegion(MIB, MIB), FakeRegion(4 * MIB, MIB), FakeRegion(5 * MIB, MIB, True)]
    assert [tuple(entry) for entry in memory_map(regions)] == [
        (MIB, MIB, RAM),
        (4 * MIB, MIB, RAM),
        (5 * MIB, MIB, RESERVED),
    ]


def test_entries_say_what_they_are() -> None:
    assert repr(E820(0, 0x9FC00, 1)) == "<E820 0x0-0x9fbff RAM>"
    assert repr(E820(0x1000, 0x1000, 12)) == "<E820 0x1000-0x1fff type 12>"
    assert normalized([(8, 1, 2), (0, 0, 1), (0, 8, 1)]) == [E820(0, 8, 1), E820(8, 1, 2)]


def test_ram_below_a_gap() -> None:
    entries = [E820(0, 8, 1), E820(8, 8, 1), E820(16, 4, 2), E820(20, 8, 1)]
    assert ram_below(entries, 0) == 16 and ram_below(entries, 4) == 12
    assert ram_below(entries, 16) == 0 and ram_below(entries, 20) == 8 and ram_below([], 0) == 0


# -- the layout ------------------------------------------------------------------------------------


def test_nothing_in_the_layout_overlaps() -> None:
    ranges = [
        (layout.CPU_TABLES + cpu.GDT, layout.CPU_TABLES + cpu.END),
        (layout.ZERO_PAGE, layout.ZERO_PAGE + layout.PAGE),
        (layout.PVH_INFO, layout.CMDLINE),
        (layout.CMDLINE, layout.CMDLINE + layout.CMDLINE_SIZE),
        (layout.EBDA, layout.VGA),
        (layout.VGA, layout.RSDP),
        (layout.RSDP, layout.ACPI_END),
        (layout.HIGH_MEMORY, layout.PCI_HOLE),
        (layout.PCI_HOLE, layout.PCI_HOLE_END),
    ]
    for (_, end), (start, _) in itertools.pairwise(ranges):
        assert end <= start, hex(start)


def test_the_drawing_has_the_numbers_of_the_constants() -> None:
    drawn = {
        int(number, 16) for number in re.findall(r"^    (0x[0-9a-f]+)", layout.__doc__ or "", re.M)
    }
    assert drawn == {
        layout.BIOS_DATA,
        cpu.GDT,
        layout.ZERO_PAGE,
        layout.PVH_INFO,
        layout.CMDLINE,
        layout.EBDA,
        layout.VGA,
        layout.RSDP,
        pc.MP_BASE,
        layout.HIGH_MEMORY,
        layout.PCI_HOLE,
        layout.PCI_HOLE_END,
    }


def test_ram_goes_around_the_pci_hole() -> None:
    gib = layout.GIB
    assert layout.ram_ranges(3 * gib) == [(0, 3 * gib)]
    assert layout.ram_ranges(3 * gib + 4096) == [(0, 3 * gib), (4 * gib, 4096)]
    assert sum(size for _, size in layout.ram_ranges(7 * gib)) == 7 * gib


# -- zeros -----------------------------------------------------------------------------------------


@given(st.data(), st.integers(0, 1 << 18))
def test_what_is_left_out_is_zero_and_the_rest_is_whole(data: st.DataObject, gpa: int) -> None:
    body = bytearray(data.draw(st.integers(0, 5 << 16)))
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, max(len(body) - 1, 0)))
        body[at : at + 1] = b"\x01"[: len(body) - at]
    again = bytearray(len(body))
    last = -1
    for start, run in nonzero(gpa, memoryview(bytes(body))):
        assert start - gpa > last, "sorted and apart"
        again[start - gpa : start - gpa + len(run)] = run
        last = start - gpa + len(run)
    assert again == body and len(again) == len(body)


def test_zeros_in_a_large_file_are_not_copied() -> None:
    body = b"a" + bytes(10 * MIB) + b"b"
    runs = list(nonzero(0x1000, memoryview(body)))
    assert sum(len(run) for _, run in runs) <= 2 << 16


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_a_large_fill_with_zeros_gives_pages_back_and_a_small_one_next_to_it_does_not() -> None:
    with GuestMemory("64M") as mem:
        mem.fill(0, 64 * MIB, 0xCC)
        full = resident()
        mem.fill(0x1001, 32 * MIB)
        assert full - resident() > 30 * MIB
        assert mem[0:0x1001] == b"\xcc" * 0x1001
        assert not any(mem[0x1001 : 0x1001 + 32 * MIB])
        assert mem[0x1001 + 32 * MIB] == 0xCC
        view = mem.view(0x2000, 4)
        mem.u32[0x2000] = 7
        assert bytes(view) == b"\7\0\0\0", "a view is of the same memory still"


@pytest.mark.parametrize("kind", ["memfd", "file", "locked"])
def test_memory_that_cannot_be_given_back_is_written(kind: str, tmp_path: Any) -> None:
    with GuestMemory() as mem:
        if kind == "memfd":
            mem.add_memfd(0, 4 * MIB)
        elif kind == "file":
            (tmp_path / "image").write_bytes(b"\xaa" * 4 * MIB)
            mem.add_file(0, tmp_path / "image")
        else:
            import ctypes

            region = mem.add(0, 4 * MIB)
            libc = ctypes.CDLL(None, use_errno=True)
            address = ctypes.c_void_p(region.userspace_addr)
            if libc.mlock(address, ctypes.c_size_t(4 * MIB)):
                pytest.skip(f"mlock of 4 MiB: {os.strerror(ctypes.get_errno())}")
        mem.fill(0, 4 * MIB, 0xCC)
        mem.fill(0x800, 3 * MIB)
        assert mem[0:0x800] == b"\xcc" * 0x800
        assert not any(mem[0x800 : 0x800 + 3 * MIB])
        assert mem[0x800 + 3 * MIB : 4 * MIB] == b"\xcc" * (MIB - 0x800)
