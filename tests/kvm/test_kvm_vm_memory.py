"""VM ioctls about memory: slots, read-only and private memory, dirty pages, coalesced writes."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable

import pytest

from pykvm import kvm as k
from pykvm._abi import ffi
from pykvm.errors import KvmError
from pykvm.kvm import Kvm, Vcpu, Vm, exits, rings
from tests.support.tiny_guest import Ram, enter_real_mode, ram, start

RequireCap = Callable[..., int]
WRITE_5000_AND_9000 = "b0aa a20050 a20090 f4"  # mov al, 0xaa; mov [0x5000], al; …; hlt


def test_the_guest_sees_the_memory_of_its_slot(vm: Vm, vcpu: Vcpu) -> None:
    with ram(vm) as memory:
        memory[0x2000] = b"\x29"
        start(vcpu, memory, "a00020 fec0 a20120 f4")  # mov al, [2000]; inc al; mov [2001], al; hlt
        assert vcpu.run() == exits.HltExit()
        assert memory.read(0x2000, 2) == b"\x29\x2a"


def test_slots_that_overlap_or_are_misaligned_are_refused_in_words(vm: Vm) -> None:
    with ram(vm) as memory:
        with pytest.raises(KvmError, match="overlaps another slot"):
            vm.set_user_memory_region(1, 0x8000, 0x10000, memory.address)
        with pytest.raises(KvmError, match="guest_phys_addr 0x100001 is not a multiple of 4096"):
            vm.set_user_memory_region(1, 0x100001, 0x1000, memory.address)
        with pytest.raises(KvmError, match="slot 0 has 0x10000 bytes already: delete it first"):
            vm.set_user_memory_region(0, 0, 0x8000, memory.address)
        vm.set_user_memory_region(0, 0x40000, 0x10000, memory.address)  # moved
        vm.set_user_memory_region(0, 0x40000, 0, 0)  # deleted
        vm.set_user_memory_region(0, 0, 0x8000, memory.address)  # and made anew, smaller


@pytest.mark.cap("KVM_CAP_READONLY_MEM")
def test_a_write_to_read_only_memory_exits_and_does_not_land(vm: Vm, vcpu: Vcpu) -> None:
    with ram(vm) as memory, ram(vm, 0x1000, 1, 0xD0000, k.KVM_MEM_READONLY) as rom:
        rom[0x10] = b"\x99"
        # mov ax, 0xd000; mov ds, ax; mov al, [0x10]; inc al; mov [0x10], al; hlt
        start(vcpu, memory, "b800d0 8ed8 a01000 fec0 a21000 f4")
        assert vcpu.run() == exits.MmioExit(0xD0010, 1, True, b"\x9a")
        assert vcpu.run() == exits.HltExit()
        assert rom.read(0x10, 1) == b"\x99"


@pytest.mark.cap("KVM_CAP_USER_MEMORY2")
def test_a_slot_of_the_second_kind_works_like_the_first(vm: Vm, vcpu: Vcpu) -> None:
    memory = Ram()
    vm.set_user_memory_region2(0, 0, memory.size, memory.address)
    start(vcpu, memory, "b041 e6e9")
    assert vcpu.run() == exits.IoExit(0xE9, 1, 1, True, b"A")
    with pytest.raises(KvmError, match="overlaps"):
        vm.set_user_memory_region2(1, 0, memory.size, memory.address)
    vm.set_user_memory_region2(0, 0, 0, 0)
    memory.close()


@pytest.mark.cap("KVM_CAP_GUEST_MEMFD")
def test_a_guest_memfd_has_the_size_asked_for(vm: Vm) -> None:
    fd = vm.create_guest_memfd(0x20000)
    try:
        assert os.fstat(fd).st_size == 0x20000
        assert not os.get_inheritable(fd)
    finally:
        os.close(fd)
    with pytest.raises(KvmError, match="multiple of 4096"):
        vm.create_guest_memfd(1)


@pytest.mark.cap("KVM_CAP_GUEST_MEMFD_FLAGS", 3)
def test_a_guest_memfd_that_can_be_mapped_is_guest_memory(vm: Vm, vcpu: Vcpu) -> None:
    fd = vm.create_guest_memfd(0x10000, k.GUEST_MEMFD_FLAG_MMAP | k.GUEST_MEMFD_FLAG_INIT_SHARED)
    memory = mmap.mmap(fd, 0x10000)
    view = ffi.from_buffer("char[]", memory)
    try:
        address = int(ffi.cast("uintptr_t", view))
        vm.set_user_memory_region2(0, 0, 0x10000, address, k.KVM_MEM_GUEST_MEMFD, fd, 0)
        memory[0x1000:0x1004] = bytes.fromhex("b05ae6e9")
        enter_real_mode(vcpu)
        assert vcpu.run() == exits.IoExit(0xE9, 1, 1, True, b"Z")
        vm.set_user_memory_region2(0, 0, 0, 0)
    finally:
        ffi.release(view)
        memory.close()
        os.close(fd)


def test_private_memory_can_be_asked_for(kvm: Kvm, require_cap: RequireCap) -> None:
    types = require_cap("KVM_CAP_VM_TYPES", at_least=2)
    with kvm.create_vm(types.bit_length() - 1) as vm:
        attributes = require_cap("KVM_CAP_MEMORY_ATTRIBUTES", of=vm)
        vm.set_memory_attributes(0, 0x10000, attributes & k.KVM_MEMORY_ATTRIBUTE_PRIVATE)
        vm.set_memory_attributes(0, 0x10000, 0)
        with pytest.raises(KvmError, match="misaligned"):
            vm.set_memory_attributes(1, 0x1000, 0)


# -- dirty pages ---------------------------------------------------------------------------------


def test_a_dirty_log_names_the_pages_written_and_forgets_them(vm: Vm, vcpu: Vcpu) -> None:
    with ram(vm, flags=k.KVM_MEM_LOG_DIRTY_PAGES) as memory:
        start(vcpu, memory, WRITE_5000_AND_9000)
        assert vcpu.run() == exits.HltExit()
        log = vm.get_dirty_log(0)
        assert len(log) == 8
        assert {5, 9} <= set(rings.dirty_pages(log))
        assert not {5, 9} & set(rings.dirty_pages(vm.get_dirty_log(0)))
        enter_real_mode(vcpu)
        assert vcpu.run() == exits.HltExit()
        assert {5, 9} <= set(rings.dirty_pages(vm.get_dirty_log(0)))


def test_a_slot_that_does_not_log_says_so(vm: Vm) -> None:
    with ram(vm), pytest.raises(KvmError, match="KVM_MEM_LOG_DIRTY_PAGES"):
        vm.get_dirty_log(0)


@pytest.mark.cap("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2")
def test_a_dirty_log_cleared_by_hand_keeps_its_pages_until_then(vm: Vm, vcpu: Vcpu) -> None:
    vm.enable_cap("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2", k.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE)
    with ram(vm, flags=k.KVM_MEM_LOG_DIRTY_PAGES) as memory:
        start(vcpu, memory, WRITE_5000_AND_9000)
        assert vcpu.run() == exits.HltExit()
        for _ in range(2):
            assert {5, 9} <= set(rings.dirty_pages(vm.get_dirty_log(0)))
        vm.clear_dirty_log(0, (1 << 5).to_bytes(8, "little"))
        left = rings.dirty_pages(vm.get_dirty_log(0))
        assert 5 not in left
        assert 9 in left
        enter_real_mode(vcpu)
        assert vcpu.run() == exits.HltExit()
        assert 5 in rings.dirty_pages(vm.get_dirty_log(0))
        with pytest.raises(KvmError, match="multiple of 64"):
            vm.clear_dirty_log(0, bytes(8), first_page=1, num_pages=1)


def test_a_dirty_ring_names_the_pages_written(kvm: Kvm, require_cap: RequireCap) -> None:
    name = "KVM_CAP_DIRTY_LOG_RING_ACQ_REL"
    if not kvm.check_extension(name):
        name = "KVM_CAP_DIRTY_LOG_RING"
        require_cap(name, at_least=4096)
    with kvm.create_vm() as vm:
        vm.enable_cap(name, 4096)
        with vm.create_vcpu(0) as vcpu, ram(vm, flags=k.KVM_MEM_LOG_DIRTY_PAGES) as memory:
            start(vcpu, memory, WRITE_5000_AND_9000)
            with vcpu.dirty_ring(4096) as ring:
                assert vcpu.run() == exits.HltExit()
                pages = ring.harvest()
                assert {(0, 5), (0, 9)} <= set(pages)
                assert ring.harvest() == []
                assert vm.reset_dirty_rings() == len(pages)
                enter_real_mode(vcpu)
                assert vcpu.run() == exits.HltExit()
                assert {(0, 5), (0, 9)} <= set(ring.harvest())
            with pytest.raises(KvmError, match="rings"):
                vm.get_dirty_log(0)


def test_a_full_dirty_ring_exits_and_goes_on_after_a_reset(
    kvm: Kvm, require_cap: RequireCap
) -> None:
    name = "KVM_CAP_DIRTY_LOG_RING_ACQ_REL"
    if not kvm.check_extension(name):
        name = "KVM_CAP_DIRTY_LOG_RING"
        require_cap(name, at_least=4096)
    with kvm.create_vm() as vm:
        vm.enable_cap(name, 4096)  # 256 places, some of them KVM's reserve
        with (
            vm.create_vcpu(0) as vcpu,
            ram(vm, 0x1000000, flags=k.KVM_MEM_LOG_DIRTY_PAGES) as memory,
            vcpu.dirty_ring(4096) as ring,
        ):
            # A store into each of 4096 pages: mov [bx], al with DS moving on by 0x100 paragraphs.
            # mov cx, 0xff; l: add dx, 0x100; mov ds, dx; mov [bx], al; loop l; twice, then hlt
            start(vcpu, memory, "b9ef00 81c20001 8eda 8807 e2f6 f4", rdx=0x1000, rbx=0)
            seen: set[tuple[int, int]] = set()
            exit = vcpu.run()
            while isinstance(exit, exits.DirtyRingFullExit):
                pages = ring.harvest()
                assert pages
                seen.update(pages)
                assert vm.reset_dirty_rings() == len(pages)
                exit = vcpu.run()
            assert exit == exits.HltExit()
            seen.update(ring.harvest())
            assert {(0, 0x11 + n) for n in range(0xEF)} <= seen


# -- the rest --------------------------------------------------------------------------------------


@pytest.mark.cap("KVM_CAP_COALESCED_MMIO")
def test_coalesced_writes_wait_without_an_exit(vm: Vm, vcpu: Vcpu) -> None:
    vm.register_coalesced_mmio(0xD0000, 0x1000)
    with ram(vm) as memory:
        # mov ax, 0xd000; mov ds, ax; mov al, 0x55; mov [0x10], al; mov [0x30], eax; mov al, [0x40]
        start(vcpu, memory, "b800d0 8ed8 b055 a21000 66a33000 a04000 f4")
        assert vcpu.run() == exits.MmioExit(0xD0040, 1, False, b"")  # a read is not deferred
        assert vcpu.coalesced() == [
            rings.Coalesced(0xD0010, 1, False, b"\x55"),
            rings.Coalesced(0xD0030, 4, False, b"\x55\xd0\x00\x00"),
        ]
        assert vcpu.coalesced() == []
        vcpu.complete_mmio(0)
        assert vcpu.run() == exits.HltExit()
        vm.unregister_coalesced_mmio(0xD0000, 0x1000)
        start(vcpu, memory, "b800d0 8ed8 b055 a21000 f4")
        assert vcpu.run() == exits.MmioExit(0xD0010, 1, True, b"\x55")


@pytest.mark.cap("KVM_CAP_COALESCED_PIO")
def test_coalesced_ports_wait_without_an_exit(vm: Vm, vcpu: Vcpu) -> None:
    vm.register_coalesced_mmio(0x70, 2, pio=True)
    with ram(vm) as memory:
        start(vcpu, memory, "b00f e670 b001 e671 e680")  # out 0x70; out 0x71; out 0x80
        assert vcpu.run() == exits.IoExit(0x80, 1, 1, True, b"\x01")
        assert vcpu.coalesced() == [
            rings.Coalesced(0x70, 1, True, b"\x0f"),
            rings.Coalesced(0x71, 1, True, b"\x01"),
        ]
    vm.unregister_coalesced_mmio(0x70, 2, pio=True)


@pytest.mark.cap("KVM_CAP_MMU_SHADOW_CACHE_CONTROL")
def test_page_tables_can_be_limited(vm: Vm) -> None:
    vm.set_nr_mmu_pages(100)
    try:
        assert vm.get_nr_mmu_pages() == 100
    except KvmError as error:
        assert "dropped from KVM" in str(error)
    with pytest.raises(KvmError, match="least is 64"):
        vm.set_nr_mmu_pages(1)
