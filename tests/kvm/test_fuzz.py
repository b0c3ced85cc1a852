"""The fuzz loop: inputs begin at the snapshot, ends are told apart, the planted bug is found."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import pykvm
from pykvm import fuzzing, guestlib
from pykvm import result as reasons
from pykvm.corpus import Corpus
from pykvm.memory import GuestMemory
from pykvm.outcome import UNTIL, Outcome
from pykvm.snapshot.reset import Plan
from tests.support.same_machine import Judge

ENTRY = 0x8000
INPUT = 0x20000
LENGTH = 0x1FFF8
CELLS = 0x30000

# Ends by the first byte of the input: H halts, X exits with the length, U touches nobody's port,
# S has a triple fault, L loops, P asks Python; first it counts in memory, which starts at 0.
GUEST = f"""
        inc     dword ptr [0x21000]
        mov     ebx, [0x21000]
        mov     al, [{INPUT}]
        mov     ecx, [{LENGTH}]
        cmp     al, 'X'
        je      exit
        cmp     al, 'U'
        je      unclaimed
        cmp     al, 'S'
        je      fault
        cmp     al, 'L'
        je      spin
        cmp     al, 'P'
        je      python
        cmp     al, 'F'
        je      print
        hlt
exit:   mov     eax, ecx
        out     0x10, eax
unclaimed:
        out     0x77, al
fault:  lidt    [0x7000]
        ud2
spin:   jmp     spin
print:  out     0xe9, al
        hlt
python: in      al, 0x40
        out     0x10, al
