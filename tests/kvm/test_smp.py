"""Several vCPUs in one run."""

from __future__ import annotations

import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

import pykvm
from pykvm import result as reasons
from pykvm.devices.access import PioAccess
from pykvm.vcpu_thread import Runner

COUNT = "mov ecx,1000; l: lock inc qword ptr [0x9000]; dec ecx; jnz l; "


def enter_all(m: pykvm.Machine, text: str, **options: int) -> None:
    m.load(pykvm.asm(text, at=0x10000))
    for cpu in m.cpus:
        cpu.enter("long64", entry=0x10000, stack=0x20000 + 0x1000 * cpu.index, **options)
        cpu.rdi = cpu.index


def test_every_vcpu_that_was_entered_runs_and_all_must_halt() -> None:
    with pykvm.Machine(memory="2M", cpus=4) as m:
        enter_all(m, COUNT + "hlt")
        result = m.run(timeout=60)
        assert result.reason == reasons.HALTED
        assert m.mem.u64[0x9000] == 4000
        assert result.exits == 4


def test_a_vcpu_that_was_not_entered_does_not_run() -> None:
    with pykvm.Machine(memory="2M", cpus=2) as m:
        m.load(pykvm.asm("hlt"), at=0x10000)
        m.cpu.enter("long64", entry=0x10000)
        result = m.run(timeout=60)
        assert (result.reason, result.exits) == (reasons.HALTED, 1)


def test_handlers_of_several_vcpus_run_one_at_a_time() -> None:
    with pykvm.Machine(memory="2M", cpus=2) as m:
        enter_all(m, "mov ecx,50; l: out 0x10,al; dec ecx; jnz l; hlt")
        inside = threading.Semaphore(1)
        threads: set[int] = set()

        @m.on_pio(0x10)
        def _(exit: PioAccess) -> None:
            assert inside.acquire(blocking=False)
            threads.add(threading.get_ident())
            inside.release()

        assert m.run(timeout=60).reason == reasons.HALTED
        assert len(threads) == 2


@pytest.mark.parametrize("culprit", [0, 1])
def test_one_that_ends_otherwise_ends_the_run_for_all(culprit: int) -> None:
    with pykvm.Machine(memory="2M", cpus=2) as m:
        enter_all(m, f"cmp edi,{culprit}; je u; l: jmp l; u: mov al,3; out 0xf4,al; jmp l")
        m.debug_exit(0xF4)
        result = m.run(timeout=60)
        assert (result.reason, result.code, result.cpu) == (reasons.DEBUG_EXIT, 3, culprit)
        assert m.run(timeout=0.1).reason == reasons.TIMEOUT  # no stop is left over


@pytest.mark.parametrize("culprit", [0, 1])
def test_an_exception_of_any_vcpus_handler_is_the_callers(culprit: int) -> None:
    with pykvm.Machine(memory="2M", cpus=2) as m:
        enter_all(m, f"cmp edi,{culprit}; je u; l: jmp l; u: out 0x10,al; jmp l")

        def handler(exit: PioAccess) -> None:
            raise LookupError("mine")

        m.on_pio(0x10, handler)
        with pytest.raises(LookupError, match="mine"):
            m.run(timeout=60)
        assert threading.active_count() == 1


def test_a_timeout_says_where_each_was() -> None:
    with pykvm.Machine(memory="2M", cpus=2) as m:
        enter_all(m, "l: jmp l")
        result = m.run(timeout=0.1)
        assert result.reason == reasons.TIMEOUT
        assert [state.index for state in result.cpus] == [0, 1]
        assert all(state.rip == 0x10000 for state in result.cpus)


def test_stop_reaches_all() -> None:
    with pykvm.Machine(memory="2M", cpus=3) as m:
        enter_all(m, "l: jmp l")
        timer = threading.Timer(0.05, m.stop)
        timer.start()
        assert m.run(timeout=60).reason == reasons.STOPPED
        timer.join(60)


