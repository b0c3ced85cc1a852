"""What does a reset cost when every run dirties other pages, against the better of two plain ways?

The plain ways are ours as well: KVM's log, fetched and cleared every time, and comparing all of it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from benches import floor
from benches.measure import Goal, Result, compare, take_turns

C_ONLY = False

ROOM = 3072
"""Pages among which a run's begin; memory has 4096."""


def measure(pairs: int) -> Iterator[Result]:
    """A few and many pages, anywhere."""
    for pages in (1, 10, 100):
        runs = max(20, 400 // pages)
        machines = [floor.machine(pages, mode) for mode in (None, "log", "whole")]
        snapshots = [m.snapshot() for m in machines]
        try:
            samplers = [
                floor.fuzzed(m, s, runs, _anywhere(pages), False)
                for m, s in zip(machines, snapshots, strict=True)
            ]
            ours, log, whole = take_turns(samplers, pairs)
        finally:
            for s in snapshots:
                s.close()
            for m in machines:
                m.close()
        better = log if sum(log) < sum(whole) else whole
        yield compare(
            f"snapshot-unstable/{pages}",
            "ns/run",
            ours,
            better,
            goal=Goal(1.2),
            note=f"the better one is {'the log' if better is log else 'comparing all'}",
        )


def _anywhere(pages: int) -> Iterator[bytes]:
    generator = random.Random(7)
    while True:
        yield (generator.randrange(ROOM - pages) * floor.PAGE).to_bytes(8, "little")