"""


@pytest.fixture
def machine() -> Iterator[pykvm.Machine]:
    with pykvm.Machine("2M") as m:
        m.load(pykvm.asm(GUEST, mode="long64"), at=ENTRY)
        m.cpu.enter("long64", entry=ENTRY)
        yield m


def test_every_end_is_told_and_every_input_starts_afresh(machine: pykvm.Machine) -> None:
    machine.pio.stop(0x10, 4, tag="told")
    calls: list[int] = []

    @machine.on_pio(0x40)
    def port(access: object) -> int:
        calls.append(1)
        return 0x42

    expected = {
        b"H": (reasons.HALTED, None),
        b"X12": ("told", 3),
        b"U": (reasons.UNCLAIMED, None),
        b"S": (reasons.SHUTDOWN, None),
        b"L": (reasons.TIMEOUT, None),
        b"P": ("told", 0x42),
    }
    inputs = list(expected) * 2
    with machine.snapshot() as s:
        outcomes = list(
            machine.fuzz(s, inputs, write_at=INPUT, length_at=LENGTH, timeout=0.5, batch=5)
        )
        assert [outcome.input for outcome in outcomes] == inputs
        for outcome in outcomes:
            assert (outcome.reason, outcome.code) == expected[outcome.input], outcome
        assert len(calls) == 2
        assert all(o.exits >= 1 for o in outcomes if o.reason != reasons.TIMEOUT)
        with machine.snapshot() as after:
            assert not s.diff(after)
        machine.memory.write(INPUT, b"H")
        assert machine.run(timeout=10).reason == reasons.HALTED
        assert machine.cpu.ebx == 1  # nothing was left of all the counting before


@pytest.mark.parametrize("exact", [True, False])
def test_ten_thousand_resets_leave_nothing_behind(machine: pykvm.Machine, exact: bool) -> None:
    with machine.snapshot() as s:
        judge, count = Judge(machine, s), 0
        for outcome in machine.fuzz(
            s, (b"H%d" % n for n in range(10000)), write_at=INPUT, length_at=LENGTH, exact=exact
        ):
            assert outcome.reason == reasons.HALTED
            count += 1
            if count % 512 == 0:  # the end of a batch; test_resets.py compares after each reset
                assert not (found := judge.differences()), (count, found)
        assert count == 10000
        # A stable set: the log is cleared once if a page was dirty that is not any more.
        assert machine._plan is not None and machine._plan[1].c.cleared <= 1


def test_a_port_can_be_the_end_for_the_loop_alone(machine: pykvm.Machine) -> None:
    with machine.snapshot() as s:
        (outcome,) = machine.fuzz(s, [b"X"], write_at=INPUT, length_at=LENGTH, until=0x10)
        assert (outcome.reason, outcome.code, outcome.address) == (UNTIL, 1, 0x10)
        assert machine.pio.find(0x10) is None


def test_limits_hold_for_each_input(machine: pykvm.Machine) -> None:
    machine.pio.ignore(0x77)
    with machine.snapshot() as s:
        outcomes = list(machine.fuzz(s, [b"U", b"H"], write_at=INPUT, max_exits=1, timeout=5))
        assert [outcome.reason for outcome in outcomes] == [reasons.LIMIT, reasons.HALTED]


def test_what_a_device_in_c_keeps_goes_back_after_every_input(machine: pykvm.Machine) -> None:
    fifo = machine.pio.fifo(0xE9)
    with machine.snapshot() as s:
        outcomes = list(machine.fuzz(s, [b"F", b"F", b"H"], write_at=INPUT))
        assert [outcome.reason for outcome in outcomes] == [reasons.HALTED] * 3
        assert fifo.read() == b""


def test_a_handler_may_name_the_end_or_raise(machine: pykvm.Machine) -> None:
    raises: list[int] = []

    @machine.on_pio(0x40)
    def port(access: object) -> int:
        if raises:
            raise RuntimeError("mine")
        machine.stop("crash", 5)
        return 1

    machine.pio.ignore(0x10)
    with machine.snapshot() as s:
        outcomes = list(machine.fuzz(s, [b"P", b"H"], write_at=INPUT))
        assert [(o.reason, o.code) for o in outcomes] == [("crash", 5), (reasons.HALTED, None)]
        raises.append(1)
        with pytest.raises(RuntimeError, match="mine"):
            list(machine.fuzz(s, [b"H", b"P"], write_at=INPUT))
        with machine.snapshot() as after:
            assert not s.diff(after)
        assert machine.run(timeout=10).reason == reasons.HALTED


def interrupted(outcomes: Iterator[Outcome]) -> tuple[list[tuple[bytes, str]], str]:
    """What is yielded before the KeyboardInterrupt, and what that says."""
    seen = []
    with pytest.raises(KeyboardInterrupt) as caught:
        for outcome in outcomes:
            seen.append((outcome.input, outcome.reason))
    return seen, "".join(getattr(caught.value, "__notes__", ()))


ENDED = [(b"H", reasons.HALTED), (b"S", reasons.SHUTDOWN), (b"U", reasons.UNCLAIMED)]


def test_ctrl_c_while_an_input_runs_loses_no_outcome(machine: pykvm.Machine) -> None:
    @machine.on_pio(0x40)
    def port(access: object) -> int:
        signal.raise_signal(signal.SIGINT)
        return 0

    with machine.snapshot() as s:
        fuzz = machine.fuzz(s, [b"H", b"S", b"U", b"P", b"H"], write_at=INPUT, length_at=LENGTH)
        assert interrupted(fuzz) == (ENDED, "while it ran the input b'P'")
        assert list(fuzz) == []
        with machine.snapshot() as after:
            assert not s.diff(after)
        assert machine.run(timeout=10).reason == reasons.HALTED


def test_ctrl_c_in_the_guest_loses_no_outcome(machine: pykvm.Machine) -> None:
    def ctrl_c(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    @machine.on_pio(0x40)
    def port(access: object) -> int:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        return 0x42

    machine.pio.stop(0x10)
    inputs = [b"H", b"S", b"U", b"P", b"L"]
    before = signal.signal(signal.SIGALRM, ctrl_c)
    try:
        with machine.snapshot() as s:
            seen, note = interrupted(machine.fuzz(s, inputs, write_at=INPUT, timeout=100))
            # On a slow machine it may come before the last one begins.
            assert seen in (ENDED, [*ENDED, (b"P", reasons.STOPPED)])
            assert note in ("", f"while it ran the input {inputs[len(seen)]!r}")
            with machine.snapshot() as after:
                assert not s.diff(after)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("where", ["quiet", "_outcomes"])
def test_ctrl_c_between_inputs_loses_no_outcome(
    machine: pykvm.Machine, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """In Python's own work: as an input's end is noted, and as outcomes are made of a batch."""
    machine.pio.stop(0x10)
    machine.on_pio(0x40, lambda access: 0x42)
    home = fuzzing if where == "quiet" else fuzzing._Fuzzer
    real, calls = getattr(home, where), []

    def ctrl_c(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return real(*arguments)

    with machine.snapshot() as s:
        fuzz = machine.fuzz(s, [b"H", b"S", b"U", b"P"], write_at=INPUT, length_at=LENGTH)
        monkeypatch.setattr(home, where, ctrl_c)
        assert interrupted(fuzz) == ([*ENDED, (b"P", reasons.STOPPED)], "")
        monkeypatch.undo()
        with machine.snapshot() as after:
            assert not s.diff(after)


def test_ctrl_c_before_a_batch_leaves_no_port_claimed(
    machine: pykvm.Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with machine.snapshot() as s:
        fuzz = machine.fuzz(s, [b"X"], write_at=INPUT, until=0x10)
        real, calls = Plan.before, []

        def before(plan: Plan) -> None:
            calls.append(1)
            if len(calls) == 2:  # the first is the reset's before it
                raise KeyboardInterrupt
            real(plan)

        monkeypatch.setattr(Plan, "before", before)
        assert interrupted(fuzz) == ([], "")
        monkeypatch.undo()
        assert machine.pio.find(0x10) is None
        (outcome,) = machine.fuzz(s, [b"X"], write_at=INPUT, until=0x10)
        assert outcome.reason == UNTIL


def test_ctrl_c_is_not_swallowed_by_who_asks_for_no_more(machine: pykvm.Machine) -> None:
    @machine.on_pio(0x40)
    def port(access: object) -> int:
        raise KeyboardInterrupt

    with machine.snapshot() as s, pytest.raises(KeyboardInterrupt):
        for outcome in machine.fuzz(s, [b"H", b"P"], write_at=INPUT):
            assert outcome.input == b"H"
            break
        while True:  # the watchdog would end it
            threading.Event().wait(0.01)


def test_a_stop_ends_the_loop(machine: pykvm.Machine) -> None:
    def inputs() -> Iterator[bytes]:
        yield b"H"
        machine.stop()
        yield b"H"
        raise AssertionError("one too many")

    with machine.snapshot() as s:
        outcomes = list(machine.fuzz(s, inputs(), write_at=INPUT, batch=1))
        assert [outcome.reason for outcome in outcomes] == [reasons.HALTED, reasons.STOPPED]


def test_hooks_of_hlt_are_called(machine: pykvm.Machine) -> None:
    seen: list[int] = []

    @machine.on_hlt
    def hlt(exit: object) -> bool:
        seen.append(machine.cpu.ebx)
        return False

    with machine.snapshot() as s:
        outcomes = list(machine.fuzz(s, [b"H"] * 3, write_at=INPUT))
    assert [outcome.reason for outcome in outcomes] == [reasons.HALTED] * 3
    assert seen == [1, 1, 1]


def test_what_cannot_be_is_refused(machine: pykvm.Machine) -> None:
    with machine.snapshot() as s:
        with pytest.raises(ValueError, match="does not fit"):
            list(machine.fuzz(s, [b"12345"], write_at=INPUT, size=4))
        with pytest.raises(pykvm.GuestMemoryError):
            machine.fuzz(s, [], write_at=0x200000 - 1, size=2)
        with pytest.raises(ValueError, match="known"):
            machine.fuzz(s, [], write_at=INPUT, coverage=(CELLS, 16), known=bytearray(3))
        with pytest.raises(ValueError, match="batch"):
            machine.fuzz(s, [], write_at=INPUT, batch=0)
    with (
        pykvm.Machine("2M", cpus=2) as two,
        two.snapshot() as other,
        pytest.raises(ValueError, match="one vCPU"),
    ):
        two.fuzz(other, [], write_at=INPUT)


def test_the_planted_bug_is_found_within_a_bounded_number_of_runs() -> None:
    guest = guestlib.find("magic")
    with pykvm.Machine(guest.memory) as m:
        m.pio.ignore(0xE9)
        m.debug_exit()
        guest.prepare(m)
        corpus = Corpus([bytes(8)])
        with m.snapshot() as s:
            outcomes = m.fuzz(
                s, corpus, write_at=INPUT, length_at=LENGTH, coverage=(CELLS, 16), exact=False
            )
            for runs, outcome in enumerate(outcomes, 1):
                corpus.learn(outcome)
                if outcome.reason == reasons.SHUTDOWN:
                    break
                # Six comparisons, of which one changes two bytes at most; a batch of lag each.
                assert runs < 9 * (8 * 255 + 64)
        print(f"found {outcome.input!r} in {runs} runs")
        found = outcome.input
    assert found[:4] == b"KVM\x27" and (found[4] + found[5]) & 0xFF == 0xA5
    assert found[6:7] == b"!"


def blocks_of_magic(m: pykvm.Machine) -> list[int]:
    """Where each block begins: at its INC of a cell, FE 04 25 and the cell's address."""
    code = bytes(m.memory[ENTRY : ENTRY + 0x200])
    found = []
    for number in range(9):
        found.append(ENTRY + code.index(b"\xfe\x04\x25" + (CELLS + number).to_bytes(4, "little")))
    return found


