"""Forks of a snapshot in processes of their own."""

from __future__ import annotations

import os

import pytest

import pykvm
from pykvm.snapshot_pool import SnapshotPool
from tests.support.pool_work import attach, double, fail, slowly


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
