"""What a device counts: requests, bytes, errors, and how long requests took."""

from __future__ import annotations

from _thread import LockType, allocate_lock
from time import perf_counter_ns

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

BUCKETS = 40
"""Of a histogram; the last one holds everything from 2**39 ns, nine minutes, on."""


class Histogram:
    """Durations by powers of two: bucket ``n`` counts those of ``2**(n-1) .. 2**n - 1`` ns.

    Attributes:
        buckets: the counts; bucket 0 is 0 ns.
        total: their sum, in ns.
        longest: the longest, in ns.
    """

    __slots__ = ("buckets", "longest", "total")

    def __init__(self) -> None:
        self.buckets = [0] * BUCKETS
        self.total = 0
        self.longest = 0

    def add(self, ns: int) -> None:
        """Count one duration."""
        bits = ns.bit_length()
        self.buckets[bits if bits < BUCKETS else BUCKETS - 1] += 1
        self.total += ns
        if ns > self.longest:
            self.longest = ns

    @property
    def count(self) -> int:
        """How many there were."""
        return sum(self.buckets)

    def percentile(self, share: float) -> int:
        """An upper bound, in ns, of the shortest ``share`` (0..1) of all; 0 if there were none."""
        left = share * self.count
        for number, count in enumerate(self.buckets):
            left -= count
            if left <= 0 and count:
                return min((1 << number) - 1, self.longest)
        return self.longest

    def __repr__(self) -> str:
        p50, p99 = self.percentile(0.5), self.percentile(0.99)
        return f"<Histogram {self.count}, p50 ≤ {p50} ns, p99 ≤ {p99} ns, max {self.longest} ns>"


class Counters:
    """A device's counters; they go on over resets.

    Attributes:
        requests: chains served.
        bytes_in: bytes from the device to the guest.
        bytes_out: bytes from the guest to the device.
        errors: requests that failed, and breaches of the protocol.
        notifies: doorbells served.
        interrupts: interrupts raised, of queues and of the configuration.
        resets: resets by the driver.
        latency: from when a chain was taken until it was given back.
    """

    __slots__ = (
        "_lock", "bytes_in", "bytes_out", "errors", "interrupts", "latency", "notifies",
        "requests", "resets",
    )  # fmt: skip

    def __init__(self) -> None:
        self._lock = allocate_lock()
        self.requests = 0
        self.bytes_in = 0
        self.bytes_out = 0
        self.errors = 0
        self.notifies = 0
        self.interrupts = 0
        self.resets = 0
        self.latency = Histogram()

    def done(self, began: int, bytes_in: int, bytes_out: int, error: bool = False) -> None:
        """Count a request that was taken at ``began`` (``time.perf_counter_ns()``)."""
        ns = perf_counter_ns() - began
        latency = self.latency
        with self._lock:
            self.requests += 1
            self.bytes_in += bytes_in
            self.bytes_out += bytes_out
            self.errors += error
            latency.add(ns)

    def add(self, name: str, by: int = 1) -> None:
        """Count something else, by its name."""
        with self._lock:
            setattr(self, name, getattr(self, name) + by)

    def locked(self) -> LockType:
        """Whoever changes several at once holds this lock: ``with counters.locked():``."""
        return self._lock

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain data; of the latency percentiles, the longest, and the buckets."""
        with self._lock:
            latency = self.latency
            return {
                "requests": self.requests,
                "bytes_in": self.bytes_in,
                "bytes_out": self.bytes_out,
                "errors": self.errors,
                "notifies": self.notifies,
                "interrupts": self.interrupts,
                "resets": self.resets,
                "latency_ns": {
                    "p50": latency.percentile(0.5),
                    "p99": latency.percentile(0.99),
                    "max": latency.longest,
                    "total": latency.total,
                    "buckets": list(latency.buckets),
                },
            }

    def __repr__(self) -> str:
        return (
            f"<Counters {self.requests} requests, {self.bytes_in} bytes in, {self.bytes_out} out,"
            f" {self.errors} errors, {self.latency!r}>"
        )
