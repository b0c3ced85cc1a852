"""The other VM ioctls: clocks, addresses, capabilities, devices, filters, statistics."""

from __future__ import annotations

import os

import pytest

from pykvm import kvm as k
from pykvm.errors import CapabilityError, KvmError
from pykvm.kvm import Kvm, Vcpu, Vm, exits
from tests.support.tiny_guest import ram, start


def test_a_vcpus_id_is_its_own(vm: Vm, vcpu: Vcpu) -> None:
    assert (vcpu.id, vcpu.vm) == (0, vm)
    with pytest.raises(KvmError, match="a vCPU of that id already"):
        vm.create_vcpu(0)
    with pytest.raises(KvmError, match="KVM_CAP_MAX_VCPU_ID"):
        vm.create_vcpu(1 << 20)
    with vm.create_vcpu(5) as other:
        assert other.id == 5


@pytest.mark.cap("KVM_CAP_ADJUST_CLOCK")
def test_the_clock_goes_on_from_where_it_was_set(vm: Vm) -> None:
    vm.set_clock(10**15)
    first = vm.get_clock().clock
    assert 10**15 <= first < 10**15 + 60 * 10**9
    data = vm.get_clock()
    assert data.clock >= first
    data.flags = 1 << 31
    with pytest.raises(KvmError, match="a flag that this KVM does not have"):
        vm.set_clock(data)
    data.flags, data.clock = 0, 5 * 10**14
    vm.set_clock(data)
    assert 5 * 10**14 <= vm.get_clock().clock < 10**15


@pytest.mark.cap("KVM_CAP_VM_TSC_CONTROL")
def test_a_vm_gives_its_vcpus_a_tsc_frequency(kvm: Kvm) -> None:
    with kvm.create_vm() as vm:
        khz = vm.get_tsc_khz()
        assert khz > 1000
        vm.set_tsc_khz(khz)
        with vm.create_vcpu(0) as vcpu:
            assert vcpu.get_tsc_khz() == khz


@pytest.mark.cap("KVM_CAP_SET_TSS_ADDR")
def test_the_tss_lies_below_four_gigabytes(vm: Vm) -> None:
    vm.set_tss_addr(0xFFFB_D000)
    with pytest.raises(KvmError, match="below 4 GiB"):
        vm.set_tss_addr(0xFFFF_F000)


@pytest.mark.cap("KVM_CAP_SET_IDENTITY_MAP_ADDR")
@pytest.mark.cap("KVM_CAP_SET_BOOT_CPU_ID")
def test_identity_map_and_boot_cpu_are_chosen_before_the_first_vcpu(vm: Vm) -> None:
    vm.set_identity_map_addr(0xFFFB_C000)
    vm.set_boot_cpu_id(1)
    with vm.create_vcpu(1) as vcpu:
        assert vcpu.get_msrs([0x1B])[0x1B] & 1 << 8  # IA32_APIC_BASE: bootstrap processor
        with pytest.raises(KvmError, match="too late"):
            vm.set_identity_map_addr(0xFFFB_C000)
        with pytest.raises(KvmError, match="too late"):
            vm.set_boot_cpu_id(0)


@pytest.mark.cap("KVM_CAP_ENABLE_CAP_VM")
def test_a_capability_that_cannot_be_enabled_says_so(vm: Vm) -> None:
    with pytest.raises(KvmError, match="cannot be enabled here"):
        vm.enable_cap("KVM_CAP_USER_MEMORY")


@pytest.mark.cap("KVM_CAP_DEVICE_CTRL")
def test_the_vfio_device_has_attributes(vm: Vm) -> None:
    try:
        assert vm.create_device(k.KVM_DEV_TYPE_VFIO, k.KVM_CREATE_DEVICE_TEST) is None
    except KvmError as error:
        pytest.skip(f"KVM_CREATE_DEVICE_TEST(KVM_DEV_TYPE_VFIO): {error}")
    device = vm.create_device(k.KVM_DEV_TYPE_VFIO)
    assert device is not None
    with device:
        assert not os.get_inheritable(device.fd)
        assert device.has_device_attr(k.KVM_DEV_VFIO_GROUP, k.KVM_DEV_VFIO_GROUP_ADD)
        assert not device.has_device_attr(99, 0)
        with pytest.raises(KvmError, match="KVM_SET_DEVICE_ATTR: EBADF"):
            device.set_device_attr(
                k.KVM_DEV_VFIO_GROUP,
                k.KVM_DEV_VFIO_GROUP_ADD,
                (1 << 20).to_bytes(4, "little"),
            )
        with pytest.raises(KvmError, match="KVM_GET_DEVICE_ATTR: EPERM"):
            device.get_device_attr(k.KVM_DEV_VFIO_GROUP, 0)
        with pytest.raises(KvmError, match="may have only one"):
            vm.create_device(k.KVM_DEV_TYPE_VFIO)


@pytest.mark.cap("KVM_CAP_DEVICE_CTRL")
def test_a_device_of_another_architecture_is_not_there(vm: Vm) -> None:
    with pytest.raises(KvmError, match="no device of that type"):
        vm.create_device(k.KVM_DEV_TYPE_XICS)


