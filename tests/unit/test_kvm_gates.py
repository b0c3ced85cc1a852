"""Each ioctl that depends on a capability asks for it, once, and says what is missing."""

from __future__ import annotations

from typing import Any

import pytest

from pykvm import kvm as k
from pykvm._abi import ffi, lib
from pykvm.errors import CapabilityError
from tests.support.fake_ioctl import fake_vcpu

EVENTS = ffi.new("struct kvm_vcpu_events *")
XSAVE = ffi.new("struct kvm_xsave *")
NESTED = ffi.new("struct kvm_nested_state *")

# (object, method): (arguments, the capability without which it is refused).
GATES: dict[tuple[str, str], tuple[tuple[Any, ...], str]] = {
    ("kvm", "get_supported_cpuid"): ((), "KVM_CAP_EXT_CPUID"),
    ("kvm", "get_emulated_cpuid"): ((), "KVM_CAP_EXT_EMUL_CPUID"),
    ("kvm", "get_supported_hv_cpuid"): ((), "KVM_CAP_SYS_HYPERV_CPUID"),
    ("kvm", "get_msr_feature_index_list"): ((), "KVM_CAP_GET_MSR_FEATURES"),
    ("kvm", "get_msrs"): (([0x10],), "KVM_CAP_GET_MSR_FEATURES"),
    ("kvm", "x86_get_mce_cap_supported"): ((), "KVM_CAP_MCE"),
    ("kvm", "has_device_attr"): ((0, 0), "KVM_CAP_SYS_ATTRIBUTES"),
    ("kvm", "get_device_attr"): ((0, 0), "KVM_CAP_SYS_ATTRIBUTES"),
    ("vm", "create_device"): ((4,), "KVM_CAP_DEVICE_CTRL"),
    ("vm", "enable_cap"): ((1,), "KVM_CAP_ENABLE_CAP_VM"),
    ("vm", "set_tss_addr"): ((0,), "KVM_CAP_SET_TSS_ADDR"),
    ("vm", "set_identity_map_addr"): ((0,), "KVM_CAP_SET_IDENTITY_MAP_ADDR"),
    ("vm", "set_boot_cpu_id"): ((0,), "KVM_CAP_SET_BOOT_CPU_ID"),
    ("vm", "get_clock"): ((), "KVM_CAP_ADJUST_CLOCK"),
    ("vm", "set_clock"): ((1,), "KVM_CAP_ADJUST_CLOCK"),
    ("vm", "get_tsc_khz"): ((), "KVM_CAP_VM_TSC_CONTROL"),
    ("vm", "set_tsc_khz"): ((1,), "KVM_CAP_VM_TSC_CONTROL"),
    ("vm", "get_stats_fd"): ((), "KVM_CAP_BINARY_STATS_FD"),
    ("vm", "has_device_attr"): ((0, 0), "KVM_CAP_VM_ATTRIBUTES"),
    ("vm", "get_device_attr"): ((0, 0), "KVM_CAP_VM_ATTRIBUTES"),
    ("vm", "set_device_attr"): ((0, 0), "KVM_CAP_VM_ATTRIBUTES"),
    ("vm", "set_user_memory_region2"): ((0, 0, 0, 0), "KVM_CAP_USER_MEMORY2"),
    ("vm", "create_guest_memfd"): ((4096,), "KVM_CAP_GUEST_MEMFD"),
    ("vm", "set_memory_attributes"): ((0, 4096, 8), "KVM_CAP_MEMORY_ATTRIBUTES"),
    ("vm", "clear_dirty_log"): ((0, b""), "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2"),
    ("vm", "reset_dirty_rings"): ((), "KVM_CAP_DIRTY_LOG_RING"),
    ("vm", "set_nr_mmu_pages"): ((64,), "KVM_CAP_MMU_SHADOW_CACHE_CONTROL"),
    ("vm", "get_nr_mmu_pages"): ((), "KVM_CAP_MMU_SHADOW_CACHE_CONTROL"),
    ("vm", "register_coalesced_mmio"): ((0, 4), "KVM_CAP_COALESCED_MMIO"),
    ("vm", "unregister_coalesced_mmio"): ((0, 4, True), "KVM_CAP_COALESCED_PIO"),
    ("vm", "create_irqchip"): ((), "KVM_CAP_IRQCHIP"),
    ("vm", "get_irqchip"): ((0,), "KVM_CAP_IRQCHIP"),
    ("vm", "set_irqchip"): ((ffi.new("struct kvm_irqchip *"),), "KVM_CAP_IRQCHIP"),
    ("vm", "create_pit2"): ((), "KVM_CAP_PIT2"),
    ("vm", "get_pit2"): ((), "KVM_CAP_PIT_STATE2"),
    ("vm", "set_pit2"): ((ffi.new("struct kvm_pit_state2 *"),), "KVM_CAP_PIT_STATE2"),
    ("vm", "reinject_control"): ((True,), "KVM_CAP_REINJECT_CONTROL"),
    ("vm", "set_gsi_routing"): (([],), "KVM_CAP_IRQ_ROUTING"),
    ("vm", "irq_line"): ((0, 1), "KVM_CAP_IRQCHIP"),
    ("vm", "irq_line_status"): ((0, 1), "KVM_CAP_IRQ_INJECT_STATUS"),
    ("vm", "irqfd"): ((0, 0), "KVM_CAP_IRQFD"),
    ("vm", "ioeventfd"): ((0, 4, 0), "KVM_CAP_IOEVENTFD"),
    ("vm", "signal_msi"): ((0, 0), "KVM_CAP_SIGNAL_MSI"),
    ("vm", "x86_set_msr_filter"): ((), "KVM_CAP_X86_MSR_FILTER"),
    ("vm", "set_pmu_event_filter"): ((0,), "KVM_CAP_PMU_EVENT_FILTER"),
    ("vcpu", "get_cpuid2"): ((), "KVM_CAP_EXT_CPUID"),
    ("vcpu", "set_cpuid2"): (([],), "KVM_CAP_EXT_CPUID"),
    ("vcpu", "get_supported_hv_cpuid"): ((), "KVM_CAP_HYPERV_CPUID"),
    ("vcpu", "get_one_reg"): ((0,), "KVM_CAP_ONE_REG"),
    ("vcpu", "get_reg_list"): ((), "KVM_CAP_ONE_REG"),
    ("vcpu", "set_one_reg"): ((0, 0), "KVM_CAP_ONE_REG"),
    ("vcpu", "get_tsc_khz"): ((), "KVM_CAP_GET_TSC_KHZ"),
    ("vcpu", "set_tsc_khz"): ((1,), "KVM_CAP_GET_TSC_KHZ"),
    ("vcpu", "kvmclock_ctrl"): ((), "KVM_CAP_KVMCLOCK_CTRL"),
    ("vcpu", "x86_setup_mce"): ((1,), "KVM_CAP_MCE"),
    ("vcpu", "x86_set_mce"): ((0, 0), "KVM_CAP_MCE"),
    ("vcpu", "get_sregs2"): ((), "KVM_CAP_SREGS2"),
    ("vcpu", "set_sregs2"): ((ffi.new("struct kvm_sregs2 *"),), "KVM_CAP_SREGS2"),
    ("vcpu", "get_xsave"): ((), "KVM_CAP_XSAVE"),
    ("vcpu", "get_xsave2"): ((), "KVM_CAP_XSAVE2"),
    ("vcpu", "set_xsave"): ((XSAVE,), "KVM_CAP_XSAVE"),
    ("vcpu", "get_xcrs"): ((), "KVM_CAP_XCRS"),
    ("vcpu", "set_xcrs"): ((ffi.new("struct kvm_xcrs *"),), "KVM_CAP_XCRS"),
    ("vcpu", "get_lapic"): ((), "KVM_CAP_IRQCHIP"),
    ("vcpu", "set_lapic"): ((ffi.new("struct kvm_lapic_state *"),), "KVM_CAP_IRQCHIP"),
    ("vcpu", "get_mp_state"): ((), "KVM_CAP_MP_STATE"),
    ("vcpu", "set_mp_state"): ((0,), "KVM_CAP_MP_STATE"),
    ("vcpu", "get_vcpu_events"): ((), "KVM_CAP_VCPU_EVENTS"),
    ("vcpu", "set_vcpu_events"): ((EVENTS,), "KVM_CAP_VCPU_EVENTS"),
    ("vcpu", "get_debugregs"): ((), "KVM_CAP_DEBUGREGS"),
    ("vcpu", "set_debugregs"): ((ffi.new("struct kvm_debugregs *"),), "KVM_CAP_DEBUGREGS"),
    ("vcpu", "get_nested_state"): ((), "KVM_CAP_NESTED_STATE"),
    ("vcpu", "set_nested_state"): ((NESTED,), "KVM_CAP_NESTED_STATE"),
    ("vcpu", "nmi"): ((), "KVM_CAP_USER_NMI"),
    ("vcpu", "smi"): ((), "KVM_CAP_X86_SMM"),
    ("vcpu", "set_guest_debug"): ((0,), "KVM_CAP_SET_GUEST_DEBUG"),
    ("vcpu", "enable_cap"): ((1,), "KVM_CAP_ENABLE_CAP"),
    ("vcpu", "tpr_access_reporting"): ((True,), "KVM_CAP_VAPIC"),
    ("vcpu", "set_vapic_addr"): ((0,), "KVM_CAP_VAPIC"),
    ("vcpu", "pre_fault_memory"): ((0, 4096), "KVM_CAP_PRE_FAULT_MEMORY"),
    ("vcpu", "get_stats_fd"): ((), "KVM_CAP_BINARY_STATS_FD"),
    ("vcpu", "has_device_attr"): ((0, 0), "KVM_CAP_VCPU_ATTRIBUTES"),
    ("vcpu", "get_device_attr"): ((0, 0), "KVM_CAP_VCPU_ATTRIBUTES"),
    ("vcpu", "set_device_attr"): ((0, 0), "KVM_CAP_VCPU_ATTRIBUTES"),
    ("vcpu", "coalesced"): ((), "KVM_CAP_COALESCED_MMIO"),
}

