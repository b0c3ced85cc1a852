"""What does an exit cost that a Python handler serves, above raw C, and compared with plain ctypes?

All three handlers do the same: they add the written value to a sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from time import perf_counter_ns
from typing import Any

from benches import guests
from benches.measure import BenchError, Goal, Result, compare, take_turns
from benches.plain_ctypes import PlainVcpu
from benches.reference import RawVm

C_ONLY = False


def measure(pairs: int) -> Iterator[Result]:
    """PIO and MMIO: ours against raw C, then the overhead of ours against that of ctypes."""
    pairs *= guests.TIMES
    for loop in ("pio", "mmio"):
        sums = {"ours": 0, "plain": 0}

        def ours(exit: Any, sums: dict[str, int] = sums) -> None:
            sums["ours"] += exit.value

        def plain(address: int, value: int, sums: dict[str, int] = sums) -> None:
            sums["plain"] += value

        with guests.machine(loop) as m, RawVm(m) as raw, RawVm(m) as other:
            guests.bus(m, loop).handle(guests.address(loop), ours)
            vcpu = PlainVcpu(other.vcpu_fd, other.run_size)
            (vcpu.mmio if loop == "mmio" else vcpu.ports)[guests.address(loop)] = plain
            samplers = [guests.sampler(m, guests.EXITS), raw.sampler(guests.EXITS), _plain(vcpu)]
            samples = take_turns(samplers, pairs)
            vcpu.close()
            written = (pairs + 1) * guests.EXITS * guests.AL
            if [*sums.values(), raw.sum] != [written] * 3:
                raise BenchError(f"the sum is {written}, but the handlers saw {sums}, C {raw.sum}")
        fast, base, slow = samples
        yield compare(f"handler/{loop}", "ns/exit", fast, base, goal=Goal(1.10))
        yield compare(
            f"handler/{loop}-overhead",
            "ns/exit",
            [a - b for a, b in zip(fast, base, strict=True)],
            [a - b for a, b in zip(slow, base, strict=True)],
            goal=Goal(0.4),
            ratio_of="medians",
            note="time above raw C: ours, and that of a plain ctypes loop as the reference",
        )


def _plain(vcpu: PlainVcpu) -> Callable[[], float]:
    def sample() -> float:
        start = perf_counter_ns()
        vcpu.run(guests.EXITS)
        return (perf_counter_ns() - start) / guests.EXITS

    return sample
