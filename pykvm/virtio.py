"""Virtio devices of a machine: where they are, who serves them, and what they counted.

::

    from pykvm.virtio import Console, Rng

    with pykvm.Machine(memory="256M", irqchip=True, pit=True) as m:
        m.virtio(Rng())
        console = m.virtio(Console())
        m.boot("vmlinuz", cmdline="console=hvc0")
        ...
        console.expect(b"login: ", timeout=30)

``Machine.virtio`` is the way in; a device's own constructor says what it is.
"""

from __future__ import annotations

import os

from pykvm.arch.x86_64 import pc as places
from pykvm.devices.disk.spec import DiskSpec
from pykvm.devices.io_thread import IoThread
from pykvm.devices.pci import PciRoot
from pykvm.devices.virtio.blk import Blk
from pykvm.devices.virtio.console import VirtioConsole as Console
from pykvm.devices.virtio.device import VirtioDevice
from pykvm.devices.virtio.mmio import LENGTH, VirtioMmio
from pykvm.devices.virtio.pci import VirtioPci
from pykvm.devices.virtio.rng import Rng

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pykvm.irqchip import KernelIrqchip, SplitIrqchip
    from pykvm.machine import Machine

__all__ = ["Attachments", "Blk", "Console", "DiskSpec", "Rng", "VirtioDevice", "disk"]


def disk(spec: DiskSpec, *, queues: int = 1) -> Blk:
    """Open an image and make a block device of it.

    Raises:
        OSError: the host refuses.
        DiskError: it is in use, looks like another format, or a tool is missing.
    """
    opened = spec.open()
    try:
        return Blk(opened, queues=queues, serial=spec.serial)
    except BaseException:
        opened.close()
        raise


