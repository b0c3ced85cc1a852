"""KVM_RUN: the exits a guest makes, answering them, and the life of a vCPU."""

from __future__ import annotations

import gc
import signal
import sys
import threading
from pathlib import Path

import pytest

from pykvm import kvm as k
from pykvm.errors import ClosedError, KvmError
from pykvm.kvm import Kvm, Vcpu, Vm, exits
from tests.support.tiny_guest import Ram, ram, start, start_ring3

# -- exits and answers -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "size", "data"),
    [
        ("66b844332211 e610 f4", 1, b"\x44"),
        ("66b844332211 e710 f4", 2, b"\x44\x33"),
        ("66b844332211 66e710 f4", 4, b"\x44\x33\x22\x11"),
    ],
)
def test_out_exits_with_port_size_and_value(
    cpu: Vcpu, memory: Ram, code: str, size: int, data: bytes
) -> None:
    start(cpu, memory, code)
    exit = cpu.run()
    assert exit == exits.IoExit(0x10, size, 1, True, data)
    assert isinstance(exit, exits.IoExit)
    assert exit.value == int.from_bytes(data, "little")
    assert cpu.run() == exits.HltExit()


@pytest.mark.parametrize(
    ("code", "size", "answer", "rax"),
    [
        ("e410 f4", 1, 0xAB, 0xFFFF_FFFF_FFFF_FFAB),
        ("e510 f4", 2, 0xABCD, 0xFFFF_FFFF_FFFF_ABCD),
        ("66e510 f4", 4, 0x89AB_CDEF, 0x89AB_CDEF),
    ],
)
def test_in_exits_and_gets_its_answer(
    cpu: Vcpu, memory: Ram, code: str, size: int, answer: int, rax: int
) -> None:
    start(cpu, memory, code, rax=(1 << 64) - 1)
    assert cpu.run() == exits.IoExit(0x10, size, 1, False, b"")
    cpu.complete_io(answer)
    assert cpu.run() == exits.HltExit()
    assert cpu.get_regs().rax == rax


def test_rep_ins_is_answered_item_by_item(cpu: Vcpu, memory: Ram) -> None:
    # cld; mov cx, 600; mov di, 0x2000; mov dx, 0x1f0; rep insw; hlt
    start(cpu, memory, "fc b95802 bf0020 baf001 f36d f4")
    data = bytes(n * 7 & 0xFF for n in range(1200))
    sent = 0
    counts = []
    exit = cpu.run()
    while isinstance(exit, exits.IoExit):
        assert (exit.port, exit.size, exit.is_write) == (0x1F0, 2, False)
        counts.append(exit.count)
        cpu.complete_io(data[sent : sent + 2 * exit.count])
        sent += 2 * exit.count
        exit = cpu.run()
    assert exit == exits.HltExit()
    assert sum(counts) == 600
    assert max(counts) <= 512  # the page that port data passes through, cut at 1024 bytes
    assert memory.read(0x2000, 1200) == data


def test_rep_outs_writes_all_its_items(cpu: Vcpu, memory: Ram) -> None:
    memory[0x2000] = b"hello, ports"
    # cld; mov cx, 6; mov si, 0x2000; mov dx, 0xe9; rep outsw; hlt
    start(cpu, memory, "fc b90600 be0020 bae900 f36f f4")
    written = b""
    exit = cpu.run()
    while isinstance(exit, exits.IoExit):
        assert (exit.port, exit.size, exit.is_write) == (0xE9, 2, True)
        assert exit.items == [
            int.from_bytes(exit.data[i : i + 2], "little") for i in range(0, len(exit.data), 2)
        ]
        written += exit.data
        exit = cpu.run()
    assert exit == exits.HltExit()
    assert written == b"hello, ports"


def test_mmio_reads_and_writes_exit(cpu: Vcpu, memory: Ram) -> None:
    # mov ax, 0xd000; mov ds, ax; mov eax, [0x20]; inc eax; mov [0x30], eax; hlt
    start(cpu, memory, "b800d0 8ed8 66a12000 6640 66a33000 f4")
    assert cpu.run() == exits.MmioExit(0xD0020, 4, False, b"")
    cpu.complete_mmio(0x1122_3344)
    exit = cpu.run()
    assert exit == exits.MmioExit(0xD0030, 4, True, b"\x45\x33\x22\x11")
    assert isinstance(exit, exits.MmioExit)
    assert exit.value == 0x1122_3345
    assert cpu.run() == exits.HltExit()


