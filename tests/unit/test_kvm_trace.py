"""The trace: each ioctl as a line, its structures by the kernel's names."""

from __future__ import annotations

import errno
import io
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykvm import kvm as k
from pykvm._abi import ffi, lib
from pykvm.errors import KvmError
from pykvm.kvm import decode
from pykvm.kvm.tracing import log_run
from tests.support.fake_ioctl import FakeKernel, fake_vcpu

Fake = tuple[FakeKernel, k.Kvm, k.Vm, k.Vcpu]


@pytest.fixture
def fake() -> Iterator[Fake]:
    with fake_vcpu() as made:
        yield made


def lines_of(action: Any) -> list[str]:
    lines: list[str] = []
    with k.trace(lines):
        action()
    return [line for line in lines if "KVM_CHECK_EXTENSION" not in line]


def test_a_structure_is_printed_with_names_and_result(fake: Fake) -> None:
    vm = fake[2]
    lines = lines_of(
        lambda: vm.set_user_memory_region(0, 0, 0x20_0000, 0x7F00_0000_0000, k.KVM_MEM_READONLY)
    )
    assert lines == [
        f"ioctl(vm {vm.fd}, KVM_SET_USER_MEMORY_REGION, {{slot=0, flags=KVM_MEM_READONLY, "
        "guest_phys_addr=0x0, memory_size=0x200000, userspace_addr=0x7f0000000000}) = 0"
    ]


def test_a_capability_is_printed_by_name(fake: Fake) -> None:
    fake[0].caps["KVM_CAP_NR_VCPUS"] = 1024
    lines: list[str] = []
    with k.trace(lines):
        fake[1].check_extension("KVM_CAP_NR_VCPUS")
        fake[1].check_extension(99_999)
    fd = fake[1].fd
    assert lines == [
        f"ioctl(kvm {fd}, KVM_CHECK_EXTENSION, KVM_CAP_NR_VCPUS) = 1024",
        f"ioctl(kvm {fd}, KVM_CHECK_EXTENSION, 99999) = 1",
    ]


def test_an_error_is_printed_as_strace_prints_it(fake: Fake) -> None:
    kernel, _, vm, vcpu = fake
    kernel.answers["KVM_CREATE_IRQCHIP"] = -errno.EEXIST
    kernel.answers["KVM_GET_LAPIC"] = -errno.EINVAL
    kernel.answers["KVM_SET_MP_STATE"] = -errno.EINVAL

    def attempts() -> None:
        for attempt in (vm.create_irqchip, vcpu.get_lapic, lambda: vcpu.set_mp_state(3)):
            with pytest.raises(KvmError):
                attempt()

    assert lines_of(attempts) == [
        f"ioctl(vm {vm.fd}, KVM_CREATE_IRQCHIP) = -1 EEXIST (File exists)",
        f"ioctl(vcpu {vcpu.fd}, KVM_GET_LAPIC, {{}}) = -1 EINVAL (Invalid argument)",
        f"ioctl(vcpu {vcpu.fd}, KVM_SET_MP_STATE, {{mp_state=KVM_MP_STATE_HALTED}}) "
        "= -1 EINVAL (Invalid argument)",
    ]


def test_what_an_ioctl_returns_is_printed_after_it_was_filled(fake: Fake) -> None:
    def fill(arg: Any) -> int:
        arg.rip, arg.rflags = 0xFFF0, 2
        return 0

    fake[0].answers["KVM_GET_REGS"] = fill
    (line,) = lines_of(fake[3].get_regs)
    assert line.endswith("r15=0x0, rip=0xfff0, rflags=0x2}) = 0")


