"""What does an exit that a C action serves cost above a raw KVM_RUN loop in C?"""

from __future__ import annotations

from collections.abc import Iterator

from benches import guests
from benches.measure import BenchError, Goal, Result, compare, take_turns
from benches.reference import RawVm

C_ONLY = True


def measure(pairs: int) -> Iterator[Result]:
    """PIO and MMIO."""
    pairs *= guests.TIMES
    for loop in ("pio", "mmio"):
        with guests.machine(loop) as m, RawVm(m) as raw:
            claim = guests.bus(m, loop).ignore(guests.address(loop))
            ours, reference = take_turns(
                [guests.sampler(m, guests.EXITS), raw.sampler(guests.EXITS)], pairs
            )
            exits = (pairs + 1) * guests.EXITS
            if claim.hits != exits or raw.sum != exits * guests.AL:
                raise BenchError(f"of {exits} writes we saw {claim.hits}, C summed up {raw.sum}")
        yield compare(f"c-action/{loop}", "ns/exit", ours, reference, goal=Goal(1.05))
