"""The core of a virtio device: features, status, queues, configuration; whatever the transport is.

A device is a subclass that says what it is, and serves its queues. A transport (``mmio.py``) turns
accesses of the driver into calls of the methods under "for the transport". What a driver does
wrong is a :class:`~pykvm.errors.GuestError` on the way up, and ends here: the device asks to be
reset (DEVICE_NEEDS_RESET) and touches the queues no more until it is.

Numbers in brackets are clauses of virtio 1.2.
"""

from __future__ import annotations

from _thread import RLock, allocate_lock

from pykvm.devices.virtio.counters import Counters
from pykvm.devices.virtio.interrupt import NoInterrupt
from pykvm.devices.virtio.queue import Queue
from pykvm.errors import GuestError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    from pykvm.devices.io_thread import IoThread
    from pykvm.devices.virtio.blk_fast import FastPath
    from pykvm.devices.virtio.interrupt import Interrupt
    from pykvm.devices.virtio.queue import Chain
    from pykvm.memory import GuestMemory

ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK = 1, 2, 4, 8
NEEDS_RESET, FAILED = 64, 128
"""Bits of the device status (2.1)."""

RING_INDIRECT_DESC, RING_EVENT_IDX, VERSION_1 = 28, 29, 32
"""Feature bits that the core sees to (6)."""

_BEFORE = {FEATURES_OK: ACKNOWLEDGE | DRIVER, DRIVER_OK: FEATURES_OK}
"""What must be set before (3.1.1)."""


