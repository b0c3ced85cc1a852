"""Virtio over PCI, the modern interface (virtio 1.2, 4.1).

A driver's registers are in memory, BAR 0; its doorbells are ports, BAR 1, which cost a guest less
than memory does, and again in BAR 0 for drivers without ports. Interrupts are MSI-X only: there is
no INTx line. Doorbells ring eventfds in the kernel where the device is served by the I/O thread.
"""

from __future__ import annotations

import os
from _thread import allocate_lock
from functools import partial
from struct import pack

from pykvm.devices.pci import HAS_INTERRUPT, Bar, PciFunction, claim_all
from pykvm.devices.pci import STATUS as PCI_STATUS
from pykvm.devices.pci_msix import CAPABILITY as MSIX
from pykvm.devices.pci_msix import Msix
from pykvm.devices.virtio.interrupt import PYTHON, DirectInterrupt
from pykvm.devices.virtio.pci_common import COMMON_LENGTH, NO_VECTOR, CommonConfig

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pykvm.devices.access import Access
    from pykvm.devices.claim import Claim
    from pykvm.devices.io_thread import IoThread
    from pykvm.devices.pci import PciRoot
    from pykvm.devices.pci_msix import Lines
    from pykvm.devices.virtio.device import VirtioDevice
    from pykvm.memory import GuestMemory

VENDOR, DEVICE = 0x1AF4, 0x1040
"""PCI IDs (4.1.2): the device's is this plus the virtio device's."""
_CLASSES = {2: 0x018000, 3: 0x078000, 4: 0xFF0000}
"""Class codes by virtio's device ID: mass storage, communication; others have none."""

MEMORY, PORTS = 0, 1
"""Numbers of the BARs."""
COMMON, ISR, DEVICE_CONFIG, NOTIFY, TABLE, PENDING = 0, 0x800, 0x1000, 0x2000, 0x3000, 0x3800
LENGTH = 0x4000
"""Where in BAR 0 what is, and its size."""
DOORBELL = 4
"""Bytes from one queue's doorbell to the next one's."""
MAX_QUEUES = 64
"""As many doorbells fit the ports of one BAR."""

VENDOR_SPECIFIC = 0x09
COMMON_CFG, NOTIFY_CFG, ISR_CFG, DEVICE_CFG, PCI_CFG = 1, 2, 3, 4, 5
"""Capabilities (4.1.4)."""
QUEUE_INTERRUPT, CONFIG_INTERRUPT = 1, 2
"""Bits of the ISR status (4.1.4.5)."""


class PciInterrupt:
    """The interrupts of a device: MSI-X vectors where the driver wants them, or the ISR status."""

    def __init__(self, function: VirtioPci) -> None:
        self._function = function

    def queue(self, index: int) -> None:
        """A queue has used buffers."""
        function = self._function
        self._raise(QUEUE_INTERRUPT, function.queue_vectors[index])

    def config(self) -> None:
        """The configuration or the status changed."""
        self._raise(CONFIG_INTERRUPT, self._function.config_vector)

    def _raise(self, bit: int, vector: int) -> None:
        msix = self._function.msix
        if msix is None or not msix.enabled:
            self._function.set_isr(bit)
        elif vector != NO_VECTOR:
            msix.signal(vector)

    def reset(self) -> None:
        """The device was reset: nothing is pending, no event has a vector (4.1.5.1.2.1)."""
        self._function.unmap_vectors()

    def direct(self, index: int) -> DirectInterrupt:
        """The same for C: while the vector of a queue may be sent."""
        return self._function.direct[index]


