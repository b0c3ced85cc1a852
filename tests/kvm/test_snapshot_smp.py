"""Snapshots of machines with several vCPUs, in the middle of what they do together."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from threading import Barrier

import pytest

import pykvm
from pykvm import result as reasons

FIRST = """
wait:   cmp dword ptr [0x20008], 1
        jne wait
        mov ecx, 200000
more:   loop more
        out 0x10, al
        inc dword ptr [0x20000]
        hlt
"""
SECOND = "mov dword ptr [0x20008], 1; hlt; inc dword ptr [0x20004]; hlt"


@pytest.mark.parametrize("way", ["snapshot", "restore", "late", "fork", "file"])
def test_a_vcpu_that_has_halted_waits_for_the_others(tmp_path: Path, way: str) -> None:
    """Without an interrupt controller a HLT is over only when all have halted."""
    with pykvm.Machine("2M", cpus=2) as m:
        m.load(pykvm.asm(FIRST, mode="long64", at=0x8000))
        m.load(pykvm.asm(SECOND, mode="long64", at=0x9000))
        m.cpus[0].enter("long64", entry=0x8000)
        m.cpus[1].enter("long64", entry=0x9000)
        m.pio.stop(0x10)
        assert m.run(timeout=60).reason == reasons.STOPPED
        assert m.cpus[1]._runner.halted
        s = m.snapshot()
        one = m
        if way == "restore":
            s.restore()
        elif way == "late":
            m.run(timeout=60)
            s.restore()
        elif way == "fork":
            one = s.fork()
        elif way == "file":
            s.save(tmp_path / "s")
            one = pykvm.Snapshot.load(tmp_path / "s").fork()
        assert one.run(timeout=60).reason == reasons.HALTED
        assert (one.memory.u32[0x20000], one.memory.u32[0x20004]) == (1, 0)
        assert one.run(timeout=60).reason == reasons.HALTED
        assert one.memory.u32[0x20004] == 1
        one.close()


# Each says with which index it ends, by a port or by memory that nobody has; and then counts.
ENDS = {
    "port": "mov eax, edi; out 0xf4, al; inc dword ptr [0x20000 + edi * 4]; hlt",
    "items": """
        mov eax, edi
        mov ah, 9
        mov [rdi * 4 + 0x20010], eax
        lea esi, [rdi * 4 + 0x20010]
        mov dx, 0xf4
        mov ecx, 2
        rep outsb
        inc dword ptr [0x20000 + edi * 4]
        hlt
    """,
    "store": "mov [0x30000000], edi; inc dword ptr [0x20000 + edi * 4]; hlt",
    "unclaimed": "mov eax, edi; out 0x77, al; inc dword ptr [0x20000 + edi * 4]; hlt",
    "load": "lea ebx, [rdi + 0x30000000]; mov al, [rbx]; inc dword ptr [0x20000 + edi * 4]; hlt",
}


WAYS = ["snapshot", "twice", "restore", "late", "again", "fork", "file"]


def run_both_to_their_end(m: pykvm.Machine, kind: str, patch: pytest.MonkeyPatch) -> int:
    """Both vCPUs make their ends in one run: of which it tells."""
    m.load(pykvm.asm(ENDS[kind], mode="long64", at=0x8000))
    for cpu in m.cpus:
        cpu.enter("long64", entry=0x8000, map_size=1 << 30)
        cpu.rdi = cpu.index
    m.debug_exit()
    if kind == "store":
        m.mmio.stop(0x30000000, 4, tag="stored")
    both = Barrier(2)
    with patch.context() as patch:
        for cpu in m.cpus:
            loop = cpu._runner._loop

            def together(lock: object, loop: Callable[[object], object] = loop) -> object:
                end = loop(lock)
                both.wait(60)
                return end

            patch.setattr(cpu._runner, "_loop", together)
        return m.run(timeout=60).cpu


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        *product(["port"], WAYS),
        *product([each for each in ENDS if each != "port"], ["snapshot", "file"]),
    ],
)
def test_an_end_that_no_run_has_told_of_is_the_next_ones(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str, way: str
) -> None:
    """Of two vCPUs that end at once a run tells of one; a snapshot in between loses nothing."""
    with pykvm.Machine("2M", cpus=2) as m:
        other = 1 - run_both_to_their_end(m, kind, monkeypatch)
        s, one = m.snapshot(), m
        if way == "twice":
            s = m.snapshot()
        elif way == "restore":
            s.restore()
        elif way == "late":
            m.run(timeout=60)
            s.restore()
        elif way == "fork":
            one = s.fork()
        elif way == "again":  # of a machine that never ran
            with s.fork() as between:
                one = between.snapshot().fork()
        elif way == "file":
            s.save(tmp_path / "s")
            one = pykvm.Snapshot.load(tmp_path / "s").fork()
        results = [one.run(timeout=60)]
        while results[-1].reason != reasons.HALTED:
            assert results[-1].reason in (reasons.DEBUG_EXIT, "stored", reasons.UNCLAIMED)
            results.append(one.run(timeout=60))
        ends = [result.code for result in results[:-1]]
        if kind == "items":  # of both their second one
            assert sorted(each for each in ends if each is not None) == sorted([other, 9, 9])
        elif kind == "unclaimed":
            assert [(end.exit.port, end.exit.value) for end in results[:-1]] == [(0x77, other)]
        elif kind == "load":
            assert [end.exit.gpa for end in results[:-1]] == [0x30000000 + other]
        else:
            assert ends == [other]
        if len(ends) == 1:
            assert results[0].cpu == other
        assert (one.memory.u32[0x20000], one.memory.u32[0x20004]) == (1, 1)
        if one is not m:
            one.close()


@pytest.mark.parametrize("way", ["original", "fork"])
def test_a_new_state_has_no_end_left(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    with pykvm.Machine("2M", cpus=2) as m:
        run_both_to_their_end(m, "port", monkeypatch)
        with m.snapshot() as s, s.fork() as fork:
            one = fork if way == "fork" else m
            one.load(pykvm.asm("hlt", at=0x9000))
            for cpu in one.cpus:
                cpu.enter("long64", entry=0x9000)
            assert one.run(timeout=60).reason == reasons.HALTED


def test_what_was_not_told_of_is_no_outcome_of_an_input() -> None:
    with pykvm.Machine("2M") as m:
        m.load(pykvm.asm("out 0xf4, al; hlt", mode="long64", at=0x8000))
        m.cpu.enter("long64", entry=0x8000)
        m.debug_exit()
        m.run(timeout=60)
        m.cpu._runner.give_back()  # as Ctrl-C does
        with m.snapshot() as s:
            outcomes = list(m.fuzz(s, [b"x"] * 3, write_at=0x30000, batch=2))
            assert [each.reason for each in outcomes] == [reasons.HALTED] * 3
            s.restore()
            assert m.run(timeout=60).reason == reasons.DEBUG_EXIT
