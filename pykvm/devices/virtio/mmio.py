"""Virtio over MMIO, the modern interface (virtio 1.2, 4.2): one window of registers a device.

Interrupt status and acknowledgement are served in C; the doorbell rings an eventfd in the kernel
where the device is served by the I/O thread. The rest is touched when a driver starts.
"""

from __future__ import annotations

import os

from pykvm.devices.virtio.interrupt import NONE, DirectInterrupt

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pykvm.devices.access import MmioAccess
    from pykvm.devices.bus import Bus
    from pykvm.devices.claim import Claim
    from pykvm.devices.io_thread import IoThread
    from pykvm.devices.virtio.device import VirtioDevice
    from pykvm.memory import GuestMemory

LENGTH = 0x1000
"""Of a window; the configuration takes what the registers leave."""

MAGIC = int.from_bytes(b"virt", "little")
VERSION = 2
VENDOR = int.from_bytes(b"pykv", "little")
NOWHERE = 0xFFFFFFFF
"""What stands in the registers of a shared memory region that there is not (4.2.2)."""

DEVICE_FEATURES = 0x010
DEVICE_FEATURES_SEL = 0x014
DRIVER_FEATURES = 0x020
DRIVER_FEATURES_SEL = 0x024
QUEUE_SEL = 0x030
QUEUE_SIZE_MAX = 0x034
QUEUE_SIZE = 0x038
QUEUE_READY = 0x044
QUEUE_NOTIFY = 0x050
INTERRUPT_STATUS = 0x060
INTERRUPT_ACK = 0x064
STATUS = 0x070
QUEUE_DESC = 0x080
QUEUE_DRIVER = 0x090
QUEUE_DEVICE = 0x0A0
CONFIG_GENERATION = 0x0FC
CONFIG = 0x100
"""Offsets of the registers (4.2.2, table 4.1)."""

USED_BUFFER, CONFIG_CHANGE = 1, 2
"""Bits of the interrupt status."""

_FIXED = {0x000: MAGIC, 0x004: VERSION, 0x00C: VENDOR}
_QUEUE = {
    QUEUE_SIZE: "size",
    QUEUE_READY: "ready",
    QUEUE_DESC: "desc_low",
    QUEUE_DESC + 4: "desc_high",
    QUEUE_DRIVER: "driver_low",
    QUEUE_DRIVER + 4: "driver_high",
    QUEUE_DEVICE: "device_low",
    QUEUE_DEVICE + 4: "device_high",
}


class MmioInterrupt:
    """The interrupt of a window: a status bit, and an edge on a line."""

    def __init__(self, latch: Any, irq: int | None) -> None:
        self._latch = latch
        self._irq = irq

    def queue(self, index: int) -> None:
        """A queue has used buffers."""
        self._raise(USED_BUFFER)

    def config(self) -> None:
        """The configuration or the status changed."""
        self._raise(CONFIG_CHANGE)

    def reset(self) -> None:
        """Nothing is pending any more."""
        self._latch.bits = 0

    def direct(self, index: int) -> DirectInterrupt:
        """The same for C."""
        return DirectInterrupt(NONE if self._irq is None else self._irq, self._latch, USED_BUFFER)

    def _raise(self, bits: int) -> None:
        self._latch.set(bits)  # before the edge: the driver looks at the status after it
        if self._irq is not None:
            os.eventfd_write(self._irq, 1)


