"""Stops and snapshots: what is planted is no part of the guest, and stays where it is wanted."""

from __future__ import annotations

import pytest

import pykvm
from pykvm._abi import lib
from pykvm.vcpu_thread import End, Runner
from tests.support.stops import CELL, COUNT, ENTRY, machine


def test_a_snapshot_has_the_guests_own_code_and_breakpoints_outlive_a_restore() -> None:
    with machine() as m:
        code = m.mem.read(ENTRY, 64)
        before = m.breakpoint("top")
        s = m.snapshot()
        after = m.breakpoint("bottom")
        seen = []
        for _ in range(3):
            for _ in range(2):
                result = m.run(timeout=20)
                seen.append((result.exit.point, m.cpu.ebx, m.mem[CELL]))
            s.restore()
        assert seen == [(before, 0, 0), (after, 1, 1)] * 3
        with s.fork() as other:
            assert other.mem.read(ENTRY, 64) == code
        m.planted.clear()
        assert m.mem.read(ENTRY, 64) == code


def interrupt_unseen(m: pykvm.Machine, patch: pytest.MonkeyPatch) -> None:
    """Run to an IN that may be a planted stop; Ctrl-C comes before anybody looks at it."""
    real = Runner._other

    def other(runner: Runner, outcome: int, lock: object) -> End | None:
        if outcome == lib.PYKVM_STRUCK:
            raise KeyboardInterrupt
        return real(runner, outcome, lock)

    with patch.context() as context:
        context.setattr(Runner, "_other", other)
        assert m.run(timeout=60).reason == "interrupted"


def test_a_stop_that_nobody_has_seen_is_no_part_of_a_snapshot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with machine("inc ebx; here: mov ecx, 0x1234; inc ebx; hlt") as m:
        m.cpu.rax = 0x55
        m.breakpoint("here")
        interrupt_unseen(m, monkeypatch)
        s = m.snapshot()
        assert (s.regs().rip, s.regs().rax) == (ENTRY + 2, 0x55)
        with s.fork() as other:
            assert other.run(timeout=60).reason == "halted"
            assert (other.cpu.ebx, other.cpu.ecx) == (2, 0x1234)
        result = m.run(timeout=60)
        assert (result.reason, m.cpu.rip, m.cpu.rax) == ("breakpoint", ENTRY + 2, 0x55)
        assert m.run(timeout=60).reason == "halted"
        assert (m.cpu.ebx, m.cpu.ecx) == (2, 0x1234)


def test_an_in_of_the_guests_own_is_answered_for_a_snapshot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At the same offset of another page: who only sees that cannot tell them apart."""
    with machine("here: nop; hlt") as m:
        m.breakpoint("here")
        m.pio.constant(0x61, 0x5A)
        m.cpu.rdx = 0x61
        m.cpu.rip, own = m.resolve("here") + 0x1000, m.resolve("here") + 0x1000
        m.mem.write(own, b"\xec\xf4")
        interrupt_unseen(m, monkeypatch)
        with m.snapshot() as s:
            assert (s.regs().rip, s.regs().rax & 0xFF) == (own + 1, 0x5A)


def test_snapshots_with_and_without_stops_are_the_same() -> None:
    with machine(COUNT) as m:
        plain = m.snapshot()
        m.breakpoint("top")
        assert not m.snapshot().diff(plain).pages


def test_a_breakpoint_where_the_snapshot_was_taken_stops_again_after_every_restore() -> None:
    with machine() as m:
        m.breakpoint("top")
        assert m.run(timeout=20).reason == "breakpoint"
        s = m.snapshot()
        for _ in range(3):
            assert m.run(timeout=20).reason == "breakpoint"
            s.restore()
        assert m.cpu.ecx == 3


def test_coverage_goes_on_over_restores_and_counts_a_block_once() -> None:
    with machine() as m:
        s = m.snapshot()
        with m.coverage([m.resolve("top"), m.resolve("bottom")]) as covered:
            for _ in range(3):
                assert m.run(timeout=20).reason == "stopped"
                s.restore()
        assert len(covered.hit) == 2
        assert not m.snapshot().diff(s).pages


LOCK = """
    cmp byte ptr [0x9000], 'k'
    jne out
second:
    cmp byte ptr [0x9001], 'v'
    jne out
third:
    cmp byte ptr [0x9002], 'm'
    jne out
open:
    ud2
out:
    mov al, 1
    out 0xf4, al
"""


@pytest.mark.parametrize("by_fresh", [True, False])
@pytest.mark.parametrize("batch", [1, 8])
def test_fuzzing_finds_its_way_by_the_blocks_that_inputs_reach(batch: int, by_fresh: bool) -> None:
    with machine(LOCK) as m:
        s = m.snapshot()
        names = ["second", "third", "open"]
        with m.coverage([m.resolve(name) for name in names]) as covered:
            found, good = b"", []
            for place in range(3):
                inputs = [found + bytes([byte]) for byte in range(ord("a"), ord("z") + 1)]
                told = covered if by_fresh else None
                for outcome in m.fuzz(s, inputs, write_at=CELL, batch=batch, coverage=told):
                    if outcome.fresh:
                        good.append(outcome)
                # Who does not tell fuzz() of the stops looks at them.
                assert [m.symbols.name(address) for address in covered.hit] == names[: place + 1]
                found = good[place].input if by_fresh else b"kvm"[: place + 1]
        if by_fresh:
            assert found == b"kvm" and good[-1].reason == "shutdown"
        assert not m.snapshot().diff(s).pages
