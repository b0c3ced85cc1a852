"""What does a run with a reset cost above copying known pages back, in C?

Two answers: with all of the vCPU put back (exact), and with its registers alone.
"""

from __future__ import annotations

from collections.abc import Iterator

from benches import floor
from benches.measure import OF_OURS, Goal, Result, compare, take_turns

C_ONLY = False


def measure(pairs: int) -> Iterator[Result]:
    """1, 10, 100 and 1,000 pages, the same each time."""
    for exact in (False, True):
        for pages in (1, 10, 100, 1000):
            runs = max(20, 400 // pages)
            with floor.machine(pages) as m, m.snapshot() as s, floor.Floor(m, s, exact) as least:
                known = floor.dirtied(s, m)
                samplers = (
                    floor.fuzzed(m, s, runs, floor.nothing(), exact),
                    least.sampler(runs, known),
                )
                ours, reference = take_turns(samplers, pairs)
            name = f"snapshot-reset/{'exact' if exact else 'registers'}-{pages}"
            yield compare(name, "ns/run", ours, reference, goal=Goal(1.3))
            if pages == 1:
                yield compare(
                    f"snapshot-reset/rate-{'exact' if exact else 'registers'}",
                    "ns/run",
                    ours,
                    reference,
                    goal=Goal(50_000, OF_OURS),
                    note="20,000 runs a second, which is meant of kvm-pvm",
                )
