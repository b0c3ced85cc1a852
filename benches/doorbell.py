"""What does a doorbell (ioeventfd) cost the guest, compared with a PIO exit to a raw C loop?

The guest rings ``guests.BURST`` times for one ordinary exit; the figure is for one write, that
exit's share included. For the host only: what it saves is the way out of the kernel, and on an
emulated processor the way out of the guest is what costs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from benches import guests
from benches.measure import BenchError, Goal, Result, Sampler, compare, take_turns
from benches.reference import RawVm

C_ONLY = False

ROUNDS = 8
WRITES = guests.BURST + 1


def measure(pairs: int) -> Iterator[Result]:
    """A doorbell port and a doorbell in guest-physical memory."""
    pairs *= guests.TIMES
    for loop in ("pio-doorbell", "mmio-doorbell"):
        fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            with guests.machine(loop) as m, guests.machine("pio-doorbell") as other:
                claim = guests.bus(m, loop).eventfd(guests.address(loop), fd)
                if not claim.in_kernel:
                    raise BenchError("this KVM has no KVM_CAP_IOEVENTFD")
                m.pio.ignore(guests.PORT)
                rounds = guests.sampler(m, ROUNDS)
                with RawVm(other) as raw:
                    samplers = [_per_write(rounds), raw.sampler(ROUNDS * WRITES)]
                    ours, reference = take_turns(samplers, pairs)
            rung = os.eventfd_read(fd)
        finally:
            os.close(fd)
        if rung < (pairs + 1) * ROUNDS * guests.BURST or claim.hits:
            raise BenchError(f"the doorbell rang {rung} times, and C had to ring it {claim.hits}")
        yield compare(
            f"doorbell/{loop.partition('-')[0]}",
            "ns/write",
            ours,
            reference,
            goal=Goal(0.30),
            note="reference: a PIO exit, served by a raw C loop",
        )


def _per_write(rounds: Sampler) -> Sampler:
    return lambda: rounds() / WRITES