def test_what_changes_in_place_is_printed_before_and_after(fake: Fake) -> None:
    kernel, _, vm, vcpu = fake

    def progress(arg: Any) -> int:
        arg.gpa, arg.size = 0x3000, 0x1000
        return 0

    kernel.answers["KVM_PRE_FAULT_MEMORY"] = progress
    (line,) = lines_of(lambda: vcpu.pre_fault_memory(0, 0x4000))
    assert line.endswith(
        "KVM_PRE_FAULT_MEMORY, {gpa=0x0, size=0x4000, flags=0x0}) = 0 => {gpa=0x3000, size=0x1000}"
    )

    def merged(arg: Any) -> int:
        arg.status = -1
        return 0

    kernel.answers["KVM_IRQ_LINE_STATUS"] = merged
    (line,) = lines_of(lambda: vm.irq_line_status(4, 1))
    assert line.endswith("KVM_IRQ_LINE_STATUS, {irq=4, level=1}) = 0 => {status=-1}")


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        (lambda f: f[1].create_vm().close(), "KVM_CREATE_VM, 0) = "),
        (lambda f: f[2].create_vcpu(3).close(), "KVM_CREATE_VCPU, 3) = "),
        (lambda f: f[2].set_tss_addr(0xFFFB_D000), "KVM_SET_TSS_ADDR, 0xfffbd000) = 0"),
        (lambda f: f[2].set_identity_map_addr(0x1000), "KVM_SET_IDENTITY_MAP_ADDR, [0x1000]) = 0"),
        (
            lambda f: f[2].enable_cap("KVM_CAP_SPLIT_IRQCHIP", 24),
            "{cap=KVM_CAP_SPLIT_IRQCHIP, flags=0, args=[0x18, 0x0, 0x0, 0x0]}) = 0",
        ),
        (
            lambda f: f[2].ioeventfd(0x510, 2, 8, 7, k.KVM_IOEVENTFD_FLAG_PIO),
            "{datamatch=0x7, addr=0x510, len=2, fd=8, "
            "flags=KVM_IOEVENTFD_FLAG_DATAMATCH|KVM_IOEVENTFD_FLAG_PIO}) = 0",
        ),
        (
            lambda f: f[2].set_gsi_routing(
                [k.irqchip_route(1, k.KVM_IRQCHIP_IOAPIC, 1), k.msi_route(24, 0xFEE0_0000, 0x30)]
            ),
            "{nr=2, flags=0, entries=[{gsi=1, type=KVM_IRQ_ROUTING_IRQCHIP, flags=0, "
            "u.irqchip={irqchip=KVM_IRQCHIP_IOAPIC, pin=1}}, {gsi=24, type=KVM_IRQ_ROUTING_MSI, "
            "flags=0, u.msi={address_lo=0xfee00000, address_hi=0x0, data=0x30, devid=0}}]}) = 0",
        ),
        (
            lambda f: f[3].set_msrs({0xC000_0080: 0x500, 0x10: 1}),
            "{nmsrs=2, entries=[[0xc0000080]=0x500, [0x10]=0x1]}) = 2",
        ),
        (
            lambda f: f[3].set_cpuid2(
                [ffi.new("struct kvm_cpuid_entry2 *", {"function": 7, "flags": 1, "ebx": 0x20})]
            ),
            "{nent=1, entries=[{function=0x7, index=0x0, flags=KVM_CPUID_FLAG_SIGNIFCANT_INDEX, "
            "eax=0x0, ebx=0x20, ecx=0x0, edx=0x0}]}) = 0",
        ),
        (
            lambda f: f[3].set_guest_debug(k.KVM_GUESTDBG_ENABLE | k.KVM_GUESTDBG_SINGLESTEP),
            "{control=KVM_GUESTDBG_ENABLE|KVM_GUESTDBG_SINGLESTEP, arch={debugreg=[0x0, 0x0, 0x0, "
            "0x0, 0x0, 0x0, 0x0, 0x0]}}) = 0",
        ),
        (
            lambda f: f[2].create_device(4, 1),
            "{type=KVM_DEV_TYPE_VFIO, fd=0, flags=KVM_CREATE_DEVICE_TEST}) = 0",
        ),
        (lambda f: f[3].set_signal_mask([1, 2]), "{len=8, sigset=[03 00 00 00 00 00 00 00]}) = 0"),
        (lambda f: f[3].kvmclock_ctrl(), "KVM_KVMCLOCK_CTRL) = 0"),
    ],
)
def test_arguments_read_well(fake: Fake, action: Any, expected: str) -> None:
    (line,) = lines_of(lambda: action(fake))
    assert expected in line


