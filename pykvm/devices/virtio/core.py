"""The core of a virtio device: what it is, what it overrides, and how it serves its queues.

``device.py`` has the other side, as a transport sees it. What a driver does wrong is a
:class:`~pykvm.errors.GuestError` on the way up, and ends here: the device asks to be reset
(DEVICE_NEEDS_RESET) and touches the queues no more until it is.

Numbers in brackets are clauses of virtio 1.2.
"""

from __future__ import annotations

from _thread import RLock, allocate_lock

from pykvm.devices.virtio.counters import Counters
from pykvm.devices.virtio.interrupt import NoInterrupt

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    from pykvm.devices.io_thread import IoThread
    from pykvm.devices.virtio.blk_fast import FastPath
    from pykvm.devices.virtio.interrupt import Interrupt
    from pykvm.devices.virtio.queue import Chain, Queue
    from pykvm.memory import GuestMemory

ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK = 1, 2, 4, 8
NEEDS_RESET, FAILED = 64, 128
"""Bits of the device status (2.1)."""

RING_INDIRECT_DESC, RING_EVENT_IDX, VERSION_1 = 28, 29, 32
"""Feature bits that the core sees to (6)."""


class DeviceCore:
    """What a device has. Subclasses set the first attributes and override what is marked so.

    Attributes:
        NAME: for people, and in results.
        WAITS: serving it waits for the host, so it has an I/O thread of its own.
        device_id: its type (5).
        queue_max_sizes: the most entries of each queue, powers of two.
        device_features: what it offers beside the features of rings, which the core adds.
        lock: held while a queue is served, by every access to a register, and by a reset.
        queues: see :class:`~pykvm.devices.virtio.queue.Queue`.
        driver_features: what the driver wants; settled once :attr:`activated`.
        status: the device status.
        config_generation: changes with the configuration.
        broken: why the device needs a reset, or "".
        counters: what it has done.
        memory, interrupt: given by the transport.
        io: the machine's I/O thread, or None in a test without one.
        synchronous: doorbells are served in the vCPU's exit, not in the I/O thread.
        fast: serves plain requests in C, or None.
    """

    NAME = "virtio"
    WAITS = False
    device_id = 0
    queue_max_sizes: tuple[int, ...] = ()
    device_features = 0

    memory: GuestMemory

    def __init__(self) -> None:
        self.lock = RLock()
        self._status_lock = allocate_lock()  # never held while anything waits
        self.queues: list[Queue] = []
        self.driver_features = 0
        self.status = 0
        self.config_generation = 0
        self.broken = ""
        self.counters = Counters()
        self._again: set[int] = set()  # queues that the I/O thread is asked to go on with
        self.interrupt: Interrupt = NoInterrupt()
        self.io: IoThread | None = None
        self.synchronous = True
        self.fast: FastPath | None = None

    # ---- to override ---------------------------------------------------------------------------

    def activate(self) -> None:
        """The driver is ready (DRIVER_OK): features are settled, queues are set up."""

    def queue_notify(self, index: int) -> bool | None:
        """Serve a queue, at most its size in chains; True if more wait.

        :meth:`serve` does it. The device's lock is held.
        """
        raise NotImplementedError

    def config_read(self, offset: int, size: int) -> bytes:
        """Read the device's configuration; what it leaves out reads zero."""
        return b""

    def config_write(self, offset: int, data: bytes) -> None:
        """Write the device's configuration."""

    def reset(self) -> None:
        """The driver resets the device, or disables a queue.

        When this returns no I/O of the device touches guest memory any more. The lock is held; what
        is still in flight becomes stale afterwards.
        """
        self.drain()

    def drain(self) -> None:
        """Wait for what is in flight. Afterwards :meth:`state` can be taken."""

    def device_state(self) -> dict[str, Any]:
        """The subclass's part of :meth:`state`."""
        return {}

    def restore_device(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`device_state` returned."""

    def run_begins(self) -> None:
        """The machine starts to run."""

    def run_ended(self) -> None:
        """The machine has stopped, and what the guest asked for until then was served."""

    def close(self) -> None:
        """Give back what the device holds. Idempotent; call this one as well."""
        for queue in self.queues:
            queue.disable()

    # ---- for subclasses ------------------------------------------------------------------------

    def has(self, feature: int) -> bool:
        """Whether a feature bit was negotiated."""
        return bool(self.driver_features >> feature & 1)

    @property
    def activated(self) -> bool:
        """Whether the driver runs the device, and did nothing wrong so far."""
        return self.status & (DRIVER_OK | NEEDS_RESET) == DRIVER_OK

    def serve(self, index: int, one: Callable[[Queue, Chain], int | None]) -> bool:
        """Pop at most as many chains as the queue has entries, and have each one served.

        Args:
            index: of the queue.
            one: serves a chain and returns how many bytes it wrote; or None if :meth:`complete`
                is called for it, now or later.

        Returns:
            True if more chains wait. If not, the driver will notify.
        """
        queue = self.queues[index]
        counters = self.counters
        pushed = False
        try:
            for _ in range(queue.size):
                chain = queue.pop()
                if chain is None:
                    return False
                written = one(queue, chain)
                if written is not None:
                    pushed |= queue.push(chain, written)
                    counters.done(chain.began, written, chain.read_bytes)
            return queue.has_work()
        finally:
            if pushed and queue.should_interrupt():
                self._interrupt(queue)

    def complete(
        self,
        queue: Queue,
        chain: Chain,
        written: int = 0,
        *,
        error: bool = False,
        interrupt: bool = True,
    ) -> None:
        """Give a chain back, from any thread; one from before a reset goes nowhere.

        Args:
            queue: its queue.
            chain: the chain.
            written: bytes written into it, from its first writable byte on.
            error: counted as an error.
            interrupt: whether the driver is told; of a batch, with the last one.
        """
        if queue.push(chain, written):
            self.counters.done(chain.began, written, chain.read_bytes, error)
        if interrupt and queue.should_interrupt():
            self._interrupt(queue)

    def complete_many(self, queue: Queue, done: Iterable[tuple[Chain, int, bool]]) -> None:
        """Give chains back, each as ``(chain, written, error)``, and tell the driver once."""
        for chain, written, error in done:
            self.complete(queue, chain, written, error=error, interrupt=False)
        if queue.should_interrupt():
            self._interrupt(queue)

    def _interrupt(self, queue: Queue) -> None:
        """Tell the driver, who wants to know, that a queue has used buffers."""
        self.counters.add("interrupts")
        self.interrupt.queue(queue.index)

    def needs_reset(self, why: str) -> None:
        """The driver did what it must not: serve it no more until it resets (2.1.2).

        From any thread; what is in flight becomes stale.
        """
        with self._status_lock:
            if self.status & NEEDS_RESET:
                return
            self.status |= NEEDS_RESET
            self.broken = why
            told = self.status & DRIVER_OK
        for queue in self.queues:
            queue.disable()
        self.counters.add("errors")
        if told:
            self.counters.add("interrupts")
            self.interrupt.config()

    def config_changed(self) -> None:
        """The configuration changed: tell the driver. From any thread."""
        with self._status_lock:
            self.config_generation = (self.config_generation + 1) & 0xFFFFFFFF
            told = self.activated
        if told:
            self.counters.add("interrupts")
            self.interrupt.config()
