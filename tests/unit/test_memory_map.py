"""The map: where regions may lie, which slot they get, how it is shown, and who hears of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pykvm._abi import lib
from pykvm.errors import ClosedError, GuestMemoryError
from pykvm.memory import GuestMemory, Region


@pytest.fixture
def mem() -> Iterator[GuestMemory]:
    with GuestMemory() as made:
        yield made


def test_a_size_alone_is_ram_from_zero() -> None:
    with GuestMemory("2M") as mem:
        (region,) = mem.regions
        assert (region.slot, region.guest_phys_addr, region.memory_size) == (0, 0, 2 << 20)
        assert (region.end, region.flags, region.kind, region.fd) == (2 << 20, 0, "anonymous", -1)
        assert region.userspace_addr % 4096 == 0
        assert mem.size == 2 << 20


def test_regions_are_sorted_by_gpa_and_take_the_lowest_free_slot(mem: GuestMemory) -> None:
    mem.add(0x8000, "4K")
    mem.add(0, "8K", slot=5)
    mem.add(0x4000, "4K", slot=1)
    mem.add(0x10000, "4K")
    assert [(r.guest_phys_addr, r.slot) for r in mem.regions] == [
        (0, 5), (0x4000, 1), (0x8000, 0), (0x10000, 2),
    ]  # fmt: skip
    assert mem.size == 0x5000


@pytest.mark.parametrize(
    ("gpa", "size"),
    [(0x2000, 0x1000), (0x1000, 0x2000), (0x3000, 0x2000), (0, 0x10000), (0x2000, 0x2000)],
)
def test_an_overlap_is_refused_and_both_regions_are_named(
    mem: GuestMemory, gpa: int, size: int
) -> None:
    mem.add(0x2000, 0x2000, name="first")
    with pytest.raises(ValueError, match=r"overlaps") as caught:
        mem.add(gpa, size)
    assert f"{gpa:#x}-{gpa + size - 1:#x}" in str(caught.value)
    assert "0x2000-0x3fff 8K anonymous, slot 0, 'first'" in str(caught.value)
    assert len(mem.regions) == 1


def test_regions_may_adjoin(mem: GuestMemory) -> None:
    mem.add(0x2000, 0x1000)
    mem.add(0x1000, 0x1000)
    mem.add(0x3000, 0x1000)
    assert mem.covers(0x1000, 0x3000)


@pytest.mark.parametrize(
    ("gpa", "size", "message"),
    [
        (0x123, 0x1000, "gpa 0x123 is not a multiple of the page size 0x1000.*0x1000"),
        (0, 0x1001, "size 0x1001 is not a multiple of the page size 0x1000.*0x2000"),
        (0, 0, "no bytes"),
        (-0x1000, 0x2000, "not within the 52 bits"),
        (1 << 52, 0x1000, "not within the 52 bits"),
        ((1 << 52) - 0x1000, 0x2000, "not within the 52 bits"),
        ((1 << 64) - 0x1000, 0x2000, "not within the 52 bits"),
        (0, 1 << 64, "not within the 52 bits"),
        (0, "2Q", "is not a size"),
    ],
)
def test_a_region_that_cannot_be_is_refused_in_words(
    mem: GuestMemory, gpa: int, size: int | str, message: str
) -> None:
    for add in (mem.add, mem.add_memfd):
        with pytest.raises(ValueError, match=message):
            add(gpa, size)
    assert mem.regions == ()


@pytest.mark.parametrize("gpa", [True, 0.0, "0", None])
def test_a_gpa_that_is_no_int_is_a_type_error(mem: GuestMemory, gpa: object) -> None:
    with pytest.raises(TypeError, match="a gpa must be an int"):
        mem.add(gpa, 0x1000)  # type: ignore[arg-type]


def test_a_size_the_host_cannot_map_names_it(mem: GuestMemory) -> None:
    with pytest.raises(OSError, match=r"cannot map 2048T of memory: Cannot allocate memory"):
        mem.add(0, "2048T")


def test_a_slot_is_used_once_and_fits_sixteen_bits(mem: GuestMemory) -> None:
    mem.add(0, "4K", slot=3)
    with pytest.raises(ValueError, match=r"slot 3 is in use by the region 0x0-0xfff"):
        mem.add(0x1000, "4K", slot=3)
    for slot in (-1, 1 << 16):
        with pytest.raises(ValueError, match=r"not within 0..65535"):
            mem.add(0x1000, "4K", slot=slot)
    mem.add(0x1000, "4K", slot=0xFFFF)


def test_flags_are_those_of_kvm(mem: GuestMemory) -> None:
    plain = mem.add(0, "4K")
    rom = mem.add(0x1000, "4K", readonly=True, log_dirty=True)
    assert plain.flags == 0
    plain.log_dirty = True
    assert plain.flags == lib.KVM_MEM_LOG_DIRTY_PAGES == 1
    assert rom.flags == lib.KVM_MEM_READONLY | lib.KVM_MEM_LOG_DIRTY_PAGES == 3


def test_a_region_is_found_by_any_of_its_addresses(mem: GuestMemory) -> None:
    regions = [mem.add(n * 0x4000, 0x2000) for n in range(9)]
    for region in regions:
        start = region.guest_phys_addr
        assert mem.region_at(start) is mem.region_at(start + 0x1FFF) is region
        assert start in mem and start + 0x1FFF in mem
        assert start + 0x2000 not in mem
        with pytest.raises(GuestMemoryError, match=f"{start + 0x2000:#x} is outside RAM"):
            mem.region_at(start + 0x2000)
    assert -1 not in mem and (1 << 64) not in mem


def test_the_repr_is_the_map(mem: GuestMemory) -> None:
    mem.add(0, "2M")
    mem.add(0xFFFC0000, "256K", readonly=True, name="bios")
    assert repr(mem) == (
        "<GuestMemory 2304K in 2 regions\n"
        "  0x0-0x1fffff 2M anonymous, slot 0\n"
        "  0xfffc0000-0xffffffff 256K anonymous, slot 1, read-only, 'bios'>"
    )
    assert repr(mem.regions[0]) == "<Region 0x0-0x1fffff 2M anonymous, slot 0>"
    assert repr(mem.u32).startswith("<u32 words of RAM is 0x0-0x1fffff")
    mem.close()
    assert repr(mem).startswith("<GuestMemory closed, was 2304K in 2 regions")


def test_an_error_shows_the_map(mem: GuestMemory) -> None:
    with pytest.raises(GuestMemoryError, match=r"^0x0..0x2 is outside RAM; there is no RAM$"):
        mem[0:2]
    mem.add(0, "2M")
    with pytest.raises(GuestMemoryError) as caught:
        mem.u32[0x200000]
    assert str(caught.value) == (
        "0x200000..0x200004 is outside RAM; RAM is 0x0-0x1fffff 2M anonymous, slot 0"
    )
    assert (caught.value.gpa, caught.value.length) == (0x200000, 4)
    with pytest.raises(GuestMemoryError, match=r"^0x1ffffe..0x200002 leaves RAM at 0x200000; "):
        mem.u32[0x1FFFFE]


def test_an_error_in_a_long_map_shows_the_regions_around_it(mem: GuestMemory) -> None:
    for n in range(30):
        mem.add(n * 0x2000, "4K")
    for n in (0, 14, 29):
        with pytest.raises(GuestMemoryError, match=r"; and 22 more$") as caught:
            mem.u8[n * 0x2000 + 0x1000]
        assert f"{n * 0x2000:#x}-" in str(caught.value)
        assert str(caught.value).count("slot") == 8


class TestAttach:
    def test_the_machine_hears_of_regions_before_and_after(self, mem: GuestMemory) -> None:
        heard: list[Region] = []
        first = mem.add(0, "4K")
        mem.attach(heard.append)
        second = mem.add(0x1000, "4K")
        assert heard == [first, second]
        mem.detach(heard.append)
        mem.add(0x2000, "4K")
        mem.detach(heard.append)
        assert heard == [first, second]

    def test_a_refused_region_is_taken_back(
        self, mem: GuestMemory, recwarn: pytest.WarningsRecorder, no_leak: None
    ) -> None:
        def refuse(region: Region) -> None:
            if region.guest_phys_addr:
                raise OSError("no slots left")

        mem.add(0, "4K")
        mem.attach(refuse)
        with pytest.raises(OSError, match="no slots left"):
            mem.add_memfd(0x1000, "4K")
        assert len(mem.regions) == 1
        assert 0x1000 not in mem
        assert not recwarn.list  # it was closed, not left to the garbage collector

    def test_a_machine_that_refuses_what_there_is_is_not_attached(self, mem: GuestMemory) -> None:
        def refuse(region: Region) -> None:
            raise OSError("no")

        mem.add(0, "4K")
        with pytest.raises(OSError, match="no"):
            mem.attach(refuse)
        mem.add(0x1000, "4K")


def test_a_closed_memory_takes_no_region() -> None:
    mem = GuestMemory("4K")
    mem.close()
    for act in (
        lambda: mem.add(0x1000, "4K"),
        lambda: mem.add_memfd(0x1000, "4K"),
        lambda: mem.add_file(0x1000, "/dev/zero"),
        lambda: mem.attach(print),
        lambda: mem.region_at(0),
        lambda: mem.covers(0),
        lambda: mem.regions[0].userspace_addr,
        lambda: mem.regions[0].view(),
        lambda: mem.regions[0].cells(1),
        lambda: mem.regions[0].read_window(),
    ):
        with pytest.raises((ClosedError, ValueError)):
            act()
