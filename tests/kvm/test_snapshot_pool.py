"""Forks of a snapshot in processes of their own."""

from __future__ import annotations

import os
import time

import pytest

import pykvm
from pykvm import result as reasons
from pykvm.snapshot_pool import SnapshotPool


def double(machine: pykvm.Machine, value: int) -> tuple[int, int, int]:
    """What the guest makes of a number, how often it ran before, and where."""
    before = machine.memory.u32[0x30000]
    machine.memory.u64[0x20000] = value
    assert machine.run(timeout=30).reason == reasons.HALTED
    return machine.cpu.rax, before, os.getpid()


def slowly(machine: pykvm.Machine, value: int) -> tuple[int, int, int]:
    time.sleep(0.2)  # so that every process gets something to do
    return double(machine, value)


def attach(machine: pykvm.Machine) -> None:
    machine.on_pio(0x40, lambda access: 0x5A)


def fail(machine: pykvm.Machine) -> None:
    raise KeyError("mine")


def test_every_call_begins_at_the_snapshot_and_both_processes_work() -> None:
    code = "mov rax, [0x20000]; add rax, rax; inc dword ptr [0x30000]; hlt"
    with pykvm.Machine("2M") as m:
        m.load(pykvm.asm(code, mode="long64"), at=0x8000)
        m.cpu.enter("long64", entry=0x8000)
        s = m.snapshot()
    with s, SnapshotPool(s, workers=2, setup=attach) as pool:
        done = list(pool.map(slowly, range(8), chunk=1))
        assert [each[0] for each in done] == [2 * n for n in range(8)]
        assert {each[1] for each in done} == {0}
        assert len({each[2] for each in done}) == 2 and os.getpid() not in {e[2] for e in done}
        assert pool.submit(double, 21).result(60)[0] == 42
        with pytest.raises(KeyError, match="mine"):
            pool.submit(fail).result(60)
        assert pool.submit(double, 4).result(60)[0] == 8
        assert not s.path
