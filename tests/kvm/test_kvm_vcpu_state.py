"""vCPU ioctls about state and make: what is written is read back, and what the guest sees of it."""

from __future__ import annotations

from struct import pack, unpack

import pytest

from pykvm import kvm as k
from pykvm._abi import ffi
from pykvm.errors import CapabilityError, KvmError
from pykvm.kvm import Kvm, Vcpu, Vm, exits
from tests.support.tiny_guest import CODE, ram, start, start_ring3

IA32_APIC_BASE, IA32_MC0_STATUS, IA32_MC0_ADDR = 0x1B, 0x401, 0x402
STAR, LSTAR, TSC, MSR_KVM_SYSTEM_TIME_NEW = 0xC000_0081, 0xC000_0082, 0x10, 0x4B56_4D01


# -- registers -----------------------------------------------------------------------------------


def test_a_vcpu_starts_at_the_reset_vector(vcpu: Vcpu) -> None:
    regs, sregs = vcpu.get_regs(), vcpu.get_sregs()
    assert (regs.rip, regs.rflags, sregs.cs.selector) == (0xFFF0, 2, 0xF000)
    assert sregs.cs.base == 0xFFFF_0000
    assert not sregs.cr0 & 1


def test_general_registers_are_all_kept(cpu: Vcpu) -> None:
    names = [name for name, _ in ffi.typeof("struct kvm_regs").fields][:16]
    assert names[0] == "rax"
    assert names[15] == "r15"
    regs = cpu.get_regs()
    for number, name in enumerate(names):
        setattr(regs, name, 0x1111_1111_1111_1111 * (number + 1) & (1 << 64) - 1)
    regs.rip, regs.rflags = 0x1234, 0x202
    cpu.set_regs(regs)
    again = cpu.get_regs()
    assert bytes(ffi.buffer(again)) == bytes(ffi.buffer(regs))


def test_special_registers_are_kept_and_the_guest_runs_by_them(vm: Vm, cpu: Vcpu) -> None:
    with ram(vm, 0x20000) as memory:
        start_ring3(cpu, memory, "b041 e6e9")  # mov al, 'A'; out 0xe9, al
        assert cpu.run() == exits.IoExit(0xE9, 1, 1, True, b"A")
        sregs = cpu.get_sregs()
        assert (sregs.cr3, sregs.efer, sregs.cs.selector, sregs.cs.dpl) == (0x10000, 0x500, 0x33, 3)


def test_special_registers_that_no_processor_has_are_refused(cpu: Vcpu) -> None:
    sregs = cpu.get_sregs()
    sregs.cr0 |= 1 << 31  # paging without protection
    with pytest.raises(KvmError, match=r"KVM_SET_SREGS: EINVAL .*CR0.PG without CR0.PE"):
        cpu.set_sregs(sregs)


@pytest.mark.cap("KVM_CAP_SREGS2")
def test_special_registers_of_the_second_kind_agree_with_the_first(cpu: Vcpu) -> None:
    sregs = cpu.get_sregs2()
    sregs.cr2, sregs.gdt.base, sregs.gdt.limit = 0xDEAD_000, 0x5000, 0x27
    cpu.set_sregs2(sregs)
    first = cpu.get_sregs()
    assert (first.cr2, first.gdt.base, first.gdt.limit) == (0xDEAD_000, 0x5000, 0x27)
    sregs.cr0 |= 1 << 31
    with pytest.raises(KvmError, match="KVM_SET_SREGS2: EINVAL"):
        cpu.set_sregs2(sregs)


def test_fpu_registers_are_kept(cpu: Vcpu) -> None:
    fpu = cpu.get_fpu()
    fpu.fcw = 0x27F
    ffi.memmove(fpu.xmm[15], bytes(range(16)), 16)
    cpu.set_fpu(fpu)
    again = cpu.get_fpu()
    assert again.fcw == 0x27F
    assert bytes(ffi.buffer(again.xmm[15])) == bytes(range(16))


@pytest.mark.cap("KVM_CAP_XSAVE")
def test_the_fpu_shows_what_the_xsave_area_holds(cpu: Vcpu) -> None:
    xsave = cpu.get_xsave()
    assert xsave.region[0] & 0xFFFF == 0x37F  # SDM vol. 1, 10.5.1: FCW is the first word
    xsave.region[0] = xsave.region[0] & ~0xFFFF | 0x27F
    xsave.region[128] |= 1  # XSTATE_BV: the x87 part is in use
    cpu.set_xsave(xsave)
    assert cpu.get_fpu().fcw == 0x27F
    assert cpu.get_xsave().region[0] & 0xFFFF == 0x27F
    xsave.region[6] = 1 << 31  # MXCSR: a bit that no processor has
    with pytest.raises(KvmError, match="MXCSR"):
        cpu.set_xsave(xsave)