def test_an_access_across_a_page_comes_in_pieces_of_odd_widths(cpu: Vcpu, memory: Ram) -> None:
    # mov ax, 0xd000; mov ds, ax; mov eax, [0xffd]; mov [0x1ffd], eax; hlt
    start(cpu, memory, "b800d0 8ed8 66a1fd0f 66a3fd1f f4")
    assert cpu.run() == exits.MmioExit(0xD0FFD, 3, False, b"")
    cpu.complete_mmio(b"\x11\x22\x33")
    assert cpu.run() == exits.MmioExit(0xD1000, 1, False, b"")
    cpu.complete_mmio(0x44)
    assert cpu.run() == exits.MmioExit(0xD1FFD, 3, True, b"\x11\x22\x33")
    assert cpu.run() == exits.MmioExit(0xD2000, 1, True, b"\x44")
    assert cpu.run() == exits.HltExit()


def test_a_triple_fault_is_a_shutdown(cpu: Vcpu, memory: Ram) -> None:
    start_ring3(cpu, memory, "0f0b")  # ud2, and no IDT
    sregs = cpu.get_sregs()
    sregs.idt.limit = 0
    cpu.set_sregs(sregs)
    assert cpu.run() == exits.ShutdownExit()


def test_memory_that_is_gone_from_this_process_is_an_error_in_words(cpu: Vcpu, vm: Vm) -> None:
    gone = Ram(0x10000)
    with ram(vm, 0x20000) as memory:
        vm.set_user_memory_region(1, 0x100000, 0x10000, gone.address)
        start_ring3(cpu, memory, "8a042500001000 e6e9")  # mov al, [0x100000]; out 0xe9, al
        gone.close()
        try:
            exit = cpu.run()
        except KvmError as error:
            assert "guest memory is not there in this process" in str(error)
        else:
            assert isinstance(exit, exits.MemoryFaultExit)
            assert (exit.gpa, exit.size) == (0x100000, 4096)
        vm.set_user_memory_region(1, 0x100000, 0, 0)


@pytest.mark.cap("KVM_CAP_SET_GUEST_DEBUG")
def test_single_steps_exit(cpu: Vcpu, memory: Ram) -> None:
    start(cpu, memory, "90 90 90 f4")
    cpu.set_guest_debug(k.KVM_GUESTDBG_ENABLE | k.KVM_GUESTDBG_SINGLESTEP)
    for pc in (0x1001, 0x1002):
        exit = cpu.run()
        assert isinstance(exit, exits.DebugExit)
        assert (exit.exception, exit.pc) == (1, pc)
        assert exit.dr6 & 1 << 14  # BS: a single step
    cpu.set_guest_debug(0)
    assert cpu.run() == exits.HltExit()


@pytest.mark.cap("KVM_CAP_SET_GUEST_DEBUG")
def test_breakpoints_in_debug_registers_exit(cpu: Vcpu, memory: Ram) -> None:
    start(cpu, memory, "90 90 90 f4")
    cpu.set_guest_debug(
        k.KVM_GUESTDBG_ENABLE | k.KVM_GUESTDBG_USE_HW_BP, [0x1002, 0, 0, 0, 0, 0, 0, 0x402]
    )
    exit = cpu.run()
    if exit == exits.HltExit():
        pytest.skip("KVM_GUESTDBG_USE_HW_BP: the processor under this KVM ignores a guest's DR7")
    assert isinstance(exit, exits.DebugExit)
    assert exit.pc == 0x1002
    assert exit.dr6 & 1  # B0: the breakpoint of DR0
    cpu.set_guest_debug(0)
    assert cpu.run() == exits.HltExit()


