"""/dev/kvm itself: what the KVM at hand says of itself, and who may use it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from pykvm import kvm as k
from pykvm.errors import CapabilityError, KvmError
from pykvm.kvm import Kvm, Vm

RequireCap = Callable[..., int]


def test_it_speaks_version_twelve(kvm: Kvm) -> None:
    assert kvm.get_api_version() == k.KVM_API_VERSION == 12


def test_the_shared_pages_hold_run_page_port_data_and_ring(kvm: Kvm) -> None:
    assert kvm.get_vcpu_mmap_size() == kvm.vcpu_mmap_size >= 3 * 4096
    assert kvm.vcpu_mmap_size % 4096 == 0


def test_extensions_can_be_asked_for_by_number_and_name(kvm: Kvm, vm: Vm) -> None:
    assert kvm.check_extension(k.KVM_CAP_USER_MEMORY) == 1
    assert kvm.check_extension("KVM_CAP_MAX_VCPUS") >= 1
    assert vm.check_extension("KVM_CAP_NR_MEMSLOTS") >= 32
    assert kvm.check_extension(0x7FFF_FFFF) == 0
    with pytest.raises(CapabilityError, match="KVM_CAP_S390_GMAP"):
        kvm.need("KVM_CAP_S390_GMAP")


def test_supported_cpuid_has_the_basic_leaves_and_long_mode(kvm: Kvm) -> None:
    leaves = {(entry.function, entry.index): entry for entry in kvm.get_supported_cpuid()}
    vendor = leaves[0, 0]
    text = b"".join(r.to_bytes(4, "little") for r in (vendor.ebx, vendor.edx, vendor.ecx))
    assert text in (b"AuthenticAMD", b"GenuineIntel", b"HygonGenuine")
    assert leaves[0x8000_0001, 0].edx & 1 << 29  # long mode
    assert (0x4000_0000, 0) in leaves  # KVM's own


@pytest.mark.cap("KVM_CAP_EXT_EMUL_CPUID")
def test_emulated_cpuid_is_a_list_of_leaves(kvm: Kvm) -> None:
    entries = kvm.get_emulated_cpuid()
    assert entries
    assert all(entry.function in (0, 1, 7, 0x8000_0001) for entry in entries)


@pytest.mark.cap("KVM_CAP_SYS_HYPERV_CPUID")
def test_hyperv_leaves_begin_with_their_vendor(kvm: Kvm) -> None:
    assert kvm.get_supported_hv_cpuid()[0].function == 0x4000_0000


def test_msr_lists_hold_the_system_call_msrs(kvm: Kvm) -> None:
    indices = kvm.get_msr_index_list()
    assert {0x10, 0x174, 0xC000_0081} <= set(indices)  # TSC, SYSENTER_CS, STAR


@pytest.mark.cap("KVM_CAP_GET_MSR_FEATURES")
def test_feature_msrs_can_be_read_of_the_system(kvm: Kvm) -> None:
    indices = kvm.get_msr_feature_index_list()
    values = kvm.get_msrs(indices)
    assert list(values) == indices
    with pytest.raises(k.MsrError) as refused:
        kvm.get_msrs([*indices, 0xDEAD])
    assert (refused.value.index, refused.value.done) == (0xDEAD, len(indices))


@pytest.mark.cap("KVM_CAP_MCE")
def test_machine_check_capabilities_name_banks(kvm: Kvm) -> None:
    assert kvm.x86_get_mce_cap_supported() & 1 << 8 or kvm.check_extension("KVM_CAP_MCE") > 0


@pytest.mark.cap("KVM_CAP_SYS_ATTRIBUTES")
def test_the_system_has_attributes(kvm: Kvm) -> None:
    assert kvm.has_device_attr(0, k.KVM_X86_XCOMP_GUEST_SUPP)
    features = int.from_bytes(kvm.get_device_attr(0, k.KVM_X86_XCOMP_GUEST_SUPP), "little")
    assert features & 1  # x87
    assert not kvm.has_device_attr(99, 0)
    with pytest.raises(KvmError, match="no such group or attribute"):
        kvm.get_device_attr(99, 0)


def test_a_vm_type_that_does_not_exist_is_refused(kvm: Kvm) -> None:
    with pytest.raises(KvmError, match="KVM_CAP_VM_TYPES"):
        kvm.create_vm(1 << 20)


@pytest.mark.cap("KVM_CAP_VM_TYPES", 2)
def test_other_types_of_vm_can_be_made(kvm: Kvm) -> None:
    with kvm.create_vm(kvm.check_extension("KVM_CAP_VM_TYPES").bit_length() - 1) as vm:
        assert vm.type > 0


def test_a_vm_outlives_the_kvm_that_made_it() -> None:
    with Kvm() as kvm:
        vm = kvm.create_vm()
    with vm, vm.create_vcpu(0) as vcpu:
        assert vcpu.get_regs().rip == 0xFFF0


def test_a_vcpu_outlives_the_file_descriptor_of_its_vm(kvm: Kvm) -> None:
    vm = kvm.create_vm()
    with vm.create_vcpu(0) as vcpu:
        vm.close()
        assert vcpu.get_regs().rip == 0xFFF0


def test_descriptors_are_closed_on_exec(kvm: Kvm, vm: Vm) -> None:
    with vm.create_vcpu(0) as vcpu:
        for handle in (kvm, vm, vcpu):
            assert not os.get_inheritable(handle.fd)


def test_a_hundred_vms_leave_nothing_behind(no_leak: None) -> None:
    with Kvm() as kvm:
        for _ in range(100):
            with kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
                assert vcpu.kvm_run.exit_reason == 0


def test_after_a_fork_the_child_is_told_that_the_vm_is_not_its_own(vm: Vm) -> None:
    vm.need("KVM_CAP_SET_TSS_ADDR")
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            vm.set_tss_addr(0xFFFB_D000)
        except KvmError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    assert os.waitpid(child, 0) == (child, 0)
    assert said.startswith("KVM_SET_TSS_ADDR: EIO")
    assert "spawn" in said
    vm.set_tss_addr(0xFFFB_D000)  # and the parent's goes on


def test_signals_do_not_make_ordinary_ioctls_fail(vm: Vm) -> None:
    """A timer that fires all the time: only KVM_RUN may show EINTR."""
    hits = []
    before = signal.signal(signal.SIGALRM, lambda *_: hits.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        for _ in range(200):
            with vm.kvm.create_vm() as other, other.create_vcpu(0) as vcpu:
                vcpu.get_sregs()
            if len(hits) > 5:
                break
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert hits
