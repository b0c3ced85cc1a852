"""Snapshots of machines with several vCPUs, in the middle of what they do together."""

from __future__ import annotations

from pathlib import Path

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