@pytest.mark.cap("KVM_CAP_SET_GUEST_DEBUG")
def test_breakpoint_instructions_exit(cpu: Vcpu, memory: Ram) -> None:
    start_ring3(cpu, memory, "90 cc e6e9")
    cpu.set_guest_debug(k.KVM_GUESTDBG_ENABLE | k.KVM_GUESTDBG_USE_SW_BP)
    exit = cpu.run()
    if exit == exits.ShutdownExit():  # there is no IDT
        pytest.skip("KVM_GUESTDBG_USE_SW_BP: this KVM gives INT3 to the guest all the same")
    assert isinstance(exit, exits.DebugExit)
    assert (exit.exception, exit.pc) == (3, 0x1001)
    regs = cpu.get_regs()
    assert regs.rip == 0x1001
    regs.rip = 0x1002
    cpu.set_regs(regs)
    assert isinstance(cpu.run(), exits.IoExit)


# -- lifetimes, and the trace of it all ---------------------------------------------------


def test_a_run_page_that_is_kept_stays_mapped_until_it_is_dropped(kvm: Kvm) -> None:
    with kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        run = vcpu.kvm_run
    assert run.exit_reason == 0
    with pytest.raises(ClosedError):
        _ = vcpu.kvm_run
    assert "kvm-vcpu" in Path("/proc/self/maps").read_text()
    del run
    gc.collect()
    assert "kvm-vcpu" not in Path("/proc/self/maps").read_text()


def test_a_whole_life_can_be_traced(no_leak: None) -> None:
    lines: list[str] = []
    with (
        k.trace(lines),
        Kvm() as kvm,
        kvm.create_vm() as vm,
        vm.create_vcpu(0) as vcpu,
        ram(vm) as memory,
    ):
        start(vcpu, memory, "b041 e6e9 f4")
        assert vcpu.run() == exits.IoExit(0xE9, 1, 1, True, b"A")
        assert vcpu.run() == exits.HltExit()
        fds = kvm.fd, vm.fd, vcpu.fd
    kvm_fd, vm_fd, vcpu_fd = fds
    expected = (
        f"ioctl(kvm {kvm_fd}, KVM_GET_API_VERSION) = 12",
        f"ioctl(kvm {kvm_fd}, KVM_CREATE_VM, 0) = {vm_fd}",
        f"ioctl(vm {vm_fd}, KVM_CREATE_VCPU, 0) = {vcpu_fd}",
        f"ioctl(vm {vm_fd}, KVM_SET_USER_MEMORY_REGION, {{slot=0, flags=0, guest_phys_addr=0x0, "
        f"memory_size=0x10000, userspace_addr={memory.address:#x}}}) = 0",
        f"ioctl(vcpu {vcpu_fd}, KVM_RUN) = 0 "
        "IoExit(port=0xe9, size=1, count=1, is_write=True, data=b'A')",
        f"ioctl(vcpu {vcpu_fd}, KVM_RUN) = 0 HltExit()",
    )
    assert [line for line in lines if line in expected] == list(expected)
    assert any("KVM_SET_REGS, {rax=" in line and "rip=0x1000" in line for line in lines)


def test_another_thread_may_use_a_vcpu_that_does_not_run(cpu: Vcpu, memory: Ram) -> None:
    start(cpu, memory, "b041 e6e9 f4")
    seen: list[exits.Exit] = []
    thread = threading.Thread(target=lambda: seen.append(cpu.run()))
    thread.start()
    thread.join(60)
    assert seen == [exits.IoExit(0xE9, 1, 1, True, b"A")]
    assert cpu.run() == exits.HltExit()


@pytest.mark.skipif(not hasattr(sys, "getswitchinterval"), reason="CPython only")
def test_the_gil_is_released_while_the_guest_runs(cpu: Vcpu, memory: Ram) -> None:
    """A guest that spins would otherwise stop every thread: one of them ends it here."""
    start(cpu, memory, "ebfe")
    running = threading.Event()

    def stop() -> None:
        running.wait()
        cpu.immediate_exit = 1
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGUSR1)

    old = signal.signal(signal.SIGUSR1, lambda *_: None)
    thread = threading.Thread(target=stop)
    thread.start()
    try:
        running.set()
        assert cpu.run() == exits.IntrExit()
    finally:
        thread.join(60)
        signal.signal(signal.SIGUSR1, old)
