"""What a guest was given is written down, and given again: the same end, or where it strayed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

import pykvm
from pykvm import result as reasons
from pykvm.debug.input_log import COMPLETE, EXIT, IOCTL, MEMORY, REGISTERS
from pykvm.devices.access import PioAccess
from pykvm.errors import CapabilityError, ReplayError

ENTRY = 0x8000
SEEN = 0x10000
WINDOW = 0xD0000000

# Reads ports of every kind, and a register in memory; adds all of it up in memory, and writes it
# out again; last a string from a port.
GUEST = f"""
        mov     ebx, {SEEN}
        mov     ecx, 8
again:  in      al, 0x40
        movzx   eax, al
        call    note
        in      eax, 0x44
        call    note
        in      al, 0xe9
        call    note
        in      al, 0x50
        call    note
        mov     rax, [{WINDOW}]
        call    note
        mov     [{WINDOW + 8}], rax
        out     0xe9, al
        dec     ecx
        jnz     again
        mov     rdi, rbx
        mov     edx, 0x40
        mov     ecx, 300
        cld
        rep     insb
        out     0x10, al
        hlt
note:   mov     [rbx], rax
        add     rbx, 8
        ret
"""


@pytest.fixture
def machine() -> Iterator[pykvm.Machine]:
    with pykvm.Machine("256K") as m:
        yield m


def furnish(m: pykvm.Machine, seed: int) -> list[PioAccess]:
    """Devices that say other things for every seed; what was asked of the handler."""
    generator, asked = random.Random(seed), []

    @m.on_pio(0x40, count=8)
    def port(access: PioAccess) -> int:
        asked.append(access)
        return generator.getrandbits(8 * access.size)

    fifo = m.pio.fifo(0xE9)
    fifo.write(generator.randbytes(5))
    m.pio.constant(0x50, generator.getrandbits(8))
    m.on_mmio(WINDOW, 16, lambda access: generator.getrandbits(64))
    return asked


def start(m: pykvm.Machine, code: str, **options: int) -> None:
    m.load(pykvm.asm(code, mode="long64", at=ENTRY), at=ENTRY)
    m.cpu.enter("long64", entry=ENTRY, **options)


def same(a: pykvm.Snapshot, b: pykvm.Snapshot) -> None:
    diff = a.diff(b)
    assert not diff.pages and not diff.registers, diff


def test_a_replay_ends_as_the_recording_did_and_asks_nobody(machine: pykvm.Machine) -> None:
    asked = furnish(machine, 1)
    machine.pio.stop(0x10)
    start(machine, GUEST)
    with machine.snapshot() as s:
        with machine.record() as log:
            assert machine.run(timeout=20).reason == reasons.STOPPED
        with machine.snapshot() as end:
            first, calls = machine.memory.read(SEEN, 0x400), len(asked)
            assert log.exits == len(log) == sum(entry.kind == EXIT for entry in log)
            assert calls == 8 * 2 + 300
            for _ in range(2):
                s.restore()
                result = machine.replay(log, timeout=20).check()
                assert (result.reason, result.code) == (reasons.REPLAYED, log.exits)
                with machine.snapshot() as now:
                    same(end, now)
                assert len(asked) == calls
            # Asked again, the devices would say something else.
            s.restore()
            machine.run(timeout=20)
            assert machine.memory.read(SEEN, 0x400) != first


def test_another_machine_replays_it_without_any_device(
    machine: pykvm.Machine, tmp_path: Path
) -> None:
    furnish(machine, 2)
    machine.pio.stop(0x10)
    start(machine, GUEST)
    with machine.snapshot() as s:
        with machine.record() as log:
            machine.run(timeout=20)
        log.save(tmp_path / "log")
        loaded = pykvm.InputLog.load(tmp_path / "log")
        assert loaded.data == log.data and loaded.exits == log.exits
        s.devices.clear()
        s.claims.clear()
        with pytest.warns(RuntimeWarning, match="nobody serves"):
            other = s.fork()
        with machine.snapshot() as end, other:
            assert other.pio.find(0x40) is None
            assert other.replay(loaded, timeout=20).reason == reasons.REPLAYED
            with other.snapshot() as now:
                same(end, now)


def test_what_handlers_do_to_memory_and_registers_is_done_again(machine: pykvm.Machine) -> None:
    start(machine, "in al, 0x40; mov rbx, [0x20000]; hlt; mov rcx, r8; in al, 0x40; hlt")
    words = iter([b"first...", b"second.."])

    @machine.on_pio(0x40)
    def port(access: PioAccess) -> int:
        machine.memory.write(0x20000, next(words))
        machine.memory.u8[0x30000] = 7
        return 3

    @machine.on_hlt
    def hlt(exit: object) -> bool:
        if machine.cpu.r8:
            return False
        machine.cpu.r8 = 0x1234
        machine.cpu.msr["KERNEL_GS_BASE"] = 0x5000  # what was set before goes along
        machine.cpu.r9 = 0x5678
        return True

    with machine.snapshot() as s:
        with machine.record() as log:
            machine.run(timeout=20)
            machine.memory.write(0x31000, b"after the last exit")
        assert {entry.kind for entry in log} == {EXIT, MEMORY, REGISTERS, IOCTL}
        with machine.snapshot() as end:
            assert machine.cpu.rbx == int.from_bytes(b"first...", "little")
            assert (machine.cpu.rcx, machine.cpu.r9) == (0x1234, 0x5678)
            s.restore()
            machine.replay(log, timeout=20).check()
            with machine.snapshot() as now:
                same(end, now)


def test_msrs_that_a_handler_answers(machine: pykvm.Machine) -> None:
    start(machine, "mov ecx, 0x8b; rdmsr; mov ebx, eax; mov eax, 5; wrmsr; hlt")
    values, written = iter([0x77, 0x78]), []
    try:

        @machine.on_msr(0x8B)
        def msr(exit: object) -> int | None:
            if exit.is_write:  # type: ignore[attr-defined]
                written.append(exit.data)  # type: ignore[attr-defined]
                return None
            return next(values)

    except CapabilityError as error:
        pytest.skip(str(error))
    with machine.snapshot() as s:
        with machine.record() as log:
            assert machine.run(timeout=20).reason == reasons.HALTED
        s.restore()
        machine.replay(log, timeout=20).check()
        assert machine.cpu.rbx == 0x77 and len(written) == 1


def test_an_interrupt_that_the_host_injects_comes_at_the_same_exit(machine: pykvm.Machine) -> None:
    # In real mode, where vector 0x20 is at 0x80: it counts, the loop asks the port.
    code = "sti; l: in al, 0x40; inc bx; cmp al, 9; jne l; cli; hlt"
    machine.load(pykvm.asm(code, mode="real16", at=ENTRY), at=ENTRY)
    machine.load(pykvm.asm("inc cx; mov [0x9000], bx; iret", mode="real16"), at=0x8800)
    machine.memory.u32[0x80] = 0x8800
    machine.cpu.enter("real16", entry=ENTRY)
    turns: list[int] = []

    @machine.on_pio(0x40)
    def port(access: PioAccess) -> int:
        turns.append(1)
        if len(turns) in (3, 5):
            machine.cpu.vcpu.interrupt(0x20)
        return 9 if len(turns) == 8 else 0

    with machine.snapshot() as s:
        with machine.record() as log:
            assert machine.run(timeout=20).reason == reasons.HALTED
        with machine.snapshot() as end:
            assert machine.cpu.rcx & 0xFFFF == 2 and machine.memory.u16[0x9000] >= 4
            s.restore()
            machine.replay(log, timeout=20).check()
            with machine.snapshot() as now:
                same(end, now)
        assert len(turns) == 8


DIVERGENCES = {
    "another port": ("in al, 0x40", "in al, 0x41", "in 0x41, 1 byte"),
    "another size": ("in al, 0x40", "in ax, 0x40", "in 0x40, 2 bytes"),
    "other data": ("mov al, 5; out 0x40, al", "mov al, 6; out 0x40, al", "out 0x40, 1 byte: 06"),
    "the other way": ("out 0x40, al", "in al, 0x40", "in 0x40, 1 byte"),
    "another exit": ("in al, 0x40", "hlt", "hlt"),
    "another address": (f"mov eax, [{WINDOW}]", f"mov eax, [{WINDOW + 4}]", "load 0xd0000004, 4"),
}


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_the_first_divergence_is_named(machine: pykvm.Machine, kind: str) -> None:
    was, becomes, found = DIVERGENCES[kind]
    machine.on_pio(0x40, lambda access: 1, count=8)
    machine.on_mmio(WINDOW, 16, lambda access: 1)
    start(machine, f"in al, 0x42; in al, 0x42; {was}; in al, 0x43; hlt")
    with machine.snapshot() as s:
        with machine.record() as log:
            assert machine.run(timeout=20).reason == reasons.HALTED
        s.restore()
        code = pykvm.asm(f"in al, 0x42; in al, 0x42; {becomes}; in al, 0x43; hlt", mode="long64")
        machine.load(code, at=ENTRY)
        result = machine.replay(log, timeout=20)
        assert result.reason == reasons.DIVERGED and not result.ok
        assert result.exit.number == 3
        text = str(result.exit)
        assert "at exit 3" in text and f"found {found}" in text and "expected" in text
        with pytest.raises(ReplayError, match="at exit 3"):
            result.check()
        s.restore()
        assert machine.replay(log, timeout=20).reason == reasons.REPLAYED


def test_a_replay_that_never_exits_ends_by_its_time(machine: pykvm.Machine) -> None:
    start(machine, "in al, 0x40; hlt")
    machine.on_pio(0x40, lambda access: 1)
    with machine.snapshot() as s:
        with machine.record() as log:
            machine.run(timeout=20)
        s.restore()
        machine.load(pykvm.asm("jmp $", mode="long64"), at=ENTRY + 2)
        assert machine.replay(log, timeout=0.1).reason == reasons.TIMEOUT


def test_a_run_in_pieces_and_one_that_was_cut_short(machine: pykvm.Machine) -> None:
    furnish(machine, 3)
    machine.pio.stop(0x10)
    start(machine, GUEST)
    with machine.snapshot() as s:
        with machine.record() as log:
            while machine.run(timeout=20, max_exits=7).reason == reasons.LIMIT:
                pass
            machine.run(timeout=20)  # on to the HLT
        with machine.snapshot() as end:
            s.restore()
            machine.replay(log).check()
            with machine.snapshot() as now:
                same(end, now)
    start(machine, "in al, 0x40; l: inc rbx; jmp l")
    machine.cpu.rbx = 0
    with machine.snapshot() as s:
        with machine.record() as log:
            assert machine.run(timeout=0.05).reason == reasons.TIMEOUT
        s.restore()
        # It ends at the last exit: nobody knows how far the guest came after it.
        assert machine.replay(log).code == 1
        assert machine.cpu.rip == ENTRY + 2 and machine.cpu.rbx == 0


def test_what_the_host_does_after_a_stop_comes_after_the_instruction(
    machine: pykvm.Machine,
) -> None:
    start(machine, "mov edi, 0x20000; mov ecx, 4; mov edx, 0x40; rep insb; in al, 0x50; hlt")
    machine.on_pio(0x40, lambda access: 7)

    @machine.on_pio(0x50)
    def stop(access: PioAccess) -> int:
        machine.stop()
        return 0x55

    with machine.snapshot() as s:
        with machine.record() as log:
            assert machine.run(timeout=20, max_exits=1).reason == reasons.LIMIT
            machine.memory.write(0x20000, b"early")  # the string instruction is not yet complete
            assert machine.run(timeout=20).reason == reasons.STOPPED
            assert machine.memory.read(0x20000, 5) == b"\7\7\7\7y"
            assert machine.cpu.al == 0x55  # IN is
            machine.cpu.al = 0x66
            machine.memory.write(0x20000, b"later")
            assert machine.run(timeout=20).reason == reasons.HALTED
        with machine.snapshot() as end:
            assert machine.cpu.al == 0x66
            s.restore()
            machine.replay(log, timeout=20).check()
            with machine.snapshot() as now:
                same(end, now)
        assert sum(entry.kind == COMPLETE for entry in log) == 1


@pytest.mark.parametrize("what", ["memory", "registers", "ioctl"])
def test_nothing_is_done_where_nobody_knows_how_far_the_guest_came(
    machine: pykvm.Machine, what: str
) -> None:
    start(machine, "l: inc rbx; jmp l")
    with pytest.raises(ReplayError, match="interrupted"), machine.record():
        assert machine.run(timeout=0.02).reason == reasons.TIMEOUT
        assert machine.run(timeout=0.02).reason == reasons.TIMEOUT  # to go on is no harm
        if what == "memory":
            machine.memory.u8[0x20000] = 1
        elif what == "registers":
            machine.cpu.rax = 1
            machine.run(timeout=0.02)
        else:
            machine.cpu.vcpu.set_msrs({0xC0000102: 5})


def test_a_guest_that_shut_down_has_shut_down_again(machine: pykvm.Machine) -> None:
    start(machine, "in al, 0x40; lidt [0x7000]; ud2")
    machine.on_pio(0x40, lambda access: 1)
    with machine.snapshot() as s:
        with machine.record() as log:
            assert machine.run(timeout=20).reason == reasons.SHUTDOWN
        with machine.snapshot() as end:
            s.restore()
            machine.replay(log).check()
            assert machine.cpu.ended == reasons.SHUTDOWN
            with machine.snapshot() as now:
                same(end, now)


def test_breakpoints_stop_a_replay_in_its_midst(machine: pykvm.Machine) -> None:
    furnish(machine, 4)
    machine.pio.stop(0x10)
    start(machine, GUEST)
    with machine.snapshot() as s:
        with machine.record() as log:
            machine.run(timeout=20)
        with machine.snapshot() as end:
            s.restore()
            machine.load(pykvm.asm(GUEST, mode="long64", at=ENTRY))  # for its symbols
            point = machine.breakpoint("note")
            with machine.replaying(log) as replay:
                for turn in range(5):
                    assert replay.run(timeout=20).reason == reasons.BREAKPOINT
                    assert machine.cpu.rbx == SEEN + 8 * turn
                point.delete()
                assert replay.run(timeout=20).reason == reasons.REPLAYED
            with machine.snapshot() as now:
                same(end, now)


def test_a_replay_can_be_stepped_through(machine: pykvm.Machine) -> None:
    start(machine, "in al, 0x40; mov bl, al; inc rcx; dec rdx; in al, 0x41; add rbx, rax; hlt")
    answers = iter(range(9, 100))
    machine.on_pio(0x40, lambda access: next(answers), count=8)
    with machine.snapshot() as s:
        with machine.record() as log:
            assert machine.run(timeout=20).reason == reasons.HALTED
        with machine.snapshot() as end:
            s.restore()
            with machine.replaying(log) as replay:
                for count in (2, 1):
                    result = machine.step(count)
                    assert result.reason == reasons.STEP, result
                assert (machine.cpu.bl, machine.cpu.rcx) == (9, 1)
                assert replay.run(timeout=20).reason == reasons.REPLAYED
            with machine.snapshot() as now:
                same(end, now)
