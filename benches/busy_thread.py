"""Does a CPU-bound Python thread slow down exits that C actions serve?

There are two references: the same machine without that thread; and the same beside a process that
computes, which shares no interpreter, only the processor. Where two CPUs share a core, whatever
runs on the other one slows the guest, and only the second says what the interpreter costs.

A run touches Python, and with it waits for the interpreter's switch interval (5 ms), when it begins
and ends and at each heartbeat in between (500 ms); so this takes runs of a length at which a thread
beside would be worth having.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

from benches import guests
from benches.measure import BenchError, Goal, Result, Sampler, compare, take_turns

C_ONLY = False

EXITS = 50_000


def measure(pairs: int) -> Iterator[Result]:
    """PIO into a FIFO that nobody needs to drain often."""
    with guests.machine("pio") as m:
        claim = m.pio.ignore(guests.PORT)
        alone = guests.sampler(m, EXITS)
        samplers = [_beside(alone), alone, _beside_process(alone)]
        ours, reference, same_load = take_turns(samplers, pairs)
        if claim.hits != 3 * (pairs + 1) * EXITS:
            raise BenchError(f"the action saw {claim.hits} writes")
    yield compare(
        "busy-thread/pio",
        "ns/exit",
        ours,
        reference,
        goal=Goal(1.10),
        note=f"runs of {EXITS} exits; reference: the same without the thread",
    )
    yield compare(
        "busy-thread/pio-same-load",
        "ns/exit",
        ours,
        same_load,
        goal=Goal(1.10),
        note="reference: beside a busy process, which takes the CPU but not the interpreter",
    )


def _beside(sample: Sampler) -> Callable[[], float]:
    """The same sample, while a thread computes in Python."""

    def with_thread() -> float:
        started, done, spins = threading.Event(), [False], [0]

        def spin() -> None:
            started.set()
            while not done[0]:
                spins[0] += 1

        thread = threading.Thread(target=spin)
        thread.start()
        try:
            started.wait()
            before = spins[0]
            cost = sample()
            if spins[0] == before:
                raise BenchError("the thread beside the vCPU did not run")
        finally:
            done[0] = True
            thread.join()
        return cost

    return with_thread


def _beside_process(sample: Sampler) -> Callable[[], float]:
    """The same sample, while another process computes."""

    def with_process() -> float:
        busy = "print(flush=True)\nwhile True: pass"
        with subprocess.Popen([sys.executable, "-c", busy], stdout=subprocess.PIPE) as process:
            try:
                assert process.stdout is not None
                process.stdout.readline()  # it is up and running
                return sample()
            finally:
                process.kill()

    return with_process
