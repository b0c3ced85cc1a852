"""What do registers cost a handler: one read and one written, above a handler that needs none?

The reference is our own exit with a handler that does nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benches import guests
from benches.measure import BenchError, Goal, Result, compare, take_turns

C_ONLY = False


def measure(pairs: int) -> Iterator[Result]:
    """RBX is increased at every exit; the guest carries it along."""
    pairs *= guests.TIMES
    with guests.machine("pio") as m, guests.machine("pio") as plain:
        cpu = m.cpu

        def handler(exit: Any) -> None:
            cpu.rbx += 1

        m.pio.handle(guests.PORT, handler)
        plain.pio.handle(guests.PORT, lambda exit: None)
        samplers = [guests.sampler(m, guests.EXITS), guests.sampler(plain, guests.EXITS)]
        ours, reference = take_turns(samplers, pairs)
        counted = cpu.rbx - guests.GPA
        if counted != (pairs + 1) * guests.EXITS:
            raise BenchError(f"RBX went through {counted} of {(pairs + 1) * guests.EXITS} changes")
    yield compare(
        "registers/read-write",
        "ns/exit",
        ours,
        reference,
        goal=Goal(1.15),
        note="cpu.rbx += 1 at every exit; reference: a handler that does nothing",
    )
