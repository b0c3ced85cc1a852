"""Page tables built in memory, walked, and compared with a plain dict of pages."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykvm.arch.x86_64.paging import PageTables
from pykvm.arch.x86_64.walk import PF, walk

K4, M2, M4, G1 = 1 << 12, 1 << 21, 1 << 22, 1 << 30
RAM = 1 << 20
MODES = ("32-bit", "pae", "4-level", "5-level")


class Model:
    """What a set of page tables means: pages by their first address."""

    def __init__(self) -> None:
        self.pages: dict[int, tuple[int, int, str]] = {}  # gva → (gpa, size, perms)

    def map(self, gva: int, gpa: int, length: int, perms: str, size: int) -> None:
        for offset in range(0, length, size):
            self.pages[gva + offset] = (gpa + offset, size, perms)

    def overlaps(self, gva: int, length: int) -> bool:
        return any(
            start < gva + length and gva < start + size
            for start, (_, size, _) in self.pages.items()
        )

    def find(self, gva: int) -> tuple[int, int, str] | None:
        for start, (gpa, size, perms) in self.pages.items():
            if start <= gva < start + size:
                return gpa + gva - start, size, perms
        return None


@dataclass
class Mapping:
    gva: int
    gpa: int
    pages: int
    size: int
    perms: str


@st.composite
def mappings(draw: st.DrawFn, mode: str) -> list[Mapping]:
    sizes = {"32-bit": (K4, M4), "pae": (K4, M2)}.get(mode, (K4, M2, G1))
    half = {"4-level": 1 << 47, "5-level": 1 << 56}.get(mode, 0)
    perms = st.sampled_from(
        ["rx", "rwx", "rxu", "rwxu"] + ([] if mode == "32-bit" else ["r", "rw", "ru", "rwu"])
    )
    drawn = []
    for _ in range(draw(st.integers(1, 5))):
        size = draw(st.sampled_from(sizes))
        # A few places close together, so that mappings meet, share tables and overlap.
        gva = draw(st.integers(0, 3)) * G1 + draw(st.integers(0, 3)) * M4 * (size <= M4)
        gva += draw(st.integers(0, 5)) * K4 * (size == K4)
        if half and draw(st.booleans()):
            gva += draw(st.sampled_from([half - 8 * G1, (1 << 64) - half, (1 << 64) - 8 * G1]))
        width = 32 if mode == "32-bit" else 52
        gpa = draw(st.integers(0, (1 << width) // size - 8)) * size
        pages = draw(st.integers(1, 4)) if size < G1 else 1
        drawn.append(Mapping(gva, gpa, pages, size, draw(perms)))
    return drawn


def dashed(perms: str) -> str:
    return "".join(letter if letter in perms else "-" for letter in "rwxu")


@pytest.mark.parametrize("mode", MODES)
@given(data=st.data())
def test_walks_through_random_mappings_equal_a_dict(mode: str, data: st.DataObject) -> None:
    memory = bytearray(RAM)
    tables, model = PageTables(memory, 0, RAM, mode), Model()
    for m in data.draw(mappings(mode)):
        length = m.pages * m.size
        if mode in ("32-bit", "pae") and m.gva + length > 1 << 32:
            continue
        if model.overlaps(m.gva, length):
            with pytest.raises(ValueError, match="already mapped"):
                tables.map(m.gva, m.gpa, length, m.perms, m.size)
            # What lies in front of the offending page is mapped: keep the model in step.
            for offset in range(0, length, m.size):
                if model.overlaps(m.gva + offset, m.size):
                    break
                if tables.walk(m.gva + offset).gpa is not None:
                    model.map(m.gva + offset, m.gpa + offset, m.size, m.perms, m.size)
            continue
        tables.map(m.gva, m.gpa, length, m.perms, m.size)
        model.map(m.gva, m.gpa, length, m.perms, m.size)

    probes = {
        address
        for gva, (_, size, _) in model.pages.items()
        for address in (gva - 1, gva, gva + size // 2 + 5, gva + size - 1, gva + size)
    }
    top = 1 << (32 if mode in ("32-bit", "pae") else 64)
    for gva in {address for address in probes if 0 <= address < top}:
        expected, found = model.find(gva), tables.walk(gva)
        if expected is None:
            assert found.gpa is None and found.fault is not None
            continue
        gpa, size, perms = expected
        assert (found.gpa, found.page_size, found.perms) == (gpa, size, dashed(perms))
        for user in (False, True):
            assert bool(tables.walk(gva, "r", user)) == (not user or "u" in perms)
            assert bool(tables.walk(gva, "w", user)) == (
                "w" in perms and (not user or "u" in perms)
            )
            assert bool(tables.walk(gva, "x", user)) == (
                "x" in perms and (not user or "u" in perms)
            )
    assert sum(length for _, _, length, _, _ in tables.ranges()) == sum(
        size for _, size, _ in model.pages.values()
    )
    for gva, gpa, length, perms, size in tables.ranges():
        for offset in range(0, length, size):
            assert model.find(gva + offset) == (gpa + offset, size, perms.replace("-", ""))
    assert repr(tables) and len(tables.tree().splitlines()) == len(model.pages)
    assert tables.needs_nx == any("x" not in perms for _, _, perms in model.pages.values())


def test_identity_takes_the_largest_pages_that_fit() -> None:
    tables = PageTables(bytearray(RAM), 0x1000)
    tables.identity(G1 + M2 + K4)
    assert [entry[3:] for entry in tables.ranges()] == [
        ("rwx-", G1), ("rwx-", M2), ("rwx-", K4)
    ]  # fmt: skip
    assert [tables.walk(gva).gpa for gva in (0, G1 + 5, G1 + M2)] == [0, G1 + 5, G1 + M2]
    assert not tables.walk(G1 + M2 + K4)


def test_pages_climb_to_large_ones_and_down_again() -> None:
    tables = PageTables(bytearray(RAM), 0x1000)
    tables.identity(2 * M2 + K4, start=M2 - K4)
    assert [(length, size) for _, _, length, _, size in tables.ranges()] == [
        (K4, K4), (2 * M2, M2)
    ]  # fmt: skip


def test_four_gib_in_2_mib_pages_take_six_pages_of_tables() -> None:
    tables = PageTables(bytearray(RAM), 0x1000, 0x7000)
    tables.page_sizes = tables.page_sizes[:2]
    tables.identity(4 << 30)
    assert tables.used == (0x1000, 0x7000)
    with pytest.raises(ValueError, match="no room"):
        tables.identity(G1, start=4 << 30)


def test_the_tables_print_as_ranges_and_as_a_tree() -> None:
    tables = PageTables(bytearray(RAM), 0x1000, 0x9000)
    tables.identity(M2, page_size=M2)
    tables.map(0xFFFF_8000_0000_0000, 0x8000, 2 * K4, "rxu")
    assert repr(tables).splitlines() == [
        "PageTables 4-level, CR3 0x1000, 6 of 8 pages used",
        "  0x0000000000000000-0x00000000001fffff → 0x0, 2M pages, rwx-",
        "  0xffff800000000000-0xffff800000001fff → 0x8000, 4K pages, r-xu",
    ]
    assert tables.tree().splitlines()[0] == (
        "PML4[0] → PDPT[0] → PD[0] → 2M page at gpa 0x0 rwx- (gva 0x0)"
    )


def test_what_lay_in_the_tables_memory_before_is_cleared() -> None:
    tables = PageTables(bytearray(b"\xff" * RAM), 0x1000)
    tables.identity(K4, page_size=K4)
    assert tables.ranges() == [(0, 0, K4, "rwx-", K4)]


@pytest.mark.parametrize(
    "arguments, word",
    [
        ((1, 0, K4), "multiples of the 4K"),
        ((0, 1, K4), "multiples of the 4K"),
        ((0, 0, K4 + 1), "multiples of the 4K"),
        ((0, 0, 0), "multiples"),
        ((0, 0, -K4), "multiples"),
        ((0, 0, K4, "rwx", M2), "multiples of the 2M"),
        ((0, 0, K4, "rwx", 8192), "4K, 2M, 1G"),
        ((0, 0, K4, "wx"), "'wx'"),
        ((0, 0, K4, "rz"), "'rz'"),
        (((1 << 47) - K4, 0, 2 * K4), "virtual addresses of 4-level"),
        ((1 << 47, 0, K4), "virtual addresses"),
        (((1 << 64) - K4, 0, 2 * K4), "virtual addresses"),
        ((-K4, 0, K4), "virtual addresses"),
        ((0, 1 << 52, K4), "52 address bits"),
        ((0, -K4, K4), "52 address bits"),
    ],
)
def test_what_cannot_be_mapped_is_refused_before_anything_is(
    arguments: tuple[int, int, int], word: str
) -> None:
    memory = bytearray(RAM)
    tables = PageTables(memory, 0x1000)
    before = bytes(memory)
    with pytest.raises(ValueError, match=word):
        tables.map(*arguments)
    assert memory == before


def test_32_bit_tables_cannot_forbid_execution() -> None:
    with pytest.raises(ValueError, match="cannot forbid"):
        PageTables(bytearray(RAM), 0, mode="32-bit").identity(K4, perms="rw")


@pytest.mark.parametrize(
    "tables, mode, word",
    [(0x1001, "4-level", "4 KiB"), (0, "3-level", "4-level"), (1 << 32, "pae", "32 bits")],
)
def test_a_bad_place_or_mode_is_refused(tables: int, mode: str, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        PageTables(bytearray(RAM), tables, mode=mode)


def test_a_large_page_is_not_split_nor_small_ones_covered() -> None:
    tables = PageTables(bytearray(RAM), 0)
    tables.identity(M2, page_size=M2)
    with pytest.raises(ValueError, match="large page in PD"):
        tables.identity(K4)
    tables.identity(K4, start=M2)
    with pytest.raises(ValueError, match="smaller pages under PD"):
        tables.identity(M2, start=M2, page_size=M2)


def test_a_page_without_rights_faults_with_the_bits_of_the_access() -> None:
    tables = PageTables(bytearray(RAM), 0)
    tables.map(0, 0, K4, "r")
    for access, user, code in (("w", False, 3), ("w", True, 7), ("r", True, 5), ("x", False, 17)):
        fault = tables.walk(0, access, user).fault
        assert fault is not None and (fault.vector, fault.error_code) == (PF, code)


def test_the_registers_that_the_tables_need_translate_the_same() -> None:
    memory = bytearray(RAM)
    tables = PageTables(memory, 0x3000)
    tables.map(0x4000_0000, 0x8000, K4)
    found = walk(memory, 0x4000_0123, cr0=0x80000001, cr3=tables.cr3, cr4=0x20, efer=0x500)
    assert found.gpa == 0x8123
