"""From a file to the guest's first exit: does it take 2 GiB longer than 64 MiB?

The reference in C maps the same part of the same file, makes the ioctls for a vCPU with the same
registers, and runs the same instruction: KVM's own part, which grows with memory where KVM shadows
page tables (it then has some bytes for each page of a slot, and makes them with the slot).
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter_ns

import pykvm
from benches.measure import BenchError, Goal, Result, Sampler, compare, take_turns
from benches.reference import Guest, in_c
from benches.snapshot_fork import machine

C_ONLY = False

LARGE, SMALL = "2G", "64M"
MOST = 1.5
"""What the large one may take of the small one's time."""


def measure(pairs: int) -> Iterator[Result]:
    """Both sizes and both references, in turns."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [_saved(Path(folder), size) for size in (LARGE, SMALL)]
        samplers = [*(_restored(path, False) for path in paths), *map(_in_c, paths)]
        large, small, c_large, c_small = take_turns(samplers, pairs)
        verified = take_turns([_restored(path, True) for path in paths], pairs)
    yield compare(f"snapshot-restore/{LARGE}", "µs", large, c_large)
    yield compare(f"snapshot-restore/{SMALL}", "µs", small, c_small)
    yield compare(f"snapshot-restore/c-{LARGE}-to-{SMALL}", "µs", c_large, c_small)
    by_kvm = statistics.median(c_large) / statistics.median(c_small)
    yield compare(
        f"snapshot-restore/{LARGE}-to-{SMALL}",
        "µs",
        large,
        small,
        goal=Goal(MOST) if by_kvm <= MOST else None,
        note=f"KVM's own part alone: {by_kvm:.2f}×",
    )
    yield compare(
        f"snapshot-restore/above-c-{LARGE}-to-{SMALL}",
        "µs",
        [ours - c for ours, c in zip(large, c_large, strict=True)],
        [ours - c for ours, c in zip(small, c_small, strict=True)],
        goal=Goal(MOST),
        ratio_of="medians",
        note="what we take above C",
    )
    yield compare(
        f"snapshot-restore/verified-{LARGE}-to-{SMALL}",
        "µs",
        *verified,
        goal=Goal(MOST),
        note="with checksums of what the file holds",
    )


def _saved(folder: Path, size: str) -> Path:
    with machine(size) as m, m.snapshot() as s:
        s.save(folder / size)
    return folder / size


def _restored(path: Path, verify: bool) -> Sampler:
    def sample() -> float:
        start = perf_counter_ns()
        with pykvm.Snapshot.load(path, verify=verify) as s, s.fork() as m:
            result = m.run(timeout=10)
            elapsed = perf_counter_ns() - start
        if result.reason != pykvm.result.HALTED:
            raise BenchError(f"the guest did not come to its HLT: {result}")
        return elapsed / 1000

    return sample


def _in_c(path: Path) -> Sampler:
    with pykvm.Snapshot.load(path) as s, s.fork() as m:
        (part,) = s.image.parts
        return in_c(Guest(m, (path, part.offset)))[0]
