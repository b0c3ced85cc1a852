"""VM ioctls about interrupts: the in-kernel chips, routes, eventfds in both directions."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from pykvm import kvm as k
from pykvm._abi import ffi
from pykvm.errors import KvmError
from pykvm.kvm import Kvm, Vcpu, Vm, exits
from tests.support.tiny_guest import ram, start

pytestmark = pytest.mark.cap("KVM_CAP_IRQCHIP")


@pytest.fixture
def chips(vm: Vm) -> Vm:
    """A VM with the in-kernel irqchip."""
    vm.create_irqchip()
    return vm


@contextmanager
def eventfd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def until(condition: Callable[[], bool]) -> bool:
    """Wait for what another thread of the kernel does; false after five seconds."""
    end = time.monotonic() + 5
    while not condition():
        if time.monotonic() > end:
            return False
        os.sched_yield()
    return True


def ioapic_irr(vm: Vm) -> int:
    return int(vm.get_irqchip(k.KVM_IRQCHIP_IOAPIC).chip.ioapic.irr)


def apic(lapic: Any) -> Any:
    """The APIC's registers as 32-bit words: register 0xf0 is word 0xf0 // 4."""
    return ffi.cast("uint32_t *", lapic.regs)


def test_there_is_one_irqchip_and_it_comes_before_the_vcpus(kvm: Kvm, chips: Vm) -> None:
    with pytest.raises(KvmError, match="has an irqchip already"):
        chips.create_irqchip()
    with kvm.create_vm() as late, late.create_vcpu(0), pytest.raises(KvmError, match="too late"):
        late.create_irqchip()


@pytest.mark.parametrize(
    "chip_id", [k.KVM_IRQCHIP_PIC_MASTER, k.KVM_IRQCHIP_PIC_SLAVE, k.KVM_IRQCHIP_IOAPIC]
)
def test_the_state_of_a_chip_is_read_and_written(chips: Vm, chip_id: int) -> None:
    chip = chips.get_irqchip(chip_id)
    assert chip.chip_id == chip_id
    if chip_id == k.KVM_IRQCHIP_IOAPIC:
        assert chip.chip.ioapic.base_address == 0xFEC0_0000
        chip.chip.ioapic.id = 5
    else:
        chip.chip.pic.imr = 0xA5
    chips.set_irqchip(chip)
    again = chips.get_irqchip(chip_id)
    if chip_id == k.KVM_IRQCHIP_IOAPIC:
        assert again.chip.ioapic.id == 5
    else:
        assert again.chip.pic.imr == 0xA5


def test_chips_that_are_not_there_are_named(vm: Vm, kvm: Kvm) -> None:
    with pytest.raises(KvmError, match=r"create_irqchip\(\)"):
        vm.get_irqchip(0)
    with pytest.raises(KvmError, match=r"create_irqchip\(\)"):
        vm.irq_line(1, 1)
    vm.create_irqchip()
    with pytest.raises(KvmError, match="no chip of that chip_id"):
        vm.get_irqchip(7)


def test_a_line_drives_the_pic_and_the_ioapic(chips: Vm) -> None:
    chips.irq_line(3, 1)
    assert chips.get_irqchip(k.KVM_IRQCHIP_PIC_MASTER).chip.pic.irr & 1 << 3
    chips.irq_line(20, 1)
    assert ioapic_irr(chips) & 1 << 20
    chips.irq_line(20, 0)


@pytest.mark.cap("KVM_CAP_IRQ_INJECT_STATUS")
def test_a_line_tells_what_became_of_the_interrupt(chips: Vm) -> None:
    with chips.create_vcpu(0):
        assert chips.irq_line_status(20, 1) == -1  # the IOAPIC's pins are masked at reset


@pytest.mark.cap("KVM_CAP_IRQ_ROUTING")
def test_a_route_moves_a_line_to_another_pin(chips: Vm) -> None:
    chips.set_gsi_routing([k.irqchip_route(10, k.KVM_IRQCHIP_IOAPIC, 5)])
    chips.irq_line(10, 1)
    assert ioapic_irr(chips) == 1 << 5
    chips.set_gsi_routing([])
    chips.irq_line(10, 0)  # routed nowhere: nothing changes
    assert ioapic_irr(chips) == 1 << 5
    with pytest.raises(KvmError, match="KVM_CAP_IRQ_ROUTING"):
        chips.set_gsi_routing([k.irqchip_route(1 << 20, k.KVM_IRQCHIP_IOAPIC, 5)])


