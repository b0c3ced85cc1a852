"""The header, the methods and the table of exclusions: each ioctl is in one of the last two."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pykvm import kvm as k
from pykvm._abi import lib
from pykvm.kvm.exclusions import EXCLUSIONS

KINDS = (k.Kvm, k.Vm, k.Vcpu, k.Device)
KVMIO = 0xAE
HEADER = Path("/usr/include/linux/kvm.h")


def methods() -> set[str]:
    """The ioctls that have a method: its name, in upper case behind KVM_."""
    return {
        name
        for kind in KINDS
        for method in dir(kind)
        if not method.startswith("_") and callable(getattr(kind, method))
        for name in [f"KVM_{method.upper()}"]
        if is_ioctl(name)
    }


def is_ioctl(name: str) -> bool:
    """Whether a constant has the form of _IO(KVMIO, …): type 0xAE, and of 32 bits."""
    value = getattr(lib, name, 0)
    return value >> 8 & 0xFF == KVMIO and 0 <= value < 1 << 32


def compiled() -> set[str]:
    """The ioctls that the compiled module knows: the header's, and newer ones."""
    return {name for name in dir(lib) if name.startswith("KVM_") and is_ioctl(name)}


def textual() -> set[str]:
    """The ioctls in the header's text, also those whose structure x86 does not have."""
    if not HEADER.exists():
        pytest.skip(f"there is no {HEADER} here")
    text = HEADER.read_text().replace("\\\n", " ")
    direct = re.findall(r"#define\s+(KVM_\w+)\s+_IO[WR]*\(KVMIO", text)
    deprecated = re.findall(r"#define\s+(KVM_\w+)\s+__KVM_DEPRECATED", text)
    return {*direct, *deprecated}


def test_every_ioctl_has_a_method_or_a_reason() -> None:
    assert compiled() - methods() - EXCLUSIONS.keys() == set()


def test_every_ioctl_in_the_headers_text_has_a_method_or_a_reason() -> None:
    assert len(textual()) > 100
    assert textual() - methods() - EXCLUSIONS.keys() == set()


def test_nothing_is_both_offered_and_excluded() -> None:
    assert methods() & EXCLUSIONS.keys() == set()


def test_the_table_names_only_ioctls() -> None:
    newer = {  # than some header, and not of x86
        "KVM_ARM_SET_COUNTER_OFFSET",
        "KVM_ARM_GET_REG_WRITABLE_MASKS",
        "KVM_S390_KEYOP",
    }
    assert EXCLUSIONS.keys() - compiled() - textual() - newer == set()
    assert all(reason for reason in EXCLUSIONS.values())


def test_the_ioctls_of_this_package_are_these() -> None:
    """The list that the package promises, by kind of file descriptor."""
    promised = {
        k.Kvm: """get_api_version create_vm check_extension get_vcpu_mmap_size get_supported_cpuid
            get_emulated_cpuid get_msr_index_list get_msr_feature_index_list get_msrs
            get_supported_hv_cpuid""",
        k.Vm: """create_vcpu set_user_memory_region set_user_memory_region2 create_guest_memfd
            set_memory_attributes set_tss_addr set_identity_map_addr set_boot_cpu_id create_irqchip
            get_irqchip set_irqchip create_pit2 get_pit2 set_pit2 reinject_control get_clock
            set_clock set_gsi_routing irq_line irq_line_status irqfd set_nr_mmu_pages
            get_nr_mmu_pages ioeventfd signal_msi get_dirty_log clear_dirty_log reset_dirty_rings
            enable_cap check_extension create_device register_coalesced_mmio
            unregister_coalesced_mmio x86_set_msr_filter set_pmu_event_filter get_stats_fd
            get_tsc_khz set_tsc_khz get_device_attr set_device_attr has_device_attr""",
        k.Vcpu: """run get_regs set_regs get_sregs set_sregs get_sregs2 set_sregs2 get_fpu set_fpu
            get_xsave set_xsave get_xsave2 get_xcrs set_xcrs get_lapic set_lapic get_msrs set_msrs
            get_cpuid2 set_cpuid2 get_mp_state set_mp_state get_vcpu_events set_vcpu_events
            get_debugregs set_debugregs get_tsc_khz set_tsc_khz get_nested_state set_nested_state
            set_signal_mask translate set_guest_debug kvmclock_ctrl nmi smi interrupt enable_cap
            tpr_access_reporting set_vapic_addr x86_setup_mce x86_set_mce get_stats_fd
            pre_fault_memory get_device_attr set_device_attr has_device_attr""",
        k.Device: "get_device_attr set_device_attr has_device_attr",
    }
    for kind, names in promised.items():
        for name in names.split():
            assert callable(getattr(kind, name)), name
            assert is_ioctl(f"KVM_{name.upper()}"), name


def test_every_method_cites_its_ioctl() -> None:
    for kind in KINDS:
        for name in dir(kind):
            if is_ioctl(f"KVM_{name.upper()}"):
                doc = getattr(kind, name).__doc__
                assert doc.startswith(f"KVM_{name.upper()}"), f"{kind.__name__}.{name}"
