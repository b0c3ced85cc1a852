"""Several vCPUs in one run."""

from __future__ import annotations

import threading

import pytest

import pykvm
from pykvm import result as reasons
from pykvm.devices.access import PioAccess

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
        timer.join()


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