def enable_apic(vcpu: Vcpu) -> None:
    lapic = vcpu.get_lapic()
    apic(lapic)[0xF0 // 4] = 0x1FF  # spurious vector 0xff, APIC enabled
    vcpu.set_lapic(lapic)


def pending(vcpu: Vcpu, vector: int) -> bool:
    irr = apic(vcpu.get_lapic())[(0x200 + vector // 32 * 16) // 4]
    return bool(irr & 1 << vector % 32)


@pytest.mark.cap("KVM_CAP_SIGNAL_MSI")
def test_an_msi_reaches_the_apic_it_names(chips: Vm) -> None:
    with chips.create_vcpu(0) as vcpu, chips.create_vcpu(1) as other:
        enable_apic(vcpu)
        enable_apic(other)
        assert chips.signal_msi(0xFEE0_1000, 0x41) == 1
        assert pending(other, 0x41)
        assert not pending(vcpu, 0x41)


@pytest.mark.cap("KVM_CAP_IRQ_ROUTING")
def test_a_route_to_an_msi_reaches_the_apic(chips: Vm) -> None:
    with chips.create_vcpu(0) as vcpu:
        enable_apic(vcpu)
        chips.set_gsi_routing([k.msi_route(24, 0xFEE0_0000, 0x52)])
        chips.irq_line(24, 1)
        assert pending(vcpu, 0x52)


@pytest.mark.cap("KVM_CAP_IRQFD")
def test_an_eventfd_raises_a_line(chips: Vm) -> None:
    with chips.create_vcpu(0) as vcpu, eventfd() as fd:
        enable_apic(vcpu)
        chips.set_gsi_routing([k.msi_route(24, 0xFEE0_0000, 0x53)])
        chips.irqfd(fd, 24)
        with pytest.raises(KvmError, match="raises a GSI already"):
            chips.irqfd(fd, 24)
        os.eventfd_write(fd, 1)
        assert until(lambda: pending(vcpu, 0x53))
        chips.irqfd(fd, 24, k.KVM_IRQFD_FLAG_DEASSIGN)
        chips.irqfd(fd, 24)  # free again
        with pytest.raises(KvmError, match="not an open file descriptor"):
            chips.irqfd(1 << 20, 24)


@pytest.mark.cap("KVM_CAP_IRQFD_RESAMPLE")
def test_a_resampling_irqfd_holds_its_line(chips: Vm) -> None:
    with eventfd() as fd, eventfd() as resample:
        chips.irqfd(fd, 20, k.KVM_IRQFD_FLAG_RESAMPLE, resample)
        os.eventfd_write(fd, 1)
        assert until(lambda: bool(ioapic_irr(chips) & 1 << 20))
        chips.irqfd(fd, 20, k.KVM_IRQFD_FLAG_DEASSIGN)


@pytest.mark.cap("KVM_CAP_IOEVENTFD")
def test_a_port_write_signals_an_eventfd_instead_of_exiting(vm: Vm, vcpu: Vcpu) -> None:
    flags = k.KVM_IOEVENTFD_FLAG_PIO
    with ram(vm) as memory, eventfd() as fd:
        vm.ioeventfd(0x10, 1, fd, datamatch=7, flags=flags)
        with pytest.raises(KvmError, match="this address, length and datamatch"):
            vm.ioeventfd(0x10, 1, fd, datamatch=7, flags=flags)
        code = "b007 e610 e610 b008 e610 f4"  # mov al, 7; out; out; mov al, 8; out; hlt
        start(vcpu, memory, code)
        assert vcpu.run() == exits.IoExit(0x10, 1, 1, True, b"\x08")  # the value did not match
        assert os.eventfd_read(fd) == 2
        assert vcpu.run() == exits.HltExit()
        vm.ioeventfd(0x10, 1, fd, datamatch=7, flags=flags | k.KVM_IOEVENTFD_FLAG_DEASSIGN)
        start(vcpu, memory, code)
        assert vcpu.run() == exits.IoExit(0x10, 1, 1, True, b"\x07")
        with pytest.raises(KvmError, match="there is no ioeventfd"):
            vm.ioeventfd(0x10, 1, fd, datamatch=7, flags=flags | k.KVM_IOEVENTFD_FLAG_DEASSIGN)


@pytest.mark.cap("KVM_CAP_IOEVENTFD_ANY_LENGTH")
def test_a_memory_write_of_any_length_signals_an_eventfd(vm: Vm, vcpu: Vcpu) -> None:
    with ram(vm) as memory, eventfd() as fd:
        vm.ioeventfd(0xD0000, 0, fd)
        # mov ax, 0xd000; mov ds, ax; mov [0], al; mov [0], ax; mov [0], eax; hlt
        start(vcpu, memory, "b800d0 8ed8 a20000 a30000 66a30000 f4")
        assert vcpu.run() == exits.HltExit()
        assert os.eventfd_read(fd) == 3
        vm.ioeventfd(0xD0000, 0, fd, flags=k.KVM_IOEVENTFD_FLAG_DEASSIGN)


@pytest.mark.cap("KVM_CAP_IOEVENTFD")
def test_an_ioeventfd_of_another_length_is_refused(vm: Vm) -> None:
    with eventfd() as fd, pytest.raises(KvmError, match="0, 1, 2, 4 or 8"):
        vm.ioeventfd(0xD0000, 3, fd)


@pytest.mark.cap("KVM_CAP_PIT2")
@pytest.mark.cap("KVM_CAP_PIT_STATE2")
def test_the_pits_state_is_read_and_written(chips: Vm) -> None:
    with pytest.raises(KvmError, match=r"create_pit2\(\) first"):
        chips.get_pit2()
    chips.create_pit2(k.KVM_PIT_SPEAKER_DUMMY)
    state = chips.get_pit2()
    assert [channel.count for channel in state.channels] == [65536] * 3
    state.channels[1].mode, state.channels[1].count = 2, 1000
    chips.set_pit2(state)
    again = chips.get_pit2().channels[1]
    assert (again.mode, again.count) == (2, 1000)
    with pytest.raises(KvmError, match="PIT already"):
        chips.create_pit2()


@pytest.mark.cap("KVM_CAP_REINJECT_CONTROL")
def test_reinjection_is_the_pits_own(chips: Vm) -> None:
    with pytest.raises(KvmError, match=r"create_pit2\(\) first"):
        chips.reinject_control(True)
    chips.create_pit2()
    chips.reinject_control(False)
    chips.reinject_control(True)


@pytest.mark.cap("KVM_CAP_PIT2")
def test_a_pit_without_an_irqchip_is_refused_in_words_or_works(vm: Vm) -> None:
    try:
        vm.create_pit2()
    except KvmError as error:
        assert "create_irqchip()" in str(error)
    else:  # before Linux 6.4
        assert vm.get_pit2().channels[0].count == 65536


@pytest.mark.cap("KVM_CAP_SPLIT_IRQCHIP")
def test_with_a_split_irqchip_the_end_of_an_interrupt_exits(kvm: Kvm) -> None:
    """Level-triggered vector 0x31 of a userspace IOAPIC: the guest's EOI comes back to us."""
    with kvm.create_vm() as vm:
        vm.enable_cap("KVM_CAP_SPLIT_IRQCHIP", 24)
        with vm.create_vcpu(0) as vcpu, ram(vm) as memory:
            enable_apic(vcpu)
            level = 1 << 15 | 1 << 14  # trigger mode, level: of the MSI that stands for the pin
            vm.set_gsi_routing([k.msi_route(4, 0xFEE0_0000, level | 0x31)])
            memory[0x31 * 4] = bytes.fromhex("00300000")
            # Handler: mov eax, 0; mov [0xfee000b0], eax (address size override, DS limit 4 GiB).
            memory[0x3000] = bytes.fromhex("66b800000000 67 66 a3 b000e0fe cf")
            start(vcpu, memory, "fb 90 90 90 ebfb")
            sregs = vcpu.get_sregs()
            sregs.ds.limit, sregs.ds.g = 0xFFFF_FFFF, 1
            vcpu.set_sregs(sregs)
            vm.irq_line(4, 1)
            assert vcpu.run() == exits.IoapicEoiExit(0x31)
