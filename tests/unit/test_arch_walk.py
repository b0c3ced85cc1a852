"""Walking page tables by hand-made entries: every fault, every mode, and hostile contents."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykvm.arch.x86_64.walk import (
    GP,
    PF,
    Walk,
    canonical,
    paging_mode,
    read_virtual,
    size_name,
    translate,
    walk,
    walk_sregs,
)
from pykvm.errors import ClosedError, GuestMemoryError
from tests.support.states import long64, long64_ring3, real16

PG, WP = 0x80000001, 0x10000
PSE, PAE, LA57, SMEP, SMAP = 0x10, 0x20, 0x1000, 1 << 20, 1 << 21
LMA, NXE = 0x500, 0x800
NX = 1 << 63


class Tables:
    """Entries at addresses; what was not written is not RAM beyond ``ram``."""

    def __init__(self, ram: int = 0x10000) -> None:
        self.memory = bytearray(ram)

    def put(self, gpa: int, entry: int, size: int = 8) -> Tables:
        self.memory[gpa : gpa + size] = entry.to_bytes(size, "little")
        return self


def four_level(
    pt: int = 0x5003, pd: int = 0x4003, pdpt: int = 0x3003, pml4: int = 0x2003
) -> Tables:
    return Tables().put(0x1000, pml4).put(0x2000, pdpt).put(0x3000, pd).put(0x4000, pt)


def go(tables: Tables, gva: int = 0x123, access: str = "r", **registers: int) -> Walk:
    known = {"cr0": PG | WP, "cr3": 0x1000, "cr4": PAE, "efer": LMA, **registers}
    user, ac = bool(known.pop("user", 0)), bool(known.pop("ac", 0))
    bits = known.pop("phys_bits", 52)
    return walk(
        tables.memory, gva, access=access, user=user, ac=ac, phys_bits=bits,
        cr0=known["cr0"], cr3=known["cr3"], cr4=known["cr4"], efer=known["efer"],
    )  # fmt: skip


def fault_of(found: Walk) -> tuple[int, int]:
    assert found.fault is not None and not found
    return found.fault.vector, found.fault.error_code


def test_a_walk_shows_every_step() -> None:
    found = go(four_level())
    assert found.gpa == 0x5123 and found
    assert str(found).splitlines() == [
        "0x123 → gpa 0x5123 (4-level, 4K page, rwx-)",
        "  PML4[0] @ gpa 0x1000 = 0x2003 P W → PDPT @ gpa 0x2000",
        "  PDPT[0] @ gpa 0x2000 = 0x3003 P W → PD @ gpa 0x3000",
        "  PD[0] @ gpa 0x3000 = 0x4003 P W → PT @ gpa 0x4000",
        "  PT[0] @ gpa 0x4000 = 0x5003 P W → 4K page at gpa 0x5000",
    ]


def test_a_walk_that_faults_ends_with_the_reason() -> None:
    found = go(four_level(pd=0x4002))
    assert str(found).splitlines() == [
        "0x123 → no mapping (4-level)",
        "  PML4[0] @ gpa 0x1000 = 0x2003 P W → PDPT @ gpa 0x2000",
        "  PDPT[0] @ gpa 0x2000 = 0x3003 P W → PD @ gpa 0x3000",
        "  PD[0] @ gpa 0x3000 = 0x4002 W",
        "  #PF error code 0x0 (not-present): PD[0] is not present",
    ]


@pytest.mark.parametrize(
    "cr0, cr4, efer, mode",
    [
        (1, PAE, LMA, "none"),
        (PG, 0, 0, "32-bit"),
        (PG, PAE, 0, "pae"),
        (PG, PAE, LMA, "4-level"),
        (PG, PAE | LA57, LMA, "5-level"),
        (PG, PAE | LA57, 0, "pae"),
    ],
)
def test_the_mode_follows_the_control_registers(cr0: int, cr4: int, efer: int, mode: str) -> None:
    assert paging_mode(cr0, cr4, efer) == mode


def test_without_paging_an_address_is_itself() -> None:
    found = go(Tables(), 0x1_2345_6789, cr0=1)
    assert (found.gpa, found.mode, found.levels) == (0x23456789, "none", [])
    assert str(found) == "0x123456789 → gpa 0x23456789 (paging off)"


@pytest.mark.parametrize(
    "entry, level, name",
    [("pml4", 1, "PML4"), ("pdpt", 2, "PDPT"), ("pd", 3, "PD"), ("pt", 4, "PT")],
)
def test_an_entry_that_is_not_present_stops_the_walk(entry: str, level: int, name: str) -> None:
    found = go(four_level(**{entry: 0}), access="w", user=1)
    assert fault_of(found) == (PF, 6)
    assert len(found.levels) == level and found.fault is not None and found.fault.level == name


@pytest.mark.parametrize(
    "entries, bits, nxe",
    [
        ({"pml4": 0x2083}, 52, False),  # PS in a PML4E
        ({"pdpt": 0x2083}, 52, False),  # 1G page with bits 29:13
        ({"pd": 0x2083}, 52, False),  # 2M page with bits 20:13
        ({"pt": NX | 0x5003}, 52, False),  # NX without EFER.NXE
        ({"pd": NX | 0x4003}, 52, False),
        ({"pt": 1 << 40 | 0x5003}, 40, True),  # beyond the physical width
        ({"pml4": 1 << 51 | 0x2003}, 51, True),
    ],
)
def test_reserved_bits_fault_as_such(entries: dict[str, int], bits: int, nxe: bool) -> None:
    found = go(four_level(**entries), phys_bits=bits, efer=LMA | NXE * nxe)
    assert fault_of(found) == (PF, 9)
    assert "reserved" in str(found)


def test_bits_that_software_may_use_are_no_fault() -> None:
    assert go(four_level(pt=0x7FF << 52 | 0xE00 | 0x5003), phys_bits=40).gpa == 0x5123


@pytest.mark.parametrize(
    "access, registers, entries, code",
    [
        ("r", {"user": 1}, {}, 5),
        ("w", {}, {"pt": 0x5001}, 3),
        ("w", {"user": 1}, {"pml4": 0x2005, "pdpt": 0x3007, "pd": 0x4007, "pt": 0x5007}, 7),
        ("x", {"efer": LMA | NXE}, {"pt": NX | 0x5003}, 17),
        ("x", {"efer": LMA | NXE}, {"pdpt": NX | 0x3003}, 17),
        ("x", {"user": 1}, {}, 5),  # without NXE and SMEP a fetch looks like a read
        ("x", {"user": 1, "cr4": PAE | SMEP}, {}, 21),
    ],
)
def test_rights_fault_with_the_bits_the_processor_pushes(
    access: str, registers: dict[str, int], entries: dict[str, int], code: int
) -> None:
    found = go(four_level(**entries), access=access, **registers)
    assert fault_of(found) == (PF, code)
    assert found.gpa == 0x5123  # the page is known all the same


USER = {"pml4": 0x2007, "pdpt": 0x3007, "pd": 0x4007, "pt": 0x5007}


@pytest.mark.parametrize(
    "access, registers, allowed",
    [
        ("x", {"cr4": PAE | SMEP}, False),
        ("x", {"cr4": PAE | SMAP}, True),
        ("r", {"cr4": PAE | SMAP}, False),
        ("w", {"cr4": PAE | SMAP, "ac": 1}, True),
        ("r", {"cr4": PAE | SMEP}, True),
        ("w", {"user": 1, "cr4": PAE | SMAP | SMEP}, True),
        ("x", {"user": 1, "cr4": PAE | SMAP | SMEP}, True),
    ],
)
def test_smep_and_smap_keep_ring_0_off_user_pages(
    access: str, registers: dict[str, int], allowed: bool
) -> None:
    assert bool(go(four_level(**USER), access=access, **registers)) == allowed


def test_ring_0_writes_to_read_only_pages_unless_wp() -> None:
    tables = four_level(pt=0x5001)
    assert go(tables, access="w", cr0=PG)
    assert not go(tables, access="w", cr0=PG | WP)


@pytest.mark.parametrize("gva", [1 << 47, (1 << 64) - (1 << 48), 1 << 63, 1 << 64, -1])
def test_an_address_that_is_not_canonical_is_a_gp(gva: int) -> None:
    found = go(four_level(), gva)
    assert fault_of(found) == (GP, 0) and found.levels == []
    assert "canonical" in str(found)


def test_large_pages_of_long_mode() -> None:
    assert go(four_level(pd=0x200083), 0x1F_F123).gpa == 0x3F_F123
    assert go(four_level(pdpt=0x4000_0083), 0x1234_5678).gpa == 0x5234_5678


def test_a_1_gib_page_is_reserved_where_cpuid_does_not_offer_it() -> None:
    tables = four_level(pdpt=0x83)
    found = walk(tables.memory, 0, cr0=PG, cr3=0x1000, cr4=PAE, efer=LMA, gigapages=False)
    assert fault_of(found) == (PF, 9) and "CPUID does not offer" in str(found)


def test_five_levels() -> None:
    tables = four_level().put(0x6000 + 8 * 3, 0x1003)
    found = go(tables, 3 << 48 | 0x123, cr3=0x6000, cr4=PAE | LA57)
    assert found.gpa == 0x5123 and found.levels[0].name == "PML5"
    assert fault_of(go(tables, 1 << 56, cr3=0x6000, cr4=PAE | LA57)) == (GP, 0)


def test_a_pcid_in_cr3_is_no_part_of_the_address() -> None:
    assert go(four_level(), cr3=0x1FFF).gpa == 0x5123


def test_pae_reads_four_pointers_then_two_levels() -> None:
    tables = Tables().put(0x1020 + 8, 0x3001).put(0x3000, 0x4007).put(0x4008, 0x5007)
    found = go(tables, 0x4000_1234, cr3=0x1020, efer=0)
    assert (found.gpa, found.mode, found.perms) == (0x5234, "pae", "rwxu")
    assert go(tables, 1 << 32 | 0x4000_1234, cr3=0x1020, efer=0).gpa == 0x5234  # 32 bits count
    assert fault_of(go(tables, 0, cr3=0x1020, efer=0)) == (PF, 0)


@pytest.mark.parametrize("bit", [1, 2, 5, 8, 52, 63])
def test_a_pae_pointer_has_reserved_bits_where_others_have_rights(bit: int) -> None:
    tables = Tables().put(0x1000, 0x3001 | 1 << bit)
    assert fault_of(go(tables, efer=NXE)) == (PF, 9)


def test_a_2_mib_page_of_pae() -> None:
    tables = Tables().put(0x1000, 0x3001).put(0x3000, 0x40_0083)
    assert go(tables, 0x12345, efer=0).gpa == 0x41_2345
    assert fault_of(go(Tables().put(0x1000, 0x3001).put(0x3000, 1 << 52 | 0x83), efer=0)) == (PF, 9)


def test_32_bit_tables_have_two_levels_of_4_byte_entries() -> None:
    tables = Tables().put(0x1004, 0x2003, 4).put(0x2008, 0x5001, 4)
    found = go(tables, 0x40_2123, cr4=0, efer=0)
    assert (found.gpa, found.perms, found.mode) == (0x5123, "r-x-", "32-bit")


def test_a_4_mib_page_needs_pse_and_reaches_beyond_4_gib() -> None:
    tables = Tables().put(0x1000, 0x40_0083 | 3 << 13, 4)  # PSE-36: address bits 33:32
    assert go(tables, 0x1_2345, cr4=PSE, efer=0).gpa == 3 << 32 | 0x41_2345
    assert fault_of(go(tables, 0x1_2345, cr4=0, efer=0))[0] == PF  # then PS means nothing
    assert fault_of(go(Tables().put(0x1000, 0x20_0083, 4), cr4=PSE, efer=0)) == (PF, 9)
    assert fault_of(go(tables, cr4=PSE, efer=0, phys_bits=33)) == (PF, 9)


@pytest.mark.parametrize("entry", ["pml4", "pdpt", "pd"])
def test_a_table_outside_ram_is_a_fault_that_says_so(entry: str) -> None:
    found = go(four_level(**{entry: 0x7_0000_0003}))
    assert fault_of(found) == (PF, 0)
    assert "outside RAM" in str(found) and "not RAM" in str(found)


def test_cr3_outside_ram() -> None:
    assert "PML4 at gpa 0x100000 lies outside RAM" in str(go(four_level(), cr3=0x100000))


def test_an_unknown_access_is_the_callers_fault() -> None:
    with pytest.raises(ValueError, match="'rw'"):
        go(four_level(), access="rw")


class Refusing:
    def __init__(self, error: Exception) -> None:
        self.error = error

    def __getitem__(self, _: slice) -> bytes:
        raise self.error


def test_memory_that_refuses_is_no_ram_but_closed_memory_is_an_error() -> None:
    registers: dict[str, Any] = {"cr0": PG, "cr3": 0, "cr4": PAE, "efer": LMA}
    assert walk(Refusing(GuestMemoryError("outside")), 0, **registers).fault is not None
    with pytest.raises(ClosedError):
        walk(Refusing(ClosedError("closed")), 0, **registers)


@pytest.mark.parametrize(
    "address, bits, expected",
    [
        (0, 48, True),
        ((1 << 47) - 1, 48, True),
        (1 << 47, 48, False),
        ((1 << 64) - (1 << 47), 48, True),
        ((1 << 64) - (1 << 47) - 1, 48, False),
        (1 << 47, 57, True),
        (1 << 56, 57, False),
    ],
)
def test_canonical_addresses(address: int, bits: int, expected: bool) -> None:
    assert canonical(address, bits) == expected


def test_sizes_in_words() -> None:
    assert [size_name(n) for n in (4096, 1 << 21, 1 << 22, 1 << 30, 100)] == [
        "4K", "2M", "4M", "1G", "0x64",
    ]  # fmt: skip


WORDS = st.integers(0, (1 << 64) - 1) | st.sampled_from(
    [0, 1, 0x67, 0x83, 0xE7, 0x1003, 0x2003, 0x3007, NX | 0x1007, (1 << 52) - 1]
)


@given(
    entries=st.lists(WORDS, min_size=8, max_size=8),
    gva=WORDS, cr0=WORDS, cr3=WORDS, cr4=WORDS, efer=WORDS,
    access=st.sampled_from("rwx"), user=st.booleans(), phys_bits=st.integers(32, 52),
)  # fmt: skip
def test_no_contents_make_a_walk_raise(
    entries: list[int], gva: int, cr0: int, cr3: int, cr4: int, efer: int, access: str,
    user: bool, phys_bits: int,
) -> None:  # fmt: skip
    page = b"".join(entry.to_bytes(8, "little") for entry in entries) * 64
    found = walk(
        page * 4, gva, cr0=cr0 | 1 << 31, cr3=cr3 & 0x3FFF, cr4=cr4, efer=efer, access=access,
        user=user, phys_bits=phys_bits,
    )  # fmt: skip
    assert str(found)
    assert (found.fault is None) == bool(found)
    if found:
        assert found.gpa is not None and 0 <= found.gpa < 1 << 52
    else:
        assert found.fault is not None and found.fault.reason


def test_the_ring_of_a_walk_is_that_of_the_stack_segment() -> None:
    ring0, ring3 = long64(), long64_ring3()
    assert not walk_sregs(ring0.memory, ring0.sregs, 0x8000).user
    assert walk_sregs(ring3.memory, ring3.sregs, 0x8000).user
    ring3.sregs.cr3 = ring0.sregs.cr3
    assert walk_sregs(ring0.memory, ring3.sregs, 0x8000).fault is not None
    assert walk_sregs(ring0.memory, ring3.sregs, 0x8000, user=False)
    state = real16()
    state.sregs.ss.dpl = 3  # nonsense in real mode, which is always ring 0
    assert not walk_sregs(state.memory, state.sregs, 0).user


def test_translate_ignores_rights() -> None:
    state = long64()
    state.sregs.cr4 |= SMAP
    assert translate(state.memory, state.sregs, 0x8123) == 0x8123
    assert translate(state.memory, state.sregs, 1 << 47) is None


def test_virtual_reads_cross_pages_and_stop_where_ram_or_the_mapping_ends() -> None:
    state = long64()
    state.memory[0x8FFE:0x9002] = b"abcd"
    assert read_virtual(state.memory, state.sregs, 0x8FFE, 4) == b"abcd"
    end = len(state.memory)
    assert read_virtual(state.memory, state.sregs, end - 3, 10) == bytes(3)
    assert read_virtual(state.memory, state.sregs, end, 10) == b""
    assert read_virtual(state.memory, state.sregs, 4 << 30, 10) == b""
    assert read_virtual(state.memory, state.sregs, 0x8000, 0) == b""
