"""``python -m tests.hostile --operations N [--seed S] [--only PART]``.

Exit status: 0; 1 if a part found a breach, with what repeats it.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from random import Random

from pykvm.devices.virtio import blk, blk_request, console, device, mmio, queue, rng
from pykvm.errors import CapabilityError
from tests.hostile import guest, pci_guest
from tests.hostile.build import Variant
from tests.hostile.coverage import BranchCoverage
from tests.hostile.machines import HostileDriver
from tests.hostile.rings import WatchedPair
from tests.support.vring_compare import Pair

EPISODE = 100
"""Steps between a fresh start and the next."""
WATCHED_EVERY = 3
TRACED_EVERY = 40
"""Episodes: of the ring, how many are watched; how many are traced for branch coverage."""
TRACED_OPERATIONS = 10_000
"""Of the guest, so many are traced."""
GROWTH = 64 << 20
"""Bytes by which this process may grow once it is warm."""
WARM = 200
"""Episodes after which it is."""

PARTS = ("ring", "device", "guest", "pci", "flood")
STOPS = 100
MODULES = [device, queue, mmio, rng, console, blk, blk_request]


class Breach(AssertionError):
    """What was found, and how to find it again."""


class Growth:
    """Looks at how large this process becomes."""

    def __init__(self) -> None:
        self._warm = 0

    def check(self, number: int) -> None:
        """After so many episodes."""
        # Not ru_maxrss: the most there ever was hides what grows below it.
        size = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        if number == WARM:
            self._warm = size
        elif self._warm and size > self._warm + GROWTH:
            raise Breach(f"this process grew by {(size - self._warm) >> 20} MiB")


def episodes(
    seed: int, part: str, operations: int, only: int | None
) -> Iterator[tuple[int, Random]]:
    """Numbers of episodes with their randomness, for so many operations."""
    numbers = range(-(-operations // EPISODE)) if only is None else (only,)
    for number in numbers:
        yield number, Random(f"{seed}/{part}/{number}")


def ring(seed: int, operations: int, only: int | None) -> str:
    """The queue in C beside the model."""
    variant = Variant()
    steps = watched = races = 0
    states: set[tuple[object, ...]] = set()
    breaches: Counter[str] = Counter()
    growth = Growth()
    try:
        for number, random in episodes(seed, "ring", operations, only):
            with _named("ring", seed, number):
                watch = number % WATCHED_EVERY == 0
                pair = WatchedPair(random, variant) if watch else Pair(random)
                for _ in range(EPISODE):
                    pair.step()
                    states.add(pair.state())
                steps += EPISODE
                watched += EPISODE * watch
                races += getattr(pair, "races", 0)
                breaches += pair.breaches
                pair.memory.close()
                growth.check(number)
        taken, total = variant.branches()
    finally:
        variant.close()
    found = ", ".join(f"{name[13:].lower()} {n}" for name, n in breaches.most_common())
    return (
        f"{steps} operations, {watched} with every access watched, {races} writes amid a call;"
        f" {len(states)} distinct states; branches of vring.c {taken}/{total};"
        f" breaches by the driver: {found}"
    )


def devices(seed: int, operations: int, only: int | None) -> str:
    """Devices and their registers beside the model."""
    steps = served = broken = proofs = 0
    states: set[tuple[object, ...]] = set()
    coverage, growth = BranchCoverage(MODULES), Growth()
    for number, random in episodes(seed, "device", operations, only):
        with _named("device", seed, number):
            driver = HostileDriver(random)
            try:
                with coverage() if number % TRACED_EVERY == 0 else nullcontext():
                    for _ in range(EPISODE):
                        driver.step()
                        states.add(driver.state())
                    driver.prove()
                served += driver.device.counters.requests
                broken += driver.device.counters.errors
            finally:
                driver.close()
            steps += EPISODE
            proofs += 1
            growth.check(number)
    return (
        f"{steps} operations, {served} requests served, {broken} breaches by the driver or failed"
        f" requests, {proofs} times a fresh driver worked afterwards; {len(states)} distinct"
        f" states; branches of virtio/*.py {coverage.taken}/{coverage.total}"
    )


def program(seed: int, operations: int, only: int | None) -> str:
    """The program under KVM: half of it served by its vCPU, half by the I/O thread."""
    coverage = BranchCoverage(MODULES)
    lines = []
    with _named("guest", seed, None):
        with coverage():
            guest.run(min(TRACED_OPERATIONS, operations), seed, "sync")
        for io in ("sync", "thread"):
            done = guest.run(operations // 2, seed, io)
            counts = "; ".join(
                f"{name}: {c['requests']} requests, {c['errors']} errors, {c['resets']} resets"
                for name, c in done.counters.items()
            )
            lines.append(
                f"io={io}: {done.operations} operations, {done.exits} exits, {done.states} distinct"
                f" states, {counts}"
            )
    lines.append(f"branches of virtio/*.py {coverage.taken}/{coverage.total}")
    return "; ".join(lines)


def bus(seed: int, operations: int, only: int | None) -> str:
    """The program that plays with a PCI bus, mostly with its devices served by its vCPU.

    With doorbells in the kernel a BAR that moves costs KVM milliseconds.
    """
    lines = []
    with _named("pci", seed, None):
        for io, share in (("sync", operations), ("thread", operations // 20)):
            done = pci_guest.run(share, seed, io)
            counts = "; ".join(
                f"{name}: {c['requests']} requests, {c['notifies']} doorbells, {c['resets']} resets"
                for name, c in done.counters.items()
            )
            lines.append(f"io={io}: {done.operations} operations, {done.exits} exits, {counts}")
    return "; ".join(lines)


def flood(seed: int, operations: int, only: int | None) -> str:
    """So many doorbells in a row, with stops."""
    with _named("flood", seed, None):
        latencies, shown, rung = guest.flood(operations, STOPS)
        latencies.sort()
        p99 = latencies[int(0.99 * (len(latencies) - 1))]
        if p99 >= 0.1:
            raise Breach(f"p99 of a stop is {p99 * 1000:.1f} ms")
    return (
        f"{rung} doorbells, {shown} characters came through; {len(latencies)} stops: median"
        f" {latencies[len(latencies) // 2] * 1000:.2f} ms, p99 {p99 * 1000:.2f} ms,"
        f" longest {latencies[-1] * 1000:.2f} ms"
    )


class _named:
    """What goes wrong within says how to repeat it."""

    def __init__(self, part: str, seed: int, number: int | None) -> None:
        self._again = f"--only {part} --seed {seed}"
        if number is not None:
            self._again += f" --episode {number}"

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        if kind is not None and issubclass(kind, Exception) and kind is not CapabilityError:
            raise Breach(f"{kind.__name__}: {error}\n  repeat it: {self._again}")


RUN: dict[str, Callable[[int, int, int | None], str]] = {
    "ring": ring,
    "device": devices,
    "guest": program,
    "pci": bus,
    "flood": flood,
}


def main(arguments: list[str] | None = None) -> int:
    """Run what was asked for; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.hostile", description=__doc__)
    parser.add_argument("--operations", type=int, default=10_000, metavar="N", help="of each part")
    parser.add_argument("--seed", type=int, metavar="S", help="default: another one each time")
    parser.add_argument("--only", choices=PARTS, action="append", help="a part; may be repeated")
    parser.add_argument("--episode", type=int, metavar="E", help="only this one, to repeat it")
    options = parser.parse_args(arguments)
    seed = int.from_bytes(os.urandom(4), "little") if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    status = 0
    for part in options.only or PARTS:
        began = time.monotonic()
        try:
            said = RUN[part](seed, options.operations, options.episode)
        except Breach as breach:
            status, said = 1, f"BREACH {breach}"
        except CapabilityError as error:
            if options.only:
                raise
            said = f"left out: {error}"
        print(f"{part}: {said} ({time.monotonic() - began:.1f} s)", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
