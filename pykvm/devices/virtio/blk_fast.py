"""Plain requests of a block device served in C (``csrc/blk.c``), and the rest handed to Python.

C serves reads, writes and flushes of a file as every driver frames them: in the I/O thread, which
then waits for doorbells in C as well, or in the vCPU's exit. What it does not know it leaves as it
was popped, and :meth:`FastPath.serve` has the device do it. A lock in C keeps the two apart.
"""

from __future__ import annotations

from pykvm._abi import ffi, lib
from pykvm.devices.virtio.counters import BUCKETS
from pykvm.errors import GuestError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

    from pykvm.devices.disk.base import Disk
    from pykvm.devices.virtio.blk import Blk
    from pykvm.devices.virtio.counters import Counters
    from pykvm.devices.virtio.interrupt import DirectInterrupt

assert BUCKETS == lib.PYKVM_BLK_BUCKETS

_COUNTERS = ("requests", "bytes_in", "bytes_out", "errors", "notifies", "interrupts")
_READY = 16
_LONGEST_WAIT = (1 << 31) - 1


class FastPath:
    """The C side of a block device.

    As a context manager it holds the lock, and what C knows of the disk is the disk's meanwhile.

    Args:
        device: the device, its queues made.
        interrupts: of each queue.

    Attributes:
        c: the ``struct pykvm_blk``.
    """

    def __init__(self, device: Blk, interrupts: list[DirectInterrupt]) -> None:
        self._device = device
        self._disk: Disk = device.disk
        self._interrupts = interrupts
        queues = device.queues
        self._queues = ffi.new("struct pykvm_blk_queue[]", len(queues))
        for c, queue, interrupt in zip(self._queues, queues, interrupts, strict=True):
            c.ring, c.chain, c.interrupt, c.doorbell = queue.c, queue._chain, interrupt.c, -1
        self.c = ffi.new("struct pykvm_blk *", {"queues": self._queues, "count": len(queues)})
        self._ready = ffi.new("int32_t[]", _READY)
        self._folded = dict.fromkeys(_COUNTERS, 0)
        self._latency = 0
        self._buckets = [0] * BUCKETS
        lib.pykvm_blk_init(self.c)
        self._lend()

    # ---- C and Python in turn ------------------------------------------------------------------

    def __enter__(self) -> Self:
        c = self.c
        lib.pykvm_blk_lock(c)
        self._disk.take_back(bool(c.dirty), c.flush_error)
        return self

    def __exit__(self, *exc: object) -> None:
        self._lend()
        lib.pykvm_blk_unlock(self.c)

    def _lend(self) -> None:
        c = self.c
        lent = self._disk.lend()
        if lent is None:
            c.active = 0
            return
        c.fd, c.bytes, c.can_write, c.can_flush, c.dirty = lent
        c.block = self._disk.limits.logical

    def start(self) -> None:
        """The driver is ready."""
        with self:
            self.c.active = 1

    def stop(self) -> None:
        """Serve nothing more; nothing touches guest memory when this returns."""
        with self:
            self.c.active = 0
            for queue in self._queues:
                queue.handed = queue.wants_interrupt = 0

    def drain(self) -> None:
        """Wait for what is being served, and serve what was handed over."""
        with self:
            for index in range(len(self._queues)):
                queue = self._device.queues[index]
                try:
                    self._take(index)
                except GuestError as error:
                    self._device.needs_reset(str(error))
                if queue.should_interrupt():
                    self._device._interrupt(queue)

    def serve(self, index: int) -> bool:
        """Serve a queue, at most its size in requests; True if more wait.

        Raises:
            GuestError: the driver broke the protocol.
        """
        device = self._device
        queue, c = device.queues[index], self._queues[index]
        go_on = False
        while True:
            if c.handed:
                with self:
                    go_on = True
                    self._take(index)
            result = lib.pykvm_blk_serve(self.c, index, go_on)
            if c.wants_interrupt:
                c.wants_interrupt = 0
                device._interrupt(queue)
            if result < 0:
                raise queue.breach(result)
            if result != lib.PYKVM_BLK_PYTHON:
                return bool(result == lib.PYKVM_BLK_MORE)
            go_on = True

    def _take(self, index: int) -> None:
        """Serve what C has handed over, if it has; the lock is held. The interrupt comes later."""
        device = self._device
        queue, c = device.queues[index], self._queues[index]
        if c.handed:
            c.handed = 0
            chain = queue.taken()
            try:
                written = device._one(queue, chain)
            except GuestError:
                if queue.should_interrupt():  # of those before it
                    device._interrupt(queue)
                raise
            device.complete(queue, chain, written, interrupt=False)

    # ---- the I/O thread's wait -----------------------------------------------------------------

    def doorbell(self, index: int | None, fd: int) -> None:
        """An eventfd rings for this queue, or for all."""
        with self:
            for number, queue in enumerate(self._queues):
                if index in (None, number):
                    queue.doorbell = fd

    def forget(self, fd: int) -> None:
        """It does not any more."""
        with self:
            for queue in self._queues:
                if queue.doorbell == fd:
                    queue.doorbell = -1

    def pause(self) -> None:
        """Leave doorbells to Python; nothing is served any more when this returns."""
        with self:
            self.c.paused += 1

    def resume(self) -> None:
        """Take them again."""
        with self:
            self.c.paused -= 1

    def poll(self, epoll_fd: int, seconds: float) -> list[tuple[int, int]]:
        """Wait as ``epoll.poll`` does, and serve what rings meanwhile."""
        timeout = -1 if seconds < 0 else min(int(seconds * 1000) + (seconds > 0), _LONGEST_WAIT)
        count = lib.pykvm_blk_poll(self.c, epoll_fd, timeout, self._ready)
        if count < 0:
            raise OSError(-count, "epoll_wait")
        return [(self._ready[at], 1) for at in range(count)]

    # ---- counters ------------------------------------------------------------------------------

    def fold(self, counters: Counters) -> None:
        """Add what C has counted since this was asked last."""
        c, folded = self.c, self._folded
        if c.notifies == folded["notifies"] and c.requests == folded["requests"]:
            return
        with counters.locked():
            for name in _COUNTERS:
                value = int(getattr(c, name))
                setattr(counters, name, getattr(counters, name) + value - folded[name])
                folded[name] = value
            latency = counters.latency
            total = int(c.latency_total)
            latency.total += total - self._latency
            self._latency = total
            latency.longest = max(latency.longest, int(c.latency_longest))
            for number, value in enumerate(map(int, c.buckets)):
                latency.buckets[number] += value - self._buckets[number]
                self._buckets[number] = value