class Attachments:
    """The virtio devices of one machine, and their I/O threads.

    Attributes:
        devices: by name: "rng", and a second one "rng1".
        windows: the virtio-mmio windows, in order.
        pci: the PCI bus, once a device is on it.
        functions: the virtio-pci devices, in order.
        io: the I/O thread, which starts when it is first needed.
        threads: it, and one for each device that waits for the host (``VirtioDevice.WAITS``).
        error: what a device raised in the I/O thread, or None.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._irqs: list[int] = []
        self._gsis: list[int | None] = []
        self.devices: dict[str, VirtioDevice] = {}
        self.windows: list[VirtioMmio] = []
        self.pci: PciRoot | None = None
        self.functions: list[VirtioPci] = []
        self.io = IoThread(on_error=self._failed)
        self.threads = [self.io]
        self.error: BaseException | None = None

    def add(
        self,
        device: VirtioDevice,
        *,
        io: str,
        transport: str | None,
        base: int | None,
        gsi: int | None,
    ) -> None:
        """See ``Machine.virtio``."""
        if io not in ("thread", "sync"):
            raise ValueError(f'io is "thread" or "sync", not {io!r}')
        if transport not in (None, "pci", "mmio"):
            raise ValueError(f'transport is "pci", "mmio" or None, not {transport!r}')
        placed = base is not None or gsi is not None
        if transport == "pci" and placed:
            raise ValueError("base= and gsi= are for virtio-mmio; PCI devices are found")
        if transport is None:
            # A stock kernel needs an irqchip and drives PCI devices; who says where, knows MMIO.
            transport = "pci" if self._machine.irqchip is not None and not placed else "mmio"
        if transport == "pci":
            self._add_pci(device, io == "sync")
        else:
            self._add_mmio(device, io == "sync", base, gsi)
        self.devices[self._name(device)] = device

    def _add_pci(self, device: VirtioDevice, synchronous: bool) -> None:
        machine = self._machine
        if self.pci is None:
            self.pci = PciRoot(machine.pio, machine.mmio)
        irqchip = machine.irqchip
        self.functions.append(
            VirtioPci(
                device,
                machine.memory,
                root=self.pci,
                lines=irqchip.messages if irqchip is not None else None,
                io=self._thread(device),
                synchronous=synchronous,
            )
        )

    def _add_mmio(
        self, device: VirtioDevice, synchronous: bool, base: int | None, gsi: int | None
    ) -> None:
        machine, number = self._machine, len(self.windows)
        if base is None:
            base = places.VIRTIO_MMIO + number * LENGTH
        if base % LENGTH:
            raise ValueError(f"a virtio window begins on a page boundary, not at {base:#x}")
        if any(machine.memory.covers(base + at) for at in (0, LENGTH - 1)):
            raise ValueError(f"there is RAM at {base:#x}: give the window another base=")
        irq = None
        if machine.irqchip is not None:
            if gsi is None:
                free = [each for each in places.VIRTIO_GSIS if each not in self._gsis]
                if not free:
                    raise ValueError("every interrupt line for virtio devices is taken: give gsi=")
                gsi = free[0]
            irq = self._line(machine.irqchip, gsi)
        else:
            gsi = None
        try:
            window = VirtioMmio(
                device,
                machine.memory,
                bus=machine.mmio,
                base=base,
                irq=irq,
                io=self._thread(device),
                synchronous=synchronous,
            )
        except BaseException:
            if irq is not None:
                self._irqs.remove(irq)
                os.close(irq)
            raise
        self.windows.append(window)
        self._gsis.append(gsi)

    def _thread(self, device: VirtioDevice) -> IoThread:
        if not device.WAITS:
            return self.io
        self.threads.append(IoThread(f"pykvm-{device.NAME}", on_error=self._failed))
        return self.threads[-1]

    def _line(self, irqchip: KernelIrqchip | SplitIrqchip, gsi: int) -> int:
        """An eventfd that raises an interrupt, as an edge."""
        irq = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            irqchip.connect(irq, gsi)
        except BaseException:
            os.close(irq)
            raise
        self._irqs.append(irq)
        return irq

    def _name(self, device: VirtioDevice) -> str:
        name, number = device.NAME, 0
        while name in self.devices:
            number += 1
            name = f"{device.NAME}{number}"
        return name

    @property
    def for_acpi(self) -> list[tuple[int, int, int]]:
        """``(base, size, gsi)`` of each window, as ``build_acpi`` takes them."""
        return [
            (window.base, LENGTH, gsi)
            for window, gsi in zip(self.windows, self._gsis, strict=True)
            if gsi is not None
        ]

    @property
    def cmdline(self) -> str:
        """The same for a kernel without ACPI: parameters of its virtio_mmio driver."""
        return " ".join(
            f"virtio_mmio.device={size // 1024}K@{base:#x}:{gsi}"
            for base, size, gsi in self.for_acpi
        )

    # ---- around a run --------------------------------------------------------------------------

    def _failed(self, error: BaseException) -> None:
        """A device raised in the I/O thread, which no guest can make it do: end the run."""
        if self.error is None:
            self.error = error
        self._machine.stop()

    def run_begins(self) -> None:
        """Devices that people wait for are told."""
        for device in self.devices.values():
            device.run_begins()

    def run_ended(self) -> None:
        """What the guest asked for before the end is done now."""
        for thread in self.threads:
            thread.settle()
        for device in self.devices.values():
            device.run_ended()
        error, self.error = self.error, None
        if error is not None:
            raise error

    def counters(self) -> dict[str, dict[str, Any]]:
        """What every device counted so far."""
        return {name: device.counters.as_dict() for name, device in self.devices.items()}

    def close(self) -> None:
        """End the I/O threads, then close the devices. Idempotent."""
        for thread in self.threads:
            thread.close()
        for window in self.windows:
            window.close()
        for function in self.functions:
            function.close()
        if self.pci is not None:
            self.pci.close()
        for irq in self._irqs:
            os.close(irq)
        self._irqs.clear()