def test_blocks_reached_are_seen_by_planted_stops_as_well() -> None:
    guest = guestlib.find("magic")
    with pykvm.Machine(guest.memory) as m:
        m.pio.ignore(0xE9)
        m.debug_exit()
        guest.prepare(m)
        places = blocks_of_magic(m)
        first, second = b"KVxxxxxx", b"KVM\x27xxxx"
        with m.snapshot() as s:
            before = bytes(m.memory[ENTRY : ENTRY + 0x200])
            with m.coverage(places) as covered:
                outcomes = list(
                    m.fuzz(
                        s,
                        [b"short", first, first, second, b"short"],
                        write_at=INPUT,
                        length_at=LENGTH,
                        coverage=covered,
                    )
                )
                assert [outcome.reason for outcome in outcomes] == [reasons.DEBUG_EXIT] * 5
                # Blocks 0 and 1; 2, 3 and 4; nothing new; 5 and 6; nothing new.
                assert [outcome.fresh for outcome in outcomes] == [2, 3, 0, 2, 0]
                assert list(covered.hit) == places[:7]
                with m.snapshot() as now:  # planted stops are no part of a snapshot
                    assert not s.diff(now)
            assert bytes(m.memory[ENTRY : ENTRY + 0x200]) == before


# Jumps to the block whose number the input says. Blocks count on their own page, whose code is
# written and put back each time, and halt.
MANY, CODE = 2000, 0x100000
BLOCK = pykvm.asm("inc dword ptr [rbx + 12]; hlt", mode="long64")
JUMP = f"mov eax, [{INPUT}]; shl eax, 4; lea rbx, [rax + {CODE}]; jmp rbx"