class VirtioPci(PciFunction):
    """A virtio device on the PCI bus.

    Args:
        device: the device; it is attached to this.
        memory: guest memory.
        root: the bus.
        lines: makes what sends so many interrupts; None: the driver polls.
        io: the machine's I/O thread.
        synchronous: serve doorbells in the vCPU's exit instead of in the I/O thread.

    Attributes:
        device: the device.
        number: of the PCI device.
        msix: its interrupts, or None.
        queue_vectors, config_vector: the MSI-X vector of each event.
        isr: the ISR status.
        direct: the interrupt of each queue, for C.
    """

    def __init__(
        self,
        device: VirtioDevice,
        memory: GuestMemory,
        *,
        root: PciRoot,
        lines: Callable[[int], Lines] | None = None,
        io: IoThread | None = None,
        synchronous: bool = False,
    ) -> None:
        id, queues = device.device_id, len(device.queue_max_sizes)
        if queues > MAX_QUEUES:
            raise ValueError(f"a PCI device has up to {MAX_QUEUES} queues here, not {queues}")
        super().__init__(
            VENDOR, DEVICE + id, _CLASSES.get(id, 0xFF0000), revision=1,
            subsystem=(VENDOR, DEVICE + id),
        )  # fmt: skip
        self.device = device
        self.isr = 0
        self._isr_lock = allocate_lock()  # a leaf: taken with the device's lock held, or without
        self.config_vector = NO_VECTOR
        self.queue_vectors = [NO_VECTOR] * queues
        self.direct = [DirectInterrupt() for _ in range(queues)]
        self._common = CommonConfig(self)
        self._bus = root
        self._io = None if synchronous else io
        self._doorbells: list[int] = []
        self.msix = Msix(queues + 1, lines(queues + 1)) if lines is not None else None
        self._list_capabilities(queues)
        try:
            device.attach(memory, PciInterrupt(self), io, self._io is None)
            if self._io is not None:
                if device.fast is not None:
                    self._io.serve_with(device.fast)
                for index in range(queues):
                    self._doorbells.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
                    if device.fast is not None:
                        device.fast.doorbell(index, self._doorbells[index])
                    self._io.add(self._doorbells[index], partial(device.notify, index))
            self.number = root.add(self)
        except BaseException:
            self.close()
            raise

    def _list_capabilities(self, queues: int) -> None:
        self.add_bar(MEMORY, Bar(LENGTH))
        doorbells = DOORBELL * queues
        self.add_bar(PORTS, Bar(max(1 << (doorbells - 1).bit_length(), DOORBELL), io=True))
        if self.msix is not None:
            body, writable = self.msix.capability(MEMORY, TABLE, PENDING)
            self._control = self.add_capability(MSIX, body, writable) + 2
        more = pack("<I", DOORBELL)
        self._structure(COMMON_CFG, MEMORY, COMMON, COMMON_LENGTH)
        self._structure(NOTIFY_CFG, PORTS, 0, doorbells, more)  # the driver takes what it can
        self._structure(NOTIFY_CFG, MEMORY, NOTIFY, doorbells, more)
        self._structure(ISR_CFG, MEMORY, ISR, 1)
        self._structure(DEVICE_CFG, MEMORY, DEVICE_CONFIG, NOTIFY - DEVICE_CONFIG)
        writable = b"\0\0\xff\0\0\0" + b"\xff" * 12  # BAR; offset, length and data
        self._window = self._structure(PCI_CFG, 0, 0, 0, bytes(4), writable)
        self.live = self._window + 16

    def _structure(
        self,
        kind: int,
        bar: int,
        offset: int,
        length: int,
        more: bytes = b"",
        writable: bytes = b"",
    ) -> int:
        """Add a ``struct virtio_pci_cap``."""
        body = pack("<BBB3xII", 16 + len(more), kind, bar, offset, length) + more
        return self.add_capability(VENDOR_SPECIFIC, body, writable)

    # ---- configuration space -------------------------------------------------------------------

    def config_read(self, offset: int, size: int) -> int:
        """Reads of the window into the BARs are reads there (4.1.4.9)."""
        at = self._through_window()
        if at is not None:
            bar, start, length = at
            value = self.bar_read(bar, start, length) & (1 << 8 * length) - 1
            self.config[self.live : self.live + length] = value.to_bytes(length, "little")
        return super().config_read(offset, size)

    def config_write(self, offset: int, data: bytes) -> None:
        """Writes of the control word of MSI-X and of the window into the BARs do something."""
        super().config_write(offset, data)
        end = offset + len(data)
        if self.msix is not None and offset < self._control + 2 and end > self._control:
            self.msix.control(super().config_read(self._control, 2))
            self._aim()
            with self._isr_lock:
                self._show_isr()
        if offset < self.live + 4 and end > self.live:
            at = self._through_window()
            if at is not None:
                bar, start, length = at
                value = int.from_bytes(self.config[self.live : self.live + length], "little")
                self.bar_write(bar, start, length, value)

    def _through_window(self) -> tuple[int, int, int] | None:
        """BAR, offset and length of what the guest has set up, if that is an access."""
        bar = self.config[self._window + 4]
        start = super().config_read(self._window + 8, 4)
        length = super().config_read(self._window + 12, 4)
        if bar not in self.bars or length not in (1, 2, 4) or start % length:
            return None
        return (bar, start, length) if start + length <= self.bars[bar].size else None

    # ---- BARs ----------------------------------------------------------------------------------

    def claim(self, number: int, address: int) -> list[Claim]:
        """Claim a BAR's addresses."""
        bar = self.bars[number]
        bus = self._bus.pio if bar.io else self._bus.mmio

        def handle(first: int, last: int) -> Callable[[], Claim]:
            return lambda: bus.handle(
                address + first,
                lambda access: self._access(number, first + access.offset, access),
                last - first,
            )

        def ring(at: int, fd: int) -> Callable[[], Claim]:
            # A port is as wide as what drivers write; at an address KVM is fastest without a width.
            size = 2 if bar.io else 0
            return lambda: bus.eventfd(address + at, fd, size=size, length=DOORBELL)

        first = 0 if bar.io else NOTIFY
        makers = [handle(0, first)] if first else []
        fast = self.device.fast
        if self._io is None and fast is not None:
            makers.append(
                partial(
                    bus.blk,
                    address + first,
                    fast,
                    lambda access: self.device.notify(access.value) if access.is_write else 0,
                    DOORBELL * len(self.queue_vectors),
                )
            )
            first += DOORBELL * len(self.queue_vectors)
        for fd in self._doorbells:
            makers.append(ring(first, fd))
            first += DOORBELL
        if first < bar.size:
            makers.append(handle(first, bar.size))
        return claim_all([], *makers)

    def _access(self, number: int, offset: int, access: Access) -> int | None:
        size = access.size
        if access.is_write:
            self.bar_write(number, offset, size, access.value)
            return None
        return self.bar_read(number, offset, size) & (1 << 8 * size) - 1

    def bar_read(self, number: int, offset: int, size: int) -> int:
        """Read what is behind a BAR; where nothing is, zeros."""
        if number == PORTS or NOTIFY <= offset < TABLE:
            return 0
        if offset < COMMON_LENGTH:
            return self._common.read(offset, size)
        if offset == ISR:
            return self._take_isr()
        if DEVICE_CONFIG <= offset < NOTIFY:
            return self.device.read_config(offset - DEVICE_CONFIG, size)
        if self.msix is None:
            return 0
        if TABLE <= offset < PENDING:
            return self.msix.read_table(offset - TABLE, size)
        return self.msix.read_pending(offset - PENDING, size) if offset >= PENDING else 0

    def bar_write(self, number: int, offset: int, size: int, value: int) -> None:
        """Write what is behind a BAR; where nothing is, that is ignored."""
        if number == PORTS or NOTIFY <= offset < TABLE:
            self._ring((offset if number == PORTS else offset - NOTIFY) // DOORBELL)
        elif offset < COMMON_LENGTH:
            self._common.write(offset, size, value)
        elif DEVICE_CONFIG <= offset < NOTIFY:
            self.device.write_config(offset - DEVICE_CONFIG, size, value)
        elif TABLE <= offset < PENDING and self.msix is not None:
            self.msix.write_table(offset - TABLE, size, value)
            self._aim()

    def _ring(self, index: int) -> None:
        if self._io is None:
            self.device.notify(index)
        elif index < len(self._doorbells):
            os.eventfd_write(self._doorbells[index], 1)

    # ---- interrupts ----------------------------------------------------------------------------

    def valid(self, vector: int) -> int:
        """A vector that there is, or NO_VECTOR, by which a driver sees that there is not."""
        return vector if self.msix is not None and vector < self.msix.count else NO_VECTOR

    def set_queue_vector(self, index: int, vector: int) -> None:
        """The driver gives a queue a vector; one that there is not is ignored."""
        if index < len(self.queue_vectors):
            self.queue_vectors[index] = self.valid(vector)
            self._aim()

    def set_isr(self, bit: int) -> None:
        """Tell a driver that polls; from any thread."""
        with self._isr_lock:
            self.isr |= bit
            self._show_isr()

    def _take_isr(self) -> int:
        with self._isr_lock:
            isr, self.isr = self.isr, 0
            self._show_isr()
        return isr

    def _show_isr(self) -> None:
        """In the status register, as INTx would be."""
        shown = self.isr and not (self.msix is not None and self.msix.enabled)
        kept = self.config[PCI_STATUS] & ~HAS_INTERRUPT
        self.config[PCI_STATUS] = kept | (HAS_INTERRUPT if shown else 0)

    def unmap_vectors(self) -> None:
        """No event interrupts any more."""
        self.config_vector = NO_VECTOR
        self.queue_vectors[:] = [NO_VECTOR] * len(self.queue_vectors)
        self._aim()
        self._take_isr()

    def _aim(self) -> None:
        """Tell C where the interrupts of queues go: only what may be sent goes without Python."""
        for interrupt, vector in zip(self.direct, self.queue_vectors, strict=True):
            known = self.msix is not None and vector != NO_VECTOR
            interrupt.set(self.msix.eventfd(vector) if known and self.msix else PYTHON)

    # ---- life ----------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What the driver has made of function and device, as plain data."""
        return super().state() | {
            "selects": dict(self._common.selects),
            "vectors": [self.config_vector, *self.queue_vectors],
            "isr": self.isr,
            "msix": self.msix.state() if self.msix is not None else None,
            "device": self.device.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` returned."""
        super().restore(state)
        self._common.selects.update(state["selects"])
        self.config_vector, *self.queue_vectors[:] = state["vectors"]
        self.isr = state["isr"]
        if self.msix is not None:
            self.msix.restore(state["msix"], super().config_read(self._control, 2))
        self._aim()
        self.device.restore(state["device"])

    def close(self) -> None:
        """Leave the bus and close the device. Idempotent."""
        for fd in self._doorbells:
            if self._io is not None:
                self._io.remove(fd)
        super().close()
        for fd in self._doorbells:
            os.close(fd)
        self._doorbells.clear()
        if self.msix is not None:
            self.msix.close()
        self.device.close()

    def __repr__(self) -> str:
        return f"<VirtioPci {getattr(self, 'number', '?')} {self.device!r}>"
