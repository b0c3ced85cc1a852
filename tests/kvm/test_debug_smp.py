"""Stops that several vCPUs come to at the same time."""

from __future__ import annotations

import pytest

import pykvm
from pykvm import result as reasons
from pykvm.debug import probe

BLOCKS = 200
COUNTS = 0x30000
GUEST = (
    "start: lock inc dword ptr [0x20000]; w: cmp dword ptr [0x20000], 2; jb w;"
    + "".join(f"b{n}: add qword ptr [rdi], 1; add rsi, 1;" for n in range(BLOCKS))
    + "mov [rdi+8], rsi; mov [rdi+16], rax; hlt"
)


def test_two_vcpus_that_reach_a_block_at_once_both_execute_it() -> None:
    """One takes the stop away while the other is on its way out of the guest with it."""
    with pykvm.Machine("2M", cpus=2) as m:
        code = pykvm.asm(GUEST, mode="long64", at=0x8000)
        m.load(code)
        for cpu in m.cpus:
            cpu.enter("long64", entry=0x8000)
            cpu.rdi, cpu.rsi, cpu.rdx = COUNTS + 0x1000 * cpu.index, 0, 0x60
            cpu.rax = 0x11 + cpu.index
        problem = m.debugger.obstacle(probe.PORT, m.cpu)
        if problem:
            pytest.skip(f"probe.obstacle('port', 'long64'): {problem}")
        m.pio.constant(0x60, 0xAA)
        blocks = [m.resolve(f"b{n}") for n in range(BLOCKS)]
        with m.coverage(blocks) as covered:
            assert m.run(timeout=60).reason == reasons.HALTED
        assert list(covered.hit) == blocks
        for cpu in m.cpus:
            at = COUNTS + 0x1000 * cpu.index
            found = m.memory.u64[at], m.memory.u64[at + 8], m.memory.u64[at + 16]
            assert found == (BLOCKS, BLOCKS, 0x11 + cpu.index)


def test_a_fault_of_the_guest_s_own_where_a_stop_was_is_told() -> None:
    with pykvm.Machine("2M", cpus=2) as m:
        code = "start: lock inc dword ptr [0x20000]; w: cmp dword ptr [0x20000], 2; jb w; bad: ud2"
        m.load(pykvm.asm(code, mode="long64", at=0x8000))
        for cpu in m.cpus:
            cpu.enter("long64", entry=0x8000)
        problem = m.debugger.obstacle(probe.PORT, m.cpu)
        if problem:
            pytest.skip(f"probe.obstacle('port', 'long64'): {problem}")
        with m.coverage([m.resolve("bad")]) as covered:
            assert m.run(timeout=60).reason == reasons.SHUTDOWN
        assert list(covered.hit) == [m.resolve("bad")]
