"""How long from nothing to a guest's first exit, and how long with a pool of spare machines?

The reference makes the same ioctls in C, for the same guest: memory, registers and CPUID are the
same, and CPUID was asked of KVM before. Closing is not counted, except where the note says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from time import perf_counter_ns
from typing import Any

import pykvm
from benches.measure import BenchError, Goal, Result, Sampler, compare, take_turns
from benches.reference import Guest, in_c

C_ONLY = False

ENTRY = 0x8000
PORT = 0xE9
SPARE = 4
BATCH = 12


def measure(pairs: int) -> Iterator[Result]:
    """Machines made on demand, and taken from a pool."""
    for mode in ("real16", "long64"):
        code = pykvm.asm(f"out {PORT:#x}, al; hlt", mode=mode)
        ours, reference = take_turns([_made(mode, code), _in_c(mode, code)[0]], pairs)
        yield compare(f"first-exit/machine-{mode}", "µs", ours, reference, goal=Goal(1.3))
    with pykvm.Pool(SPARE, memory="2M") as pool:
        first, whole = _in_c("real16", code := pykvm.asm(f"out {PORT:#x}, al; hlt", mode="real16"))
        ours, reference = take_turns([_taken(pool, code), first], pairs)
        yield compare(
            "first-exit/pool",
            "µs",
            ours,
            reference,
            goal=Goal(0.5),
            note="the pool is full when asked; it refills meanwhile",
        )
        ours, reference = take_turns([_taken_in_a_row(pool, code), whole], pairs)
        yield compare(
            "first-exit/pool-amortised",
            "µs",
            ours,
            reference,
            note=f"{BATCH} machines in a row until the pool is full again, closing counted in both",
        )


class _Clock:
    """A handler that notes when it was called, and ends the run."""

    def __init__(self) -> None:
        self.first_exit = 0
        self.machine: Any = None

    def __call__(self, exit: Any) -> None:
        self.first_exit = perf_counter_ns()
        self.machine.stop()


def _run(m: pykvm.Machine, mode: str, code: bytes) -> int:
    """Load and run to the first exit; when that was (perf_counter_ns)."""
    clock = _Clock()
    clock.machine = m
    m.load(code, at=ENTRY)
    m.cpu.enter(mode, entry=ENTRY)
    m.on_pio(PORT, clock)
    result = m.run()
    if result.reason != pykvm.result.STOPPED or not clock.first_exit:
        raise BenchError(f"the guest did not come to its OUT: {result}")
    return clock.first_exit


def _made(mode: str, code: bytes) -> Sampler:
    def sample() -> float:
        start = perf_counter_ns()
        with pykvm.Machine(memory="2M") as m:
            return (_run(m, mode, code) - start) / 1000

    return sample


def _in_c(mode: str, code: bytes) -> tuple[Sampler, Sampler]:
    """To the first exit, and with closing."""
    with pykvm.Machine(memory="2M") as m:
        m.load(code, at=ENTRY)
        m.cpu.enter(mode, entry=ENTRY)
        return in_c(Guest(m))


def _wait_until_full(pool: pykvm.Pool) -> None:
    end = time.monotonic() + 10
    while len(pool) < SPARE:
        if time.monotonic() > end:
            raise BenchError("the pool did not fill up again within 10 s")
        time.sleep(0.0005)


def _taken(pool: pykvm.Pool, code: bytes) -> Callable[[], float]:
    def sample() -> float:
        start = perf_counter_ns()
        with pool.take() as m:
            cost = (_run(m, "real16", code) - start) / 1000
        _wait_until_full(pool)
        return cost

    return sample


def _taken_in_a_row(pool: pykvm.Pool, code: bytes) -> Callable[[], float]:
    def sample() -> float:
        start = perf_counter_ns()
        for _ in range(BATCH):
            with pool.take() as m:
                _run(m, "real16", code)
        _wait_until_full(pool)
        return (perf_counter_ns() - start) / BATCH / 1000

    return sample