def test_what_a_run_costs_does_not_grow_with_the_blocks_that_are_watched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pykvm.Machine("2M") as m:
        m.load(pykvm.asm(JUMP, mode="long64"), at=ENTRY)
        m.load(bytes(BLOCK).ljust(16, b"\0") * MANY, at=CODE)
        m.cpu.enter("long64", entry=ENTRY)
        blocks = [CODE + 16 * number for number in range(MANY)]
        inputs = [number.to_bytes(4, "little") for number in (5, 6, 5, 7, 300, MANY - 1, 6, 8)]
        looked: list[int] = []
        real = GuestMemory.region_at

        def region_at(memory: GuestMemory, gpa: int) -> Any:
            looked.append(gpa)
            return real(memory, gpa)

        with m.snapshot() as s, m.coverage(blocks) as covered:
            fuzz = m.fuzz(s, inputs * 8, write_at=INPUT, coverage=covered, exact=False, batch=8)
            outcomes = [next(fuzz) for _ in range(8)]
            monkeypatch.setattr(GuestMemory, "region_at", region_at)
            outcomes += fuzz
            monkeypatch.undo()
            assert {outcome.reason for outcome in outcomes} == {reasons.HALTED}
            assert [outcome.fresh for outcome in outcomes] == [1, 1, 0, 1, 1, 1, 0, 1] + [0] * 56
            assert list(covered.hit) == [CODE + 16 * n for n in (5, 6, 7, 300, MANY - 1, 8)]
            assert len(looked) < 100
            monkeypatch.setattr(GuestMemory, "region_at", region_at)
            new = [number.to_bytes(4, "little") for number in range(10, 20)]
            for outcome in m.fuzz(s, [*inputs, *new], write_at=INPUT, coverage=covered, batch=8):
                assert bool(outcome.fresh) == (outcome.input in new)
                if outcome.input == inputs[0]:  # all is looked at once, as a loop begins
                    looked.clear()
            assert len(looked) < 20 * len(new)
            monkeypatch.undo()
            with m.snapshot() as now:
                assert not s.diff(now)