class VirtioMmio:
    """A device's window on the MMIO bus.

    Args:
        device: the device; it is attached to this.
        memory: guest memory.
        bus: the MMIO bus.
        base: guest-physical address of the window, on a page boundary.
        irq: an eventfd that gets 1 for every interrupt, for KVM_IRQFD on an edge-triggered GSI; it
            stays the caller's. None: the driver polls.
        io: the machine's I/O thread.
        synchronous: serve doorbells in the vCPU's exit instead of in the I/O thread.

    Attributes:
        base: of the window.
        device: the device.
    """

    def __init__(
        self,
        device: VirtioDevice,
        memory: GuestMemory,
        *,
        bus: Bus,
        base: int,
        irq: int | None = None,
        io: IoThread | None = None,
        synchronous: bool = False,
    ) -> None:
        self.device = device
        self.base = base
        self._io = io
        self._doorbell = -1
        self._claims: list[Claim] = []
        self._device_select = 0
        self._driver_select = 0
        self._queue_select = 0
        self._latch: Any = None
        synchronous = synchronous or io is None
        try:
            self._claim(bus, synchronous)
            device.attach(memory, MmioInterrupt(self._latch, irq), io, synchronous)
            if not synchronous:
                assert io is not None
                if device.fast is not None:
                    io.serve_with(device.fast)
                    device.fast.doorbell(None, self._doorbell)
                io.add(self._doorbell, self._rung)
        except BaseException:
            self.close()
            raise

    def _claim(self, bus: Bus, synchronous: bool) -> None:
        """Split the window: registers for Python, the doorbell, the interrupt status for C."""
        base, claims = self.base, self._claims
        claims.append(bus.handle(base, self._access, QUEUE_NOTIFY))
        after = QUEUE_NOTIFY
        if not synchronous:
            self._doorbell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            claims.append(bus.eventfd(base + QUEUE_NOTIFY, self._doorbell, size=4))
            after += 4
        claims.append(bus.handle(base + after, self._access, INTERRUPT_STATUS - after))
        claims.append(bus.latch(base + INTERRUPT_STATUS))
        self._latch = claims[-1].device
        after = INTERRUPT_ACK + 4
        claims.append(bus.handle(base + after, self._access, LENGTH - after))

    # ---- accesses ------------------------------------------------------------------------------

    def _rung(self) -> None:
        """The doorbell does not say which queue."""
        for index in range(len(self.device.queues)):
            self.device.notify(index)

    def _access(self, access: MmioAccess) -> int | None:
        offset, size = access.gpa - self.base, access.size
        if offset >= CONFIG:
            if not access.is_write:
                return self.device.read_config(offset - CONFIG, size)
            self.device.write_config(offset - CONFIG, size, access.value)
        elif size == 4 and not offset % 4:  # registers are 32 bits wide (4.2.2.2)
            if not access.is_write:
                return self.read(offset)
            self.write(offset, access.value)
        return 0

    def read(self, offset: int) -> int:
        """Read a register; what is none reads zero."""
        device = self.device
        if offset in _FIXED:
            return _FIXED[offset]
        if offset == 0x008:
            return device.device_id
        if offset == DEVICE_FEATURES:
            return device.read_features(self._device_select)
        if offset == QUEUE_SIZE_MAX:
            return device.queue_max_size(self._queue_select)
        if offset == QUEUE_READY:
            return int(device.queue_ready(self._queue_select))
        if offset == STATUS:
            return device.status
        if 0x0B0 <= offset <= 0x0BC:
            return NOWHERE
        if offset == CONFIG_GENERATION:
            return device.config_generation
        return 0

    def write(self, offset: int, value: int) -> None:
        """Write a register; what is none, or is for reading, ignores it."""
        device = self.device
        if offset in _QUEUE:
            device.queue_set(self._queue_select, _QUEUE[offset], value)
        elif offset == QUEUE_NOTIFY:
            device.notify(value)
        elif offset == QUEUE_SEL:
            self._queue_select = value
        elif offset == DEVICE_FEATURES_SEL:
            self._device_select = value
        elif offset == DRIVER_FEATURES_SEL:
            self._driver_select = value
        elif offset == DRIVER_FEATURES:
            device.write_features(self._driver_select, value)
        elif offset == STATUS:
            device.write_status(value)

    # ---- life ----------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What the driver has made of window and device, as plain data."""
        return {
            "selects": [self._device_select, self._driver_select, self._queue_select],
            "interrupt": self._latch.bits,
            "device": self.device.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` returned.

        No interrupt is raised by it: one that was pending is in the interrupt controller's state.
        """
        self._device_select, self._driver_select, self._queue_select = state["selects"]
        self.device.restore(state["device"])
        self._latch.bits = state["interrupt"]

    def close(self) -> None:
        """Leave the bus and close the device. Idempotent."""
        if self._doorbell >= 0 and self._io is not None:
            self._io.remove(self._doorbell)
        for claim in self._claims:
            claim.release()
        self._claims.clear()
        if self._doorbell >= 0:
            os.close(self._doorbell)
            self._doorbell = -1
        self.device.close()

    def __repr__(self) -> str:
        return f"<VirtioMmio {self.base:#x} {self.device!r}>"