class VirtioDevice:
    """A virtio device. Subclasses set the first attributes and override what is marked so.

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

    # ---- for the transport ---------------------------------------------------------------------

    def attach(
        self,
        memory: GuestMemory,
        interrupt: Interrupt | None = None,
        io: IoThread | None = None,
        synchronous: bool = True,
    ) -> None:
        """Give the device its memory, its interrupt, and a thread; once."""
        if self.queues or hasattr(self, "memory"):
            raise ValueError(f"this {self.NAME} device has a transport already")
        self.memory = memory
        self.interrupt = interrupt or NoInterrupt()
        self.io = io
        self.synchronous = synchronous
        self.queues = [Queue(*each, memory) for each in enumerate(self.queue_max_sizes)]

    @property
    def offered(self) -> int:
        """Every feature that the driver may choose (2.2)."""
        ring = 1 << RING_INDIRECT_DESC | 1 << RING_EVENT_IDX | 1 << VERSION_1
        return self.device_features | ring

    def read_features(self, select: int) -> int:
        """32 bits of what is offered."""
        return self.offered >> 32 * select & 0xFFFFFFFF if select < 4 else 0

    def write_features(self, select: int, value: int) -> None:
        """32 bits of what the driver wants; not after FEATURES_OK (2.2.1)."""
        with self.lock:
            if select < 4 and not self.status & FEATURES_OK:
                kept = self.driver_features & ~(0xFFFFFFFF << 32 * select)
                self.driver_features = kept | value << 32 * select

    def write_status(self, value: int) -> None:
        """The driver sets bits of the status, or all to zero: a reset (2.1).

        When a reset returns it is done. Bits come in their order (3.1.1); one that may not be set
        yet stays clear, and so does FEATURES_OK if the features do not go together.
        """
        with self.lock:
            if not value & 0xFF:
                self._reset()
                return
            for bit in (ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK, FAILED):
                if not value & bit or self.status & bit:
                    continue
                if ~self.status & _BEFORE.get(bit, 0):
                    continue
                if bit == FEATURES_OK and not self._features_fit():
                    continue
                with self._status_lock:
                    self.status |= bit
                if bit == DRIVER_OK and not self.status & NEEDS_RESET:
                    self._guarded(self.activate)

    def _features_fit(self) -> bool:
        return not self.driver_features & ~self.offered and self.has(VERSION_1)

    def _reset(self) -> None:
        self.reset()
        for queue in self.queues:
            queue.reset()
        self.driver_features = 0
        with self._status_lock:
            self.status = 0
            self.broken = ""
        self.interrupt.reset()
        self.counters.add("resets")

    def queue_max_size(self, index: int) -> int:
        """The most entries of a queue; 0 if there is no such queue."""
        return self.queues[index].max_size if index < len(self.queues) else 0

    def queue_set(self, index: int, what: str, value: int) -> None:
        """The driver sets up a queue.

        Args:
            index: of the queue; one that there is not is ignored.
            what: ``"size"``, ``"ready"``, or a part, ``"desc"``, ``"driver"`` or ``"device"``, and
                behind it ``"_low"`` or ``"_high"``, for 32 bits of its address.
            value: 32 bits.
        """
        with self.lock:
            if index >= len(self.queues):
                return
            queue = self.queues[index]
            if what == "size":
                queue.set_size(value)
            elif what == "ready":
                self._guarded(lambda: self._set_ready(queue, value))
            else:
                part, _, half = what.partition("_")
                before = queue.address(part)
                if half == "low":
                    queue.set_address(part, before >> 32 << 32 | value)
                else:
                    queue.set_address(part, before & 0xFFFFFFFF | value << 32)

    def _set_ready(self, queue: Queue, value: int) -> None:
        if self.status & NEEDS_RESET:
            return
        if not value & 1:
            if queue.ready:
                self.reset_queue(queue)
            return
        if not self.status & FEATURES_OK:
            raise GuestError(f"queue {queue.index} is enabled before FEATURES_OK (3.1.1)")
        queue.enable(event_idx=self.has(RING_EVENT_IDX), indirect=self.has(RING_INDIRECT_DESC))

    def reset_queue(self, queue: Queue) -> None:
        """The driver stops using one queue (4.2.2.2); its addresses stay."""
        self.drain()
        queue.disable()

    def queue_ready(self, index: int) -> bool:
        """Whether a queue is in use."""
        return index < len(self.queues) and self.queues[index].ready

    def notify(self, index: int) -> None:
        """The driver rings the doorbell of a queue; serve it. Anything else is ignored."""
        with self.lock:
            if not self.activated or not self.queue_ready(index):
                return
            self.counters.notifies += 1  # the lock is enough for it
            try:
                more = self.queue_notify(index)
            except GuestError as error:
                self.needs_reset(str(error))
                return
            if not more or self.io is None or index in self._again:
                return
            self._again.add(index)
        self.io.call(lambda: self._serve_rest(index))

    def _serve_rest(self, index: int) -> None:
        """Serve what was more than a queue's size."""
        with self.lock:
            self._again.discard(index)
        self.notify(index)

    def _guarded(self, function: Callable[[], Any]) -> Any:
        try:
            return function()
        except GuestError as error:
            self.needs_reset(str(error))
            return None

    def read_config(self, offset: int, size: int) -> int:
        """The driver reads ``size`` bytes of the configuration."""
        with self.lock:
            data = bytes(self.config_read(offset, size))[:size]
        return int.from_bytes(data, "little")

    def write_config(self, offset: int, size: int, value: int) -> None:
        """The driver writes ``size`` bytes of the configuration."""
        with self.lock:
            data = value.to_bytes(size, "little")
            self._guarded(lambda: self.config_write(offset, data))

    # ---- life ----------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What the driver has made of it, as plain data, of a stopped machine.

        The I/O thread is held (``io.quiesce()``) meanwhile.
        """
        self.drain()
        with self.lock:
            return {
                "status": self.status,
                "driver_features": self.driver_features,
                "config_generation": self.config_generation,
                "broken": self.broken,
                "queues": [queue.state() for queue in self.queues],
                "device": self.device_state(),
            }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` returned, of a device with the same queues and features.

        Raises:
            ValueError: it is of another device.
            GuestError: its rings are not in this memory.
        """
        if len(state["queues"]) != len(self.queues):
            raise ValueError(f"{len(state['queues'])} queues, and this device has others")
        # Up to FEATURES_OK a driver may ask for anything.
        if state["status"] & FEATURES_OK and state["driver_features"] & ~self.offered:
            raise ValueError(f"features {state['driver_features']:#x} are not this device's")
        with self.lock:
            self.driver_features = state["driver_features"]
            self.config_generation = state["config_generation"]
            self.broken = state["broken"]
            self.status = state["status"]
            for queue, each in zip(self.queues, state["queues"], strict=True):
                queue.restore(each)
            self.restore_device(state["device"])

    def resume(self) -> None:
        """After :meth:`restore`: look at every queue, as a doorbell may have been lost."""
        for index in range(len(self.queues)):
            self.notify(index)

    def __repr__(self) -> str:
        state = f"needs a reset: {self.broken}" if self.broken else f"status {self.status:#x}"
        return f"<{type(self).__name__} {self.NAME}, {state}, {self.counters.requests} requests>"
