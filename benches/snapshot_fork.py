"""What does a fork of 64 MiB cost against a new machine, and what does the size of a file cost?"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter_ns

import pykvm
from benches.measure import BenchError, Goal, Result, Sampler, compare, take_turns

C_ONLY = False

ENTRY = 0x8000
FILL = 4 << 20
"""Bytes of memory that are not zeros, in either size."""


def measure(pairs: int) -> Iterator[Result]:
    """Forks, and files."""
    with _machine("64M") as m, m.snapshot() as s:
        ours, reference = take_turns([_forked(s), _cold("64M")], pairs)
    yield compare("snapshot-fork/64M", "µs", ours, reference, goal=Goal(1.5))
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for size in ("2G", "64M"):
            with _machine(size) as m, m.snapshot() as s:
                paths.append(Path(folder) / size)
                s.save(paths[-1])
        for verify in (False, True):
            ours, reference = take_turns([_loaded(path, verify) for path in paths], pairs)
            yield compare(
                f"snapshot-load/2G-to-64M{'-verified' if verify else ''}",
                "µs",
                ours,
                reference,
                goal=Goal(1.5),
                note="from Snapshot.load() to the guest's first exit",
            )

    ours, reference = take_turns([_cold("2G"), _cold("64M")], pairs)
    yield compare(
        "snapshot-load/machine-2G-to-64M",
        "µs",
        ours,
        reference,
        note="new machines of these sizes: KVM's own part of the figures above",
    )


def _cold(size: str) -> Sampler:
    def sample() -> float:
        start = perf_counter_ns()
        m = pykvm.Machine(size)
        elapsed = perf_counter_ns() - start
        m.close()
        return elapsed / 1000

    return sample


def _machine(size: str) -> pykvm.Machine:
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


def _loaded(path: Path, verify: bool) -> Sampler:
    def sample() -> float:
        start = perf_counter_ns()
        with pykvm.Snapshot.load(path, verify=verify) as s, s.fork() as m:
            result = m.run(timeout=10)
            elapsed = perf_counter_ns() - start
        if result.reason != pykvm.result.HALTED:
            raise BenchError(f"the guest did not come to its HLT: {result}")
        return elapsed / 1000

    return sample
