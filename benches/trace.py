"""What does a trace of the exits cost an exit that a C action serves?

The same machine with a trace on and off, in turns. What it costs when it is off is part of what
``c-action`` measures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from benches import guests
from benches.measure import BenchError, Goal, Result, compare, take_turns

C_ONLY = True

LAST = 1 << 14
EXITS, TIMES = 100, 20
"""Very short samples, and many: what is looked for is a hundredth of what the host's other work
does to longer ones."""


def measure(pairs: int) -> Iterator[Result]:
    """On against off: with all exits, and with none that a filter wants."""
    pairs *= TIMES
    unwanted = ("io:0x3f8-0x3ff", "mmio", "hlt")
    for name, filters in (("on", ()), ("filtered", unwanted)):
        with guests.machine("pio") as m:
            m.pio.ignore(guests.PORT)
            trace = m.trace(*filters, last=LAST)
            plain = guests.sampler(m, EXITS)
            on, off = take_turns([_traced(trace, plain), plain], pairs)
            seen = trace.lost + len(trace.events) + trace.passed
            if seen != (pairs + 1) * EXITS:
                raise BenchError(f"the trace saw {seen} exits instead of {pairs + 1} batches")
        yield compare(f"trace/{name}", "ns/exit", on, off, goal=Goal(1.05))


def _traced(trace: Any, plain: Callable[[], float]) -> Callable[[], float]:
    def sample() -> float:
        trace._switch(True)
        try:
            return plain()
        finally:
            trace._switch(False)

    return sample
