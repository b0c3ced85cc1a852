"""Walks of page tables, against KVM's own walker: random tables, KVM_TRANSLATE the judge."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest

from pykvm._abi import ffi
from pykvm.arch.x86_64 import cpuid, modes
from pykvm.arch.x86_64.paging import PageTables
from pykvm.arch.x86_64.walk import NX, translate, walk_sregs
from pykvm.kvm import Kvm, Vcpu, Vm

RAM = 2 << 20
TABLES = 0x10000
# Control registers of each paging mode, on top of what prot32 or long64 sets.
MODES: dict[str, tuple[str, dict[str, int]]] = {
    "32-bit": ("prot32", {"cr0": 0x80010033, "cr4": 0x610, "efer": 0}),
    "pae": ("prot32", {"cr0": 0x80010033, "cr4": 0x620, "efer": 0x800}),
    "4-level": ("long64", {"efer": 0xD00}),
    "5-level": ("long64", {"efer": 0xD00, "cr4": 0x1620}),
}


class Guest:
    """A vCPU with 2 MiB of RAM whose page tables a test writes."""

    def __init__(self, vm: Vm, vcpu: Vcpu, entries: list[Any]) -> None:
        self.memory = mmap.mmap(-1, RAM)
        address = int(ffi.cast("uintptr_t", ffi.from_buffer(self.memory)))
        vm.set_user_memory_region(0, 0, RAM, address, 0)
        vcpu.set_cpuid2(entries)
        self.vcpu, self.phys_bits = vcpu, cpuid.phys_bits(entries)
        self.gigapages = "pdpe1gb" in cpuid.features(entries)
        self.sregs, self.regs = vcpu.get_sregs(), vcpu.get_regs()

    def page(self, mode: str, cr3: int) -> None:
        """Switch paging on; KVM reads PAE's four pointers now, so they must be written before."""
        entry_mode, registers = MODES[mode]
        modes.enter(entry_mode, sregs=self.sregs, regs=self.regs, memory=self.memory, entry=0x8000)
        for name, value in registers.items():
            setattr(self.sregs, name, value)
        self.sregs.cr3 = cr3
        self.vcpu.set_sregs(self.sregs)
        if not self.vcpu.get_sregs().cr0 >> 31 & 1:
            pytest.skip(f"this KVM dropped CR0.PG on KVM_SET_SREGS: it has no {mode} paging")

    def assert_agrees(self, gva: int) -> bool:
        """That KVM and we translate the same; whether it is mapped."""
        answer = self.vcpu.translate(gva)
        ours = walk_sregs(
            self.memory, self.sregs, gva, user=False, phys_bits=self.phys_bits,
            gigapages=self.gigapages,
        )  # fmt: skip
        kvms = answer.physical_address if answer.valid else None
        assert (ours.gpa if ours else None) == kvms, f"KVM says {kvms!r}, we say\n{ours}"
        return bool(ours)


@pytest.fixture
def guest(kvm: Kvm, vm: Vm, vcpu: Vcpu) -> Iterator[Guest]:
    yield Guest(vm, vcpu, kvm.get_supported_cpuid())


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest, kvm: Kvm) -> str:
    if request.param == "5-level" and "la57" not in cpuid.features(kvm.get_supported_cpuid()):
        pytest.skip("KVM_GET_SUPPORTED_CPUID does not offer la57")
    return str(request.param)


def test_what_page_tables_map_kvm_translates_the_same(guest: Guest, mode: str) -> None:
    random = Random(mode)
    tables = PageTables(guest.memory, TABLES, RAM, mode)
    top = 1 << (32 if mode in ("32-bit", "pae") else 47)
    if not guest.gigapages:
        tables.page_sizes = tables.page_sizes[:2]
    starts = [number << 30 for number in random.sample(range(top >> 30), 3)]
    for start in starts:
        size = random.choice(tables.page_sizes)
        gpa = random.randrange(0, 1 << 32, size)
        tables.map(start, gpa, 2 * size if 2 * size <= 1 << 30 else size, page_size=size)
    if top > 1 << 32:
        tables.map((1 << 64) - 0x2000, 0x7000, 0x2000, "r")
        starts.append((1 << 64) - 0x2000)
    guest.page(mode, tables.cr3)
    for start in starts:
        for offset in (0, 0xFFF, 0x1000, 0x1234, 0x1FFFFF, 0x200000, 0x3FFFFF, 0x400123):
            guest.assert_agrees((start + offset) % (1 << 64 if start >= top else top))
        assert translate(guest.memory, guest.sregs, start) is not None


@pytest.mark.parametrize("seed", range(4))
def test_random_entries_lead_kvm_and_us_to_the_same_place(
    guest: Guest, mode: str, seed: int
) -> None:
    """Tables of mostly plausible entries, each pointing at another of a few pages of tables."""
    random = Random(f"{mode} {seed}")
    size = 4 if mode == "32-bit" else 8
    pages = range(TABLES, TABLES + 0x6000, 0x1000)
    guest.page(mode, 0x9000)  # a root of zeros: PAE's pointers must be valid when they are read
    for page in pages:
        for index in range(0x1000 // size):
            entry = random.choice(pages) | random.choice((0x3, 0x7, 0x63, 0x27, 0x2))
            if random.random() < 0.15:  # a large page, of 1 GiB, 4 MiB, or 2 MiB (if 8 bytes)
                entry = random.randrange(4) << random.choice((30, 22, 21)) | 0xE3
            if size == 8 and random.random() < 0.1:
                entry |= random.choice((NX, 1 << 51, 1 << 52, 1 << 20, 1 << 13))
            guest.memory[page + index * size : page + (index + 1) * size] = entry.to_bytes(
                size, "little"
            )
    if mode == "pae":
        for index in range(4):
            at = TABLES + 8 * index
            guest.memory[at : at + 8] = (random.choice(pages[1:]) | index % 2).to_bytes(8, "little")
    guest.page(mode, TABLES)
    bits = {"4-level": 47, "5-level": 56}.get(mode, 32)
    mapped = sum(guest.assert_agrees(random.randrange(1 << bits)) for _ in range(150))
    assert 10 < mapped < 140  # or the tables are not the mixture they are meant to be


def test_tables_outside_ram_lead_nowhere(guest: Guest) -> None:
    guest.page("4-level", RAM)
    guest.assert_agrees(0)
    guest.memory[TABLES : TABLES + 8] = (RAM | 3).to_bytes(8, "little")
    guest.page("4-level", TABLES)
    guest.assert_agrees(0x1234)