@pytest.mark.cap("KVM_CAP_XSAVE2")
def test_the_xsave_area_of_any_size_begins_alike(vm: Vm, cpu: Vcpu) -> None:
    xsave = cpu.get_xsave2()
    assert ffi.sizeof(xsave[0]) >= vm.check_extension("KVM_CAP_XSAVE2") >= 4096
    assert xsave.region[0] & 0xFFFF == cpu.get_fpu().fcw
    cpu.set_xsave(xsave)


@pytest.mark.cap("KVM_CAP_XCRS")
def test_xcr0_is_kept_if_the_processor_could_have_it(cpu: Vcpu) -> None:
    xcrs = cpu.get_xcrs()
    assert (xcrs.nr_xcrs, xcrs.xcrs[0].xcr) == (1, 0)
    assert xcrs.xcrs[0].value & 1
    cpu.set_xcrs(xcrs)
    xcrs.xcrs[0].value = 2  # SSE without x87
    with pytest.raises(KvmError, match="bit 0 must be set"):
        cpu.set_xcrs(xcrs)


@pytest.mark.cap("KVM_CAP_IRQCHIP")
def test_the_local_apic_is_in_the_kernel_or_it_is_not(kvm: Kvm, vcpu: Vcpu) -> None:
    with pytest.raises(KvmError, match=r"create_irqchip\(\) before create_vcpu\(\)"):
        vcpu.get_lapic()
    with kvm.create_vm() as vm:
        vm.create_irqchip()
        with vm.create_vcpu(3) as cpu:
            lapic = cpu.get_lapic()
            words = ffi.cast("uint32_t *", lapic.regs)
            assert words[0x20 // 4] == 3 << 24  # APIC ID
            words[0x80 // 4] = 0x50  # task priority
            cpu.set_lapic(lapic)
            assert cpu.get_sregs().cr8 == 5


@pytest.mark.cap("KVM_CAP_MP_STATE")
def test_application_processors_wait_until_they_are_made_to_run(kvm: Kvm, vcpu: Vcpu) -> None:
    assert vcpu.get_mp_state() == k.KVM_MP_STATE_RUNNABLE
    with pytest.raises(KvmError, match="no in-kernel local APIC"):
        vcpu.set_mp_state(k.KVM_MP_STATE_HALTED)
    with kvm.create_vm() as vm:
        vm.create_irqchip()
        with vm.create_vcpu(0) as boot, vm.create_vcpu(1) as other:
            assert boot.get_mp_state() == k.KVM_MP_STATE_RUNNABLE
            assert other.get_mp_state() == k.KVM_MP_STATE_UNINITIALIZED
            for state in (k.KVM_MP_STATE_HALTED, k.KVM_MP_STATE_RUNNABLE):
                other.set_mp_state(state)
                assert other.get_mp_state() == state


@pytest.mark.cap("KVM_CAP_VCPU_EVENTS")
def test_an_exception_put_into_the_events_reaches_the_guest(vm: Vm, cpu: Vcpu) -> None:
    with ram(vm) as memory:
        memory[6 * 4] = pack("<HH", 0x3000, 0)
        memory[0x3000] = bytes.fromhex("b077 e6e9 cf")
        start(cpu, memory, "90 f4")
        events = cpu.get_vcpu_events()
        events.exception.injected, events.exception.nr = 1, 6  # #UD
        cpu.set_vcpu_events(events)
        assert cpu.get_vcpu_events().exception.nr == 6
        assert cpu.run() == exits.IoExit(0xE9, 1, 1, True, b"\x77")
        events.exception.injected, events.exception.nr = 1, 60
        with pytest.raises(KvmError, match="exception that does not exist"):
            cpu.set_vcpu_events(events)


@pytest.mark.cap("KVM_CAP_DEBUGREGS")
def test_debug_registers_are_kept(cpu: Vcpu) -> None:
    debugregs = cpu.get_debugregs()
    debugregs.db[0], debugregs.db[3] = 0x1000, 0x2000
    cpu.set_debugregs(debugregs)
    again = cpu.get_debugregs()
    assert list(again.db) == [0x1000, 0, 0, 0x2000]
    debugregs.dr7 |= 1 << 40
    with pytest.raises(KvmError, match="DR6 or DR7"):
        cpu.set_debugregs(debugregs)


@pytest.mark.cap("KVM_CAP_NESTED_STATE")
def test_nested_state_goes_out_and_in(cpu: Vcpu) -> None:
    state = cpu.get_nested_state()
    assert state.size >= 128
    assert state.format in (k.KVM_STATE_NESTED_FORMAT_VMX, k.KVM_STATE_NESTED_FORMAT_SVM)
    cpu.set_nested_state(state)
    cpu.set_nested_state(bytes(ffi.buffer(ffi.cast("char *", state), state.size)))
    state.format ^= 1
    with pytest.raises(KvmError, match="KVM_SET_NESTED_STATE: EINVAL"):
        cpu.set_nested_state(state)


# -- make ------------------------------------------------------------------------------------------


def test_the_guest_sees_the_cpuid_it_was_given(kvm: Kvm, vm: Vm, vcpu: Vcpu) -> None:
    entries = kvm.get_supported_cpuid()
    assert vcpu.get_cpuid2() == []
    for entry in entries:
        if entry.function == 0:
            entry.ebx, entry.edx, entry.ecx = unpack("<III", b"pykvm tests!")
    vcpu.set_cpuid2(k.new_cpuid2(entries))
    assert len(vcpu.get_cpuid2()) == len(entries)
    vcpu.set_cpuid2(entries)
    with ram(vm) as memory:
        start(vcpu, memory, "6631c0 0fa2 f4")  # xor eax, eax; cpuid; hlt
        assert vcpu.run() == exits.HltExit()
        regs = vcpu.get_regs()
        assert pack("<III", regs.rbx, regs.rdx, regs.rcx) == b"pykvm tests!"


def test_too_many_cpuid_entries_are_refused(kvm: Kvm, vcpu: Vcpu) -> None:
    with pytest.raises(KvmError, match="256 entries"):
        vcpu.set_cpuid2(kvm.get_supported_cpuid() * 20)


@pytest.mark.cap("KVM_CAP_HYPERV_CPUID")
def test_a_vcpu_lists_hyperv_leaves(cpu: Vcpu) -> None:
    assert cpu.get_supported_hv_cpuid()[0].function == 0x4000_0000


def test_msrs_are_kept_and_the_one_that_fails_is_named(cpu: Vcpu) -> None:
    cpu.set_msrs({STAR: 0x0023_0010_0000_0000, LSTAR: 0xFFFF_8000_0000_1000})
    assert cpu.get_msrs([LSTAR, STAR]) == {
        LSTAR: 0xFFFF_8000_0000_1000,
        STAR: 0x0023_0010_0000_0000,
    }
    with pytest.raises(k.MsrError, match="MSR 0xdead cannot be read") as refused:
        cpu.get_msrs([STAR, 0xDEAD, LSTAR])
    assert (refused.value.index, refused.value.done) == (0xDEAD, 1)
    with pytest.raises(k.MsrError, match="MSR 0xc0000082 does not take 0x8000000000000000"):
        cpu.set_msrs({STAR: 1, LSTAR: 1 << 63})  # not canonical
    assert cpu.get_msrs([STAR]) == {STAR: 1}  # the one before it is written


def test_all_the_msrs_of_the_list_can_be_read_or_named(kvm: Kvm, cpu: Vcpu) -> None:
    indices = kvm.get_msr_index_list()
    readable: dict[int, int] = {}
    for index in indices:
        try:
            readable |= cpu.get_msrs([index])
        except k.MsrError as error:
            assert error.index == index
    assert cpu.get_msrs(readable).keys() == readable.keys()


def test_single_registers_are_msrs_by_another_name(cpu: Vcpu) -> None:
    id = k.KVM_REG_X86 | k.KVM_REG_SIZE_U64 | k.KVM_X86_REG_TYPE_MSR << 32 | LSTAR
    if not cpu.vm.check_extension("KVM_CAP_ONE_REG"):
        with pytest.raises(CapabilityError, match="KVM_CAP_ONE_REG"):
            cpu.get_one_reg(id)
        pytest.skip("KVM_CHECK_EXTENSION(KVM_CAP_ONE_REG) = 0")
    cpu.set_one_reg(id, 0x7000)
    assert cpu.get_one_reg(id) == 0x7000 == cpu.get_msrs([LSTAR])[LSTAR]
    assert all(isinstance(reg, int) for reg in cpu.get_reg_list())
    with pytest.raises(KvmError, match="no such register"):
        cpu.get_one_reg(k.KVM_REG_X86 | k.KVM_REG_SIZE_U64 | 0xFF << 32)


@pytest.mark.cap("KVM_CAP_GET_TSC_KHZ")
def test_the_tsc_has_a_frequency(vm: Vm, vcpu: Vcpu) -> None:
    khz = vcpu.get_tsc_khz()
    assert khz > 1000
    vcpu.set_tsc_khz(khz)
    assert vcpu.get_tsc_khz() == khz
    if vm.check_extension("KVM_CAP_TSC_CONTROL"):
        vcpu.set_tsc_khz(khz // 2)
        assert abs(vcpu.get_tsc_khz() - khz // 2) <= 1
    else:
        with pytest.raises(KvmError, match="KVM_CAP_TSC_CONTROL"):
            vcpu.set_tsc_khz(khz // 100)


@pytest.mark.cap("KVM_CAP_VCPU_ATTRIBUTES")
def test_the_tscs_offset_is_an_attribute_of_the_vcpu(vcpu: Vcpu) -> None:
    group, attr = k.KVM_VCPU_TSC_CTRL, k.KVM_VCPU_TSC_OFFSET
    if not vcpu.has_device_attr(group, attr):
        pytest.skip("KVM_HAS_DEVICE_ATTR(KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET) = no")
    now = vcpu.get_msrs([TSC])[TSC]
    vcpu.set_msrs({TSC: now + (1 << 50)})
    if vcpu.get_msrs([TSC])[TSC] < now + (1 << 50):
        pytest.skip("KVM_SET_MSRS(IA32_TSC) changes nothing: guests of this KVM have the host's")
    offset = (1 << 64) - 10**12
    vcpu.set_device_attr(group, attr, pack("<Q", offset))
    assert vcpu.get_device_attr(group, attr) == pack("<Q", offset)
    with pytest.raises(KvmError, match="no such group or attribute"):
        vcpu.set_device_attr(99, 0, bytes(8))


@pytest.mark.cap("KVM_CAP_KVMCLOCK_CTRL")
def test_a_guest_with_a_kvmclock_can_be_told_that_it_was_paused(vm: Vm, cpu: Vcpu) -> None:
    with pytest.raises(KvmError, match="has not set its kvmclock up"):
        cpu.kvmclock_ctrl()
    with ram(vm) as memory:
        start(cpu, memory, "f4")
        cpu.set_msrs({MSR_KVM_SYSTEM_TIME_NEW: 0x3000 | 1})
        cpu.kvmclock_ctrl()
        assert cpu.run() == exits.HltExit()
        flags = memory.read(0x3000 + 29, 1)[0]  # struct pvclock_vcpu_time_info.flags
        assert flags & 2  # PVCLOCK_GUEST_STOPPED


@pytest.mark.cap("KVM_CAP_MCE")
def test_a_corrected_machine_check_lands_in_its_bank(kvm: Kvm, vcpu: Vcpu) -> None:
    capabilities = kvm.x86_get_mce_cap_supported() & ~0xFF
    vcpu.x86_setup_mce(capabilities | 10)
    assert vcpu.get_msrs([0x179])[0x179] & 0xFF == 10
    vcpu.x86_set_mce(1, 1 << 63 | 0x150, addr=0x1234)
    bank = {IA32_MC0_STATUS + 4: 1 << 63 | 0x150, IA32_MC0_ADDR + 4: 0x1234}
    assert vcpu.get_msrs(bank) == bank
    with pytest.raises(KvmError, match=r"bit 63 \(VAL\)"):
        vcpu.x86_set_mce(1, 0x150)
    with pytest.raises(KvmError, match=r"x86_setup_mce\(\) did not make"):
        vcpu.x86_set_mce(10, 1 << 63)
    with pytest.raises(KvmError, match="too many banks"):
        vcpu.x86_setup_mce(255)


@pytest.mark.cap("KVM_CAP_ENABLE_CAP")
def test_capabilities_of_a_vcpu_are_not_those_of_a_vm(cpu: Vcpu) -> None:
    if cpu.vm.check_extension("KVM_CAP_ENFORCE_PV_FEATURE_CPUID"):
        assert cpu.enable_cap("KVM_CAP_ENFORCE_PV_FEATURE_CPUID", 1) == 0
    with pytest.raises(KvmError, match="cannot be enabled here"):
        cpu.enable_cap("KVM_CAP_SPLIT_IRQCHIP", 24)


def test_addresses_are_translated_as_the_vcpu_would(vm: Vm, cpu: Vcpu) -> None:
    with ram(vm, 0x20000) as memory:
        start_ring3(cpu, memory, "90")
        memory[0x12008] = pack("<Q", 0x400000 | 0x87)  # 2 MiB at 0x200000 lie at 0x400000
        found = cpu.translate(0x201234)
        assert (found.valid, found.physical_address) == (1, 0x401234)
        assert cpu.translate(CODE).physical_address == CODE
        assert not cpu.translate(1 << 40).valid