# What every KVM with API version 12 has ("basic" in api.rst), and what a device is by itself.
BASIC = {
    ("kvm", "get_api_version"),
    ("kvm", "create_vm"),
    ("kvm", "check_extension"),
    ("kvm", "get_vcpu_mmap_size"),
    ("kvm", "get_msr_index_list"),
    ("vm", "check_extension"),
    ("vm", "create_vcpu"),
    ("vm", "set_user_memory_region"),
    ("vm", "get_dirty_log"),
    ("vcpu", "run"),
    ("vcpu", "get_regs"),
    ("vcpu", "set_regs"),
    ("vcpu", "get_sregs"),
    ("vcpu", "set_sregs"),
    ("vcpu", "get_fpu"),
    ("vcpu", "set_fpu"),
    ("vcpu", "get_msrs"),
    ("vcpu", "set_msrs"),
    ("vcpu", "translate"),
    ("vcpu", "interrupt"),
    ("vcpu", "set_signal_mask"),
    ("device", "has_device_attr"),
    ("device", "get_device_attr"),
    ("device", "set_device_attr"),
}


@pytest.mark.parametrize(("which", "method"), GATES, ids=[f"{w}.{m}" for w, m in GATES])
def test_without_the_capability_it_is_refused_by_name(which: str, method: str) -> None:
    args, cap = GATES[which, method]
    with fake_vcpu(cap_default=1) as (kernel, kvm, vm, vcpu):
        kernel.caps[cap] = 0
        if method == "reset_dirty_rings":
            kernel.caps["KVM_CAP_DIRTY_LOG_RING_ACQ_REL"] = 0
        target: Any = {"kvm": kvm, "vm": vm, "vcpu": vcpu}[which]
        with pytest.raises(CapabilityError, match=cap) as refused:
            getattr(target, method)(*args)
        assert refused.value.capability == cap
        assert k.caps.describe(cap) in str(refused.value)
        assert not kernel.calls  # the ioctl itself was not tried