@pytest.mark.parametrize("who", ["guest", "host", "snapshot", "reset"])
def test_blocks_are_seen_whatever_is_done_to_the_code_between_batches(who: str) -> None:
    with pykvm.Machine("2M") as m:
        m.load(pykvm.asm(JUMP, mode="long64"), at=ENTRY)
        m.load(bytes(BLOCK).ljust(16, b"\0") * 8, at=CODE)
        m.cpu.enter("long64", entry=ENTRY)
        blocks = [CODE + 16 * number for number in range(8)]
        inputs = [number.to_bytes(4, "little") for number in range(8)]
        with m.snapshot() as s, m.coverage(blocks) as covered:
            for n, outcome in enumerate(
                m.fuzz(s, inputs, write_at=INPUT, coverage=covered, batch=1)
            ):
                assert (outcome.reason, outcome.fresh) == (reasons.HALTED, 1), n
                if who == "guest":  # counts on the page of the code
                    m.memory.write(INPUT, (n).to_bytes(4, "little"))
                    assert m.run(timeout=60).reason == reasons.HALTED
                elif who == "host":
                    m.memory.write(CODE, b"\x90" * 16 * 8)
                elif who == "snapshot":  # what is taken for the code's own byte is another then
                    m.memory.write(CODE, b"\x90" * 16 * 8)
                    m.snapshot().close()
                else:
                    m.memory.write(CODE, b"\x90" * 16 * 8)
                    with m.snapshot() as other:
                        other.restore()
            assert list(covered.hit) == blocks
            s.restore()
            with m.snapshot() as now:
                assert not s.diff(now)


@pytest.mark.parametrize("irqchip", ["kernel", "split"])
def test_fuzzing_with_interrupt_controllers_in_the_kernel(irqchip: str) -> None:
    with pykvm.Machine("2M", irqchip=irqchip, pit=irqchip == "kernel") as m:
        m.load(pykvm.asm(GUEST, mode="long64"), at=ENTRY)
        m.cpu.enter("long64", entry=ENTRY)
        with m.snapshot() as s:
            inputs = [b"X1", b"H", b"X123"] * 3
            outcomes = m.fuzz(s, inputs, write_at=INPUT, length_at=LENGTH, until=0x10, timeout=0.05)
            # A HLT waits in the kernel for an interrupt that nobody sends.
            expected = [(UNTIL, 2), (reasons.TIMEOUT, None), (UNTIL, 4)] * 3
            assert [(each.reason, each.code) for each in outcomes] == expected
            with m.snapshot() as now:
                changed = {change.name for change in s.diff(now).registers}
                assert not s.diff(now).pages
                assert not {name for name in changed if name.startswith(("regs", "sregs", "msr"))}