def test_with_an_irqchip_the_second_waits_for_its_start_up_ipi_and_gets_it() -> None:
    """INIT, SIPI to APIC 1 (SDM Vol. 3A §9.4.4.1); it then starts in real mode at 0x11000."""
    with pykvm.Machine(memory="2M", cpus=2, irqchip=True) as m:
        m.load(pykvm.asm("mov byte ptr [0x9000],1; cli; h: hlt; jmp h", mode="real16"), at=0x11000)
        m.load(
            pykvm.asm(
                """
                mov ebx,0xfee00000
                mov dword ptr [rbx+0xf0],0x1ff       # software-enable the APIC
                mov dword ptr [rbx+0x310],0x01000000 # to APIC ID 1
                mov dword ptr [rbx+0x300],0x00004500 # INIT
                mov dword ptr [rbx+0x310],0x01000000
                mov dword ptr [rbx+0x300],0x00004611 # start-up, page 0x11
                w: pause
                cmp byte ptr [0x9000],1
                jne w
                out 0xf4,al
                """
            ),
            at=0x10000,
        )
        m.cpu.enter("long64", entry=0x10000, map_size=1 << 32)
        m.debug_exit(0xF4)
        result = m.run(timeout=60)
        assert result.reason == reasons.DEBUG_EXIT, result


def test_each_vcpu_has_its_own_apic_id_in_cpuid() -> None:
    with pykvm.Machine(memory="2M", cpus=3) as m:
        enter_all(m, "mov eax,1; cpuid; shr ebx,24; mov [0x9000+rdi],bl; hlt")
        assert m.run(timeout=60).reason == reasons.HALTED
        assert m.mem[0x9000:0x9003] == bytes([0, 1, 2])


def test_a_vcpu_that_had_halted_stays_halted_when_the_run_is_taken_up_again() -> None:
    with pykvm.Machine(memory="2M", cpus=2) as m:
        enter_all(m, "test edi,edi; jnz h; l: jmp l; h: hlt; ud2")
        for _ in range(3):
            result = m.run(timeout=0.2)
            assert result.reason == reasons.TIMEOUT, result
            assert [state.halted for state in result.cpus] == [False, True]
        m.load(pykvm.asm("mov al,1; out 0xf4,al", at=0x11000))
        m.debug_exit(0xF4)
        m.cpus[1].rip = 0x11000  # a new state: it goes on from there
        assert m.run(timeout=60).reason == reasons.DEBUG_EXIT


def test_of_two_that_end_at_once_the_second_is_reported_by_the_next_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pykvm.Machine(memory="2M", cpus=2) as m:
        enter_all(m, "mov eax,edi; out 0xf4,al; l: jmp l")
        m.debug_exit(0xF4)
        barrier = threading.Barrier(2)
        for cpu in m.cpus:
            loop = cpu._runner._loop

            def together(lock: object, loop: object = loop) -> object:
                end = loop(lock)  # type: ignore[operator]
                if first:
                    barrier.wait(60)
                return end

            monkeypatch.setattr(cpu._runner, "_loop", together)
        first = True
        codes = [m.run(timeout=60).code]
        first = False
        codes.append(m.run(timeout=60).code)
        assert sorted(code for code in codes if code is not None) == [0, 1]


def test_a_stop_does_not_wait_for_a_vcpu_that_did_not_run() -> None:
    with pykvm.Machine(memory="2M", cpus=2) as m:
        m.load(pykvm.asm("out 0x10,al; hlt", at=0x10000))
        m.on_pio(0x10, lambda exit: m.stop())
        m.cpu.enter("long64", entry=0x10000)
        assert m.run(timeout=60).reason == reasons.STOPPED
        m.cpu.enter("long64", entry=0x10002)
        m.cpus[1].enter("long64", entry=0x10002)
        assert m.run(timeout=60).reason == reasons.HALTED