def test_every_ioctl_is_basic_or_behind_a_gate() -> None:
    methods = {
        (which, name)
        for which, kind in (("kvm", k.Kvm), ("vm", k.Vm), ("vcpu", k.Vcpu), ("device", k.Device))
        for name in dir(kind)
        if hasattr(lib, f"KVM_{name.upper()}")
    }
    assert methods - BASIC - GATES.keys() == set()
    assert BASIC - methods == set()


def test_the_hot_path_asks_for_no_capability() -> None:
    with fake_vcpu() as (kernel, _, _, vcpu):
        kernel.probed.clear()
        vcpu.set_regs(vcpu.get_regs())
        vcpu.set_sregs(vcpu.get_sregs())
        vcpu.run()
        assert kernel.probed == []


def test_a_capability_is_asked_for_once_and_shared_by_the_vms_of_one_type() -> None:
    with fake_vcpu() as (kernel, kvm, _, vcpu):
        kernel.probed.clear()
        vcpu.get_debugregs()
        vcpu.get_debugregs()
        with kvm.create_vm() as second, second.create_vcpu(0) as other:
            other.get_debugregs()
        assert kernel.probed == ["KVM_CAP_DEBUGREGS"]
        with kvm.create_vm(1) as protected, protected.create_vcpu(0) as other:
            other.get_debugregs()  # a VM of another type may answer otherwise
        assert kernel.probed == ["KVM_CAP_DEBUGREGS"] * 2
        assert kvm.check_extension("KVM_CAP_DEBUGREGS") == 1  # which always asks
        assert kernel.probed == ["KVM_CAP_DEBUGREGS"] * 3


def test_irqfd_and_ioeventfd_gate_their_own_extensions() -> None:
    with fake_vcpu() as (kernel, _, vm, _):
        kernel.caps |= {"KVM_CAP_IRQFD_RESAMPLE": 0, "KVM_CAP_IOEVENTFD_ANY_LENGTH": 0}
        with pytest.raises(CapabilityError, match="KVM_CAP_IRQFD_RESAMPLE"):
            vm.irqfd(1, 2, k.KVM_IRQFD_FLAG_RESAMPLE, 3)
        with pytest.raises(CapabilityError, match="KVM_CAP_IOEVENTFD_ANY_LENGTH"):
            vm.ioeventfd(0x10, 0, 3)


def test_need_returns_what_the_capability_says() -> None:
    with fake_vcpu() as (kernel, kvm, vm, vcpu):
        kernel.caps["KVM_CAP_MCE"] = 32
        assert kvm.need("KVM_CAP_MCE") == vm.need("KVM_CAP_MCE") == vcpu.need("KVM_CAP_MCE") == 32