def test_attributes_of_a_vm_are_a_capability(vm: Vm) -> None:
    if vm.check_extension("KVM_CAP_VM_ATTRIBUTES"):
        assert not vm.has_device_attr(99, 0)
    else:
        with pytest.raises(CapabilityError, match="KVM_CAP_VM_ATTRIBUTES"):
            vm.has_device_attr(99, 0)


@pytest.mark.cap("KVM_CAP_X86_USER_SPACE_MSR")
@pytest.mark.cap("KVM_CAP_X86_MSR_FILTER")
def test_a_filtered_msr_exits_and_is_answered(kvm: Kvm, vm: Vm, vcpu: Vcpu) -> None:
    vm.enable_cap("KVM_CAP_X86_USER_SPACE_MSR", k.KVM_MSR_EXIT_REASON_FILTER)
    vm.x86_set_msr_filter([k.MsrRange(k.KVM_MSR_FILTER_READ, 0x174, 3, b"\x06")])
    with ram(vm) as memory:
        # mov ecx, 0x175; rdmsr; dec ecx; rdmsr; hlt
        start(vcpu, memory, "66b975010000 0f32 6649 0f32 f4")
        vcpu.set_cpuid2(kvm.get_supported_cpuid())
        assert vcpu.run() == exits.RdmsrExit(0x174, 0, k.KVM_MSR_EXIT_REASON_FILTER)
        vcpu.complete_msr(0x1122_3344_5566_7788)
        assert vcpu.run() == exits.HltExit()
        regs = vcpu.get_regs()
        assert (regs.rdx, regs.rax) == (0x1122_3344, 0x5566_7788)
        vm.x86_set_msr_filter()  # off again
        start(vcpu, memory, "66b974010000 0f32 f4")
        assert vcpu.run() == exits.HltExit()


@pytest.mark.cap("KVM_CAP_X86_USER_SPACE_MSR")
def test_an_unknown_msr_exits_with_what_was_written(kvm: Kvm, vm: Vm, vcpu: Vcpu) -> None:
    reasons = k.KVM_MSR_EXIT_REASON_UNKNOWN | k.KVM_MSR_EXIT_REASON_INVAL
    vm.enable_cap("KVM_CAP_X86_USER_SPACE_MSR", reasons)
    with ram(vm) as memory:
        # mov ecx, 0x4b564dff; mov eax, 5; cdq; wrmsr; hlt
        start(vcpu, memory, "66b9ff4d564b 66b805000000 6699 0f30 f4")
        vcpu.set_cpuid2(kvm.get_supported_cpuid())
        exit = vcpu.run()
        assert isinstance(exit, exits.WrmsrExit)
        assert (exit.index, exit.data) == (0x4B56_4DFF, 5)
        assert exit.msr_reason & reasons
        vcpu.complete_msr()
        assert vcpu.run() == exits.HltExit()


@pytest.mark.cap("KVM_CAP_X86_MSR_FILTER")
def test_an_msr_filter_that_makes_no_sense_is_refused(vm: Vm) -> None:
    with pytest.raises(KvmError, match="DEFAULT_DENY"):
        vm.x86_set_msr_filter(flags=k.KVM_MSR_FILTER_DEFAULT_DENY)
    with pytest.raises(KvmError, match="12288"):
        vm.x86_set_msr_filter([k.MsrRange(k.KVM_MSR_FILTER_READ, 0, 20000)])


@pytest.mark.cap("KVM_CAP_PMU_EVENT_FILTER")
def test_a_performance_event_filter_is_taken_or_refused_in_words(vm: Vm) -> None:
    vm.set_pmu_event_filter(k.KVM_PMU_EVENT_ALLOW, [0xC0, 0x3C])
    vm.set_pmu_event_filter(k.KVM_PMU_EVENT_DENY)
    with pytest.raises(KvmError, match="KVM_SET_PMU_EVENT_FILTER: EINVAL"):
        vm.set_pmu_event_filter(77)
    with pytest.raises(KvmError, match="300"):
        vm.set_pmu_event_filter(k.KVM_PMU_EVENT_ALLOW, range(301))


@pytest.mark.cap("KVM_CAP_BINARY_STATS_FD")
def test_statistics_come_by_name_and_count(vm: Vm, vcpu: Vcpu) -> None:
    with vm.get_stats_fd() as of_vm, vcpu.get_stats_fd() as of_vcpu, ram(vm) as memory:
        assert not os.get_inheritable(of_vm.fd)
        assert of_vm.id == f"kvm-{os.getpid()}"
        assert of_vcpu.id == f"kvm-{os.getpid()}/vcpu-0"
        assert of_vm.stats["remote_tlb_flush"].type == "cumulative"
        assert of_vcpu.stats["halt_wait_ns"].unit == "seconds"
        assert of_vcpu.stats["halt_wait_ns"].exponent == -9
        assert of_vcpu.stats["halt_wait_hist"].type == "logarithmic histogram"
        before = of_vcpu.read()
        start(vcpu, memory, "e6e9 e6e9 f4")
        for _ in range(3):
            vcpu.run()
        after = of_vcpu.read()
        assert isinstance(after["exits"], int)
        assert isinstance(before["exits"], int)
        assert after["exits"] > before["exits"]
        assert set(of_vm.read()) == set(of_vm.stats)