def test_a_second_run_at_once_is_refused_and_does_not_end_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stopped: list[int] = []
    monkeypatch.setattr(Runner, "stop", lambda runner: stopped.append(runner.c.index))
    with pykvm.Machine(memory="2M", cpus=2) as m:
        enter_all(m, "out 0x10,al; hlt")
        inside, go_on = threading.Event(), threading.Event()

        @m.on_pio(0x10)
        def _(exit: PioAccess) -> None:
            inside.set()
            assert go_on.wait(60)

        with ThreadPoolExecutor(1) as other:
            run = other.submit(m.run, 60)
            assert inside.wait(60)
            with pytest.raises(pykvm.BusyError):
                m.run()
            assert not stopped
            go_on.set()
            assert run.result(60).reason == reasons.HALTED


def test_a_thread_that_cannot_be_had_leaves_none_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def scarce(thread: threading.Thread) -> None:
        if thread.name == "vcpu2":
            raise RuntimeError("can't start new thread")
        start(thread)

    with pykvm.Machine(memory="2M", cpus=3) as m:
        enter_all(m, "l: jmp l")
        monkeypatch.setattr(threading.Thread, "start", scarce)
        with pytest.raises(RuntimeError, match="can't start"):
            m.run(timeout=60)
        assert threading.active_count() == 1
        monkeypatch.undo()
        assert m.run(timeout=0.1).reason == reasons.TIMEOUT


def test_a_second_vcpu_that_is_entered_needs_no_start_up_ipi() -> None:
    with pykvm.Machine(memory="2M", cpus=2, irqchip=True) as m:
        m.load(pykvm.asm("l: jmp l; mov al,1; out 0xf4,al", at=0x10000))
        m.debug_exit(0xF4)
        m.cpu.enter("long64", entry=0x10000)
        m.cpus[1].enter("long64", entry=0x10002)
        result = m.run(timeout=60)
        assert (result.reason, result.cpu) == (reasons.DEBUG_EXIT, 1)


def test_ctrl_c_again_and_again_ends_no_run_before_every_vcpu_is_home() -> None:
    """The first comes to the vCPU of the main thread, the next while it waits for the others."""
    with pykvm.Machine(memory="2M", cpus=2) as m:
        enter_all(m, "l: out 0x10,al; jmp l")
        main = threading.get_ident()
        at_home, inside = threading.Event(), threading.Event()

        @m.on_pio(0x10)
        def _(exit: PioAccess) -> None:
            if threading.get_ident() != main:
                inside.set()
                assert at_home.wait(60)

        def press() -> None:
            assert inside.wait(60)
            for pause in (0, 0.1, 0.1):  # the main thread gets to its wait meanwhile
                at_home.wait(pause)
                signal.pthread_kill(main, signal.SIGINT)
            at_home.wait(0.1)
            at_home.set()

        with ThreadPoolExecutor(1) as other:
            pressed = other.submit(press)
            result = m.run(timeout=60)
            pressed.result(60)
        assert result.reason == reasons.INTERRUPTED
        assert [state.index for state in result.cpus] == [0, 1]


def test_claims_that_come_and_go_do_not_pile_up_while_another_vcpu_sleeps() -> None:
    """A guest can have its PCI devices moved as often as it likes."""
    most, sleeping = 0, "l: pause; cmp byte ptr [0x9000], 1; jne l; hlt"
    with pykvm.Machine(memory="2M", cpus=2) as m:
        code = "test edi, edi; jnz other; mov ecx, 1500; k: out 0x10, al; dec ecx; jnz k; "
        code += f"mov byte ptr [0x9000], 1; hlt; other: {sleeping}"
        enter_all(m, code)

        def move(access: PioAccess) -> None:
            nonlocal most
            m.pio.ignore(0x20).release()
            most = max(most, len(m.pio._retired))

        m.on_pio(0x10, move)
        assert m.run(timeout=60).reason == reasons.HALTED
        assert most < 400, most
