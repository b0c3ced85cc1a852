"""What does a fork of 64 MiB cost, against a new machine?"""

from __future__ import annotations

from collections.abc import Iterator
from time import perf_counter_ns

import pykvm
from benches.measure import Goal, Result, Sampler, compare, take_turns

C_ONLY = False

ENTRY = 0x8000
FILL = 4 << 20
"""Bytes of memory that are not zeros."""


def measure(pairs: int) -> Iterator[Result]:
    """Forks."""
    with machine("64M") as m, m.snapshot() as s:
        ours, reference = take_turns([_forked(s), _cold("64M")], pairs)
    yield compare("snapshot-fork/64M", "µs", ours, reference, goal=Goal(1.5))


def _cold(size: str) -> Sampler:
    def sample() -> float:
        start = perf_counter_ns()
        m = pykvm.Machine(size)
        elapsed = perf_counter_ns() - start
        m.close()
        return elapsed / 1000

    return sample


def machine(size: str) -> pykvm.Machine:
    """A machine that will halt at once."""
    m = pykvm.Machine(size)
    m.load(pykvm.asm("hlt", mode="long64"), at=ENTRY)
    m.cpu.enter("long64", entry=ENTRY)
    m.memory.write(1 << 20, bytes(range(1, 256)) * (FILL // 255))
    return m


def _forked(s: pykvm.Snapshot) -> Sampler:
    def sample() -> float:
        start = perf_counter_ns()
        m = s.fork()
        elapsed = perf_counter_ns() - start
        m.close()
        return elapsed / 1000

    return sample