def test_long_lists_are_cut(fake: Fake) -> None:
    (line,) = lines_of(lambda: fake[3].set_msrs(dict.fromkeys(range(100), 1)))
    assert "[0x7]=0x1, … 92 more]" in line
    assert "[0x8]" not in line


def test_the_apics_registers_are_printed_by_offset(fake: Fake) -> None:
    lapic = ffi.new("struct kvm_lapic_state *")
    ffi.cast("uint32_t *", lapic.regs)[0x30 // 4] = 0x5_0014
    (line,) = lines_of(lambda: fake[3].set_lapic(lapic))
    assert line.endswith("KVM_SET_LAPIC, {[0x30]=0x50014}) = 0")


def test_kvm_run_is_printed_with_its_exit(fake: Fake) -> None:
    kernel, _, _, vcpu = fake

    def halt(arg: Any) -> int:
        vcpu.kvm_run.exit_reason = lib.KVM_EXIT_HLT
        return 0

    kernel.answers["KVM_RUN"] = halt
    assert lines_of(vcpu.run) == [f"ioctl(vcpu {vcpu.fd}, KVM_RUN) = 0 HltExit()"]
    kernel.answers["KVM_RUN"] = -errno.EINTR
    assert lines_of(vcpu.run) == [
        f"ioctl(vcpu {vcpu.fd}, KVM_RUN) = -1 EINTR (Interrupted system call) IntrExit()"
    ]


def test_a_run_made_elsewhere_can_be_logged(fake: Fake) -> None:
    vcpu = fake[3]
    vcpu.kvm_run.exit_reason = lib.KVM_EXIT_SHUTDOWN
    assert not k.ioctl.tracing()
    lines: list[str] = []
    with k.trace(lines):
        assert k.ioctl.tracing()
        log_run(vcpu, 0)
        log_run(vcpu, -errno.EFAULT)
    log_run(vcpu, 0)  # off: nobody listens
    assert lines == [
        f"ioctl(vcpu {vcpu.fd}, KVM_RUN) = 0 ShutdownExit()",
        f"ioctl(vcpu {vcpu.fd}, KVM_RUN) = -1 EFAULT (Bad address)",
    ]


# -- sinks -----------------------------------------------------------------------------------------


def test_a_sink_is_a_callable_a_file_or_a_list(
    fake: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    vcpu, file = fake[3], io.StringIO()
    lines: list[str] = []
    called: list[str] = []
    with k.trace(lines), k.trace(file), k.trace(called.append), k.trace():
        vcpu.kvmclock_ctrl()
    assert lines == called == file.getvalue().splitlines() == capsys.readouterr().err.splitlines()
    assert len(lines) == 2  # the capability, and the ioctl
    with pytest.raises(TypeError, match="callable, a file or a list"):
        k.trace(5)


def test_a_trace_ends_with_its_block_and_traces_nest(fake: Fake) -> None:
    vcpu = fake[3]
    vcpu.nmi()
    outer: list[str] = []
    inner: list[str] = []
    with k.trace(outer):
        vcpu.nmi()
        with k.trace(inner), pytest.raises(ZeroDivisionError):
            vcpu.nmi()
            1 / 0  # noqa: B018
        vcpu.nmi()
    vcpu.nmi()
    assert (len(outer), len(inner)) == (3, 1)
    assert not k.ioctl.tracing()


def test_the_same_sink_twice_ends_one_at_a_time(fake: Fake) -> None:
    vcpu = fake[3]
    lines: list[str] = []
    vcpu.nmi()
    with k.trace(lines.append):
        with k.trace(lines.append):
            vcpu.nmi()
        vcpu.nmi()
    assert len(lines) == 3


def test_traces_may_end_in_any_order(fake: Fake) -> None:
    vcpu = fake[3]
    vcpu.nmi()
    first: list[str] = []
    second: list[str] = []
    one, two = k.trace(first), k.trace(second)
    one.__enter__()
    two.__enter__()
    one.__exit__()
    vcpu.nmi()
    two.__exit__()
    assert (len(first), len(second)) == (0, 1)
    assert not k.ioctl.tracing()


def test_what_a_sink_asks_of_kvm_is_not_traced(fake: Fake) -> None:
    vcpu = fake[3]
    vcpu.nmi()
    lines: list[str] = []

    def curious(line: str) -> None:
        vcpu.get_regs()
        lines.append(line)

    with k.trace(curious):
        vcpu.nmi()
    assert len(lines) == 1
    assert len(fake[0].named("KVM_GET_REGS")) == 1


def test_a_sink_that_fails_does_not_stop_the_tracing(fake: Fake) -> None:
    vcpu = fake[3]
    vcpu.nmi()
    lines: list[str] = []

    def failing(line: str) -> None:
        lines.append(line)
        raise RuntimeError("disk full")

    with k.trace(failing):
        for _ in range(2):
            with pytest.raises(RuntimeError, match="disk full"):
                vcpu.nmi()
    assert len(lines) == 2
    assert len(fake[0].named("KVM_NMI")) == 3


def test_lines_of_threads_do_not_mix(fake: Fake) -> None:
    vcpu = fake[3]
    vcpu.nmi()
    lines: list[str] = []
    inside: list[int] = []
    overlaps: list[int] = []
    start = threading.Barrier(4)

    def sink(line: str) -> None:
        inside.append(1)
        os.sched_yield()  # gives others every chance to come in between
        overlaps.extend(inside[1:])
        lines.append(line)
        inside.pop()

    def work() -> None:
        start.wait()
        for _ in range(50):
            vcpu.nmi()

    with k.trace(sink):
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert lines == [f"ioctl(vcpu {vcpu.fd}, KVM_NMI) = 0"] * 200
    assert not overlaps


# -- decoding by type ------------------------------------------------------------------------------

KERNEL_STRUCTS = sorted(
    name for name in ffi.list_types()[1] if name.startswith("kvm_") and "s390" not in name
)


@pytest.mark.parametrize("tag", KERNEL_STRUCTS)
def test_every_structure_of_the_header_can_be_printed(tag: str) -> None:
    pointer = ffi.typeof(f"struct {tag} *")
    size = ffi.sizeof(pointer.item)
    for byte in (b"\x00", b"\x01"):
        text = decode.argument(ffi.new(pointer), byte * size)
        assert text[0] in "{[" and (text[-1] == "}" or tag == "kvm_msr_entry")


@given(value=st.integers(0, (1 << 32) - 1))
def test_flags_add_up_to_their_value(value: int) -> None:
    parts = decode.flag_names("KVM_IOEVENTFD_FLAG_", value).split("|")
    total = 0
    for part in parts:
        total |= getattr(lib, part) if part.startswith("KVM_") else int(part, 16)
    assert total == value


def test_the_entries_of_a_refused_list_are_not_read_beyond_what_was_given(fake: Fake) -> None:
    """E2BIG leaves a count in the structure that is larger than its room."""

    def too_big(arg: Any) -> int:
        arg.nmsrs = 50_000
        return -errno.E2BIG

    fake[0].answers["KVM_GET_MSR_INDEX_LIST"] = too_big

    def attempt() -> None:
        with pytest.raises(KvmError):
            fake[1].get_msr_index_list()

    assert all("E2BIG" in line for line in lines_of(attempt))
