"""The entropy device (virtio 1.2, 5.4): the host's random bytes, so many a second."""

from __future__ import annotations

import os
import time

from pykvm.devices.virtio.device import VirtioDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm.devices.virtio.queue import Chain

MAX_BYTES = 4096
"""Of one request; a driver that wants more asks again (5.4.6.2)."""
RATE = 1 << 20
"""Default limit, in bytes a second."""


class Rng(VirtioDevice):
    """A virtio-rng.

    Args:
        rate: bytes a second that a guest gets, on average; None for no limit. What it saved up is
            at most a second's worth.
        source: ``source(n)`` gives n bytes; ``os.getrandom`` by default. A deterministic one makes
            runs repeatable.
    """

    NAME = "rng"
    device_id = 4
    queue_max_sizes = (64,)

    def __init__(
        self, *, rate: int | None = RATE, source: Callable[[int], bytes] = os.getrandom
    ) -> None:
        super().__init__()
        if rate is not None and rate < 1:
            raise ValueError(f"rate must be at least 1 byte a second, not {rate}")
        self._rate = rate
        self._source = source
        self._saved = float(rate or 0)
        self._at = time.monotonic()
        self._waiting = False

    def queue_notify(self, index: int) -> bool:
        """Serve requests until what was saved up is spent; then go on when there is more."""
        queue = self.queues[index]
        pushed = False
        try:
            for _ in range(queue.size):
                if self._waiting or not self._budget():
                    return False
                chain = queue.pop()
                if chain is None:
                    return False
                written = self._one(chain)
                pushed |= queue.push(chain, written)
                self.counters.done(chain.began, written, chain.read_bytes, not written)
            return queue.has_work()
        finally:
            if pushed and queue.should_interrupt():
                self._interrupt(queue)

    def _budget(self) -> int:
        """Bytes that may be given now; if none, have the queue served again when there are."""
        if self._rate is None:
            return MAX_BYTES
        now = time.monotonic()
        self._saved = min(self._saved + (now - self._at) * self._rate, float(self._rate))
        self._at = now
        if self._saved < 1 and self.io is not None:
            self._waiting = True
            least = min(MAX_BYTES, self._rate) / 4
            self.io.later(least / self._rate, self._go_on)
        return int(self._saved)

    def _one(self, chain: Chain) -> int:
        wanted = min(chain.write_bytes, MAX_BYTES)
        if self._rate is not None:
            wanted = min(wanted, max(int(self._saved), 1))
            self._saved -= wanted
        data = self._source(wanted)
        return chain.write(data)

    def _go_on(self) -> None:
        with self.lock:
            self._waiting = False
        self.notify(0)
