"""A virtio device as a transport sees it: features, status, queues, configuration, state.

A device is a subclass that says what it is, and serves its queues (``core.py``). A transport
(``mmio.py``, ``pci.py``) turns accesses of the driver into calls of the methods here.

Numbers in brackets are clauses of virtio 1.2.
"""

from __future__ import annotations

from pykvm.devices.virtio.core import (
    ACKNOWLEDGE,
    DRIVER,
    DRIVER_OK,
    FAILED,
    FEATURES_OK,
    NEEDS_RESET,
    RING_EVENT_IDX,
    RING_INDIRECT_DESC,
    VERSION_1,
    DeviceCore,
)
from pykvm.devices.virtio.interrupt import NoInterrupt
from pykvm.devices.virtio.queue import Queue
from pykvm.errors import GuestError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pykvm.devices.io_thread import IoThread
    from pykvm.devices.virtio.interrupt import Interrupt
    from pykvm.memory import GuestMemory

_BEFORE = {FEATURES_OK: ACKNOWLEDGE | DRIVER, DRIVER_OK: FEATURES_OK}
"""What must be set before (3.1.1)."""


class VirtioDevice(DeviceCore):
    """A virtio device; its attributes, and what a subclass overrides, are the core's."""

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
