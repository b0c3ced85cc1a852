"""KVM_RUN: what interrupts a guest, and what interrupts the run."""

from __future__ import annotations

import signal
import threading
from struct import pack

import pytest

from pykvm.errors import KvmError
from pykvm.kvm import Kvm, Vcpu, exits
from tests.support.tiny_guest import Ram, ram, run_to, start


def handler(memory: Ram, vector: int, value: int) -> None:
    """An interrupt handler that writes ``value`` to port 0xe9."""
    memory[vector * 4] = pack("<HH", 0x3000, 0)
    memory[0x3000] = bytes.fromhex(f"b0{value:02x} e6e9 cf")  # mov al, value; out 0xe9, al; iret


def test_an_interrupt_reaches_its_handler(cpu: Vcpu, memory: Ram) -> None:
    handler(memory, 0x20, 0x77)
    start(cpu, memory, "fb 90 90 f4")  # sti; nop; nop; hlt
    cpu.interrupt(0x20)
    assert cpu.run() == exits.IoExit(0xE9, 1, 1, True, b"\x77")
    with pytest.raises(KvmError, match="not in 0-255"):
        cpu.interrupt(256)


@pytest.mark.cap("KVM_CAP_SPLIT_IRQCHIP")
def test_with_a_local_apic_one_interrupt_waits_at_a_time(kvm: Kvm) -> None:
    with kvm.create_vm() as vm:
        vm.enable_cap("KVM_CAP_SPLIT_IRQCHIP", 24)
        with vm.create_vcpu(0) as vcpu:
            vcpu.interrupt(0x20)
            with pytest.raises(KvmError, match="waiting to be injected already"):
                vcpu.interrupt(0x21)


@pytest.mark.cap("KVM_CAP_IRQCHIP")
def test_with_the_pic_in_the_kernel_interrupts_are_lines(kvm: Kvm) -> None:
    with kvm.create_vm() as vm:
        vm.create_irqchip()
        with vm.create_vcpu(0) as vcpu, pytest.raises(KvmError, match=r"irq_line\(\)"):
            vcpu.interrupt(0x20)


def test_an_open_interrupt_window_exits_when_asked_for(cpu: Vcpu, memory: Ram) -> None:
    start(cpu, memory, "90 fb 90 ebfd")  # nop; sti; nop; jmp to the nop
    cpu.kvm_run.request_interrupt_window = 1
    assert run_to(cpu, exits.IrqWindowOpenExit) == exits.IrqWindowOpenExit()
    assert cpu.kvm_run.ready_for_interrupt_injection
    assert cpu.kvm_run.if_flag


@pytest.mark.cap("KVM_CAP_USER_NMI")
def test_an_nmi_reaches_its_handler_with_interrupts_off(cpu: Vcpu, memory: Ram) -> None:
    handler(memory, 2, 0x42)
    start(cpu, memory, "90 90 f4")
    cpu.nmi()
    assert cpu.run() == exits.IoExit(0xE9, 1, 1, True, b"\x42")
    assert cpu.run() == exits.HltExit()


@pytest.mark.cap("KVM_CAP_X86_SMM")
def test_an_smi_is_pending_until_the_guest_runs(cpu: Vcpu) -> None:
    cpu.smi()
    assert cpu.get_vcpu_events().smi.pending


@pytest.mark.cap("KVM_CAP_IMMEDIATE_EXIT")
def test_an_immediate_exit_completes_the_access_before_it(cpu: Vcpu, memory: Ram) -> None:
    start(cpu, memory, "e410 f4")
    assert isinstance(cpu.run(), exits.IoExit)
    before = cpu.get_regs()
    cpu.complete_io(0x42)
    cpu.immediate_exit = 1
    assert cpu.run() == exits.IntrExit()
    after = cpu.get_regs()
    assert after.rax & 0xFF == 0x42
    assert (before.rip, after.rip) in ((0x1000, 0x1002), (0x1002, 0x1002))
    cpu.immediate_exit = 0
    assert cpu.run() == exits.HltExit()


def test_a_blocked_signal_can_end_a_run_without_being_delivered(cpu: Vcpu, memory: Ram) -> None:
    start(cpu, memory, "ebfe")  # jmp to itself
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    delivered: list[int] = []
    old = signal.signal(signal.SIGUSR1, lambda number, _: delivered.append(number))
    try:
        cpu.set_signal_mask(set(range(1, 65)) - {signal.SIGUSR1})
        signal.raise_signal(signal.SIGUSR1)
        assert cpu.run() == exits.IntrExit()
        assert signal.SIGUSR1 in signal.sigpending()
        assert delivered == []
        assert signal.sigwait([signal.SIGUSR1]) == signal.SIGUSR1
        cpu.set_signal_mask(None)
    finally:
        signal.signal(signal.SIGUSR1, old)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_ctrl_c_ends_a_guest_that_never_exits(cpu: Vcpu, memory: Ram) -> None:
    start(cpu, memory, "ebfe")
    main = threading.main_thread().ident
    assert main is not None
    entered, seen = threading.Event(), threading.Event()

    def interrupt() -> None:
        entered.wait()
        signal.pthread_kill(main, signal.SIGINT)
        while not seen.wait(0.05):  # it may have come just before KVM_RUN, which then never knew
            signal.pthread_kill(main, signal.SIGINT)

    def once(number: int, frame: object) -> None:
        if not seen.is_set():
            seen.set()
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, once)
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            entered.set()
            while True:
                cpu.run()
    finally:
        thread.join(60)
        signal.signal(signal.SIGINT, before)


@pytest.mark.cap("KVM_CAP_VAPIC")
@pytest.mark.cap("KVM_CAP_IRQCHIP")
def test_the_task_priority_can_be_reported_and_shared(kvm: Kvm, vcpu: Vcpu) -> None:
    vcpu.tpr_access_reporting(True)
    vcpu.tpr_access_reporting(False)
    with pytest.raises(KvmError, match="no flags are defined"):
        vcpu.tpr_access_reporting(True, 1)
    with pytest.raises(KvmError, match="no in-kernel local APIC"):
        vcpu.set_vapic_addr(0x5000)
    with kvm.create_vm() as vm:
        vm.create_irqchip()
        with vm.create_vcpu(0) as cpu, ram(vm):
            cpu.set_vapic_addr(0x5000)
            cpu.set_vapic_addr(0)


@pytest.mark.cap("KVM_CAP_PRE_FAULT_MEMORY")
def test_memory_can_be_mapped_before_the_guest_touches_it(cpu: Vcpu, memory: Ram) -> None:
    assert cpu.pre_fault_memory(0, 0x10000) == 0
    with pytest.raises(KvmError, match="no memory slot at gpa"):
        cpu.pre_fault_memory(0x4000_0000, 4096)
