"""A driver over virtio-mmio without KVM: its accesses go through the C loop, as a guest's do."""

from __future__ import annotations

import os
from typing import Any

from pykvm import result as reasons
from pykvm._abi import lib
from pykvm.devices.io_thread import IoThread
from pykvm.devices.virtio import mmio as registers
from pykvm.devices.virtio.core import ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK
from pykvm.devices.virtio.device import VirtioDevice
from pykvm.devices.virtio.mmio import VirtioMmio
from pykvm.memory import GuestMemory
from pykvm.vcpu_thread import NEVER
from tests.support.fake_vcpu import HLT, FakeRun, mmio
from tests.support.vring_driver import Driver

BASE = 0xD000_0000
VERSION_1 = 1 << 32
EVENT_IDX, INDIRECT = 1 << 29, 1 << 28


class VirtioGuest:
    """RAM, a bus with one device's window, and a vCPU that makes one access at a time."""

    def __init__(
        self, device: VirtioDevice, *, io: IoThread | None = None, ram: int | str = "1M"
    ) -> None:
        self.memory = GuestMemory(ram)
        self.fake = FakeRun(mmio(BASE), HLT)
        self.irq = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.device = device
        self.window = VirtioMmio(
            device, self.memory, bus=self.fake.mmio, base=BASE, irq=self.irq, io=io
        )

    def access(self, offset: int, size: int = 4, value: int | None = None) -> int:
        """One load or store within the window."""
        exit = self.fake.script[0]
        exit.address, exit.size, exit.is_write = BASE + offset, size, value is not None
        exit.data[0:8] = (value or 0).to_bytes(8, "little")
        end = self.fake.runner.run(NEVER, None)
        assert end.reason == reasons.HALTED, end.reason
        return int.from_bytes(self.fake.answered(0, size), "little")

    def read(self, offset: int, size: int = 4) -> int:
        """Load a register."""
        return self.access(offset, size)

    def write(self, offset: int, value: int, size: int = 4) -> None:
        """Store a register."""
        self.access(offset, size, value)

    @property
    def status(self) -> int:
        return self.read(registers.STATUS)

    def interrupts(self) -> int:
        """Edges since this was asked last."""
        try:
            return os.eventfd_read(self.irq)
        except BlockingIOError:
            return 0

    def acknowledge(self) -> int:
        """What a driver's interrupt handler does first; the bits that were set."""
        bits = self.read(registers.INTERRUPT_STATUS)
        self.write(registers.INTERRUPT_ACK, bits)
        return bits

    # ---- as a driver starts (3.1.1) ----------------------------------------------------------

    def features(self) -> int:
        """What the device offers."""
        found = 0
        for select in range(2):
            self.write(registers.DEVICE_FEATURES_SEL, select)
            found |= self.read(registers.DEVICE_FEATURES) << 32 * select
        return found

    def negotiate(self, features: int = VERSION_1) -> bool:
        """Reset, and up to FEATURES_OK; whether the device took the features."""
        self.write(registers.STATUS, 0)
        self.write(registers.STATUS, ACKNOWLEDGE)
        self.write(registers.STATUS, ACKNOWLEDGE | DRIVER)
        for select in range(2):
            self.write(registers.DRIVER_FEATURES_SEL, select)
            self.write(registers.DRIVER_FEATURES, features >> 32 * select & 0xFFFFFFFF)
        self.write(registers.STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK)
        return bool(self.status & FEATURES_OK)

    def set_up(self, index: int, driver: Driver) -> None:
        """Tell the device of a queue."""
        self.write(registers.QUEUE_SEL, index)
        self.write(registers.QUEUE_SIZE, driver.size)
        for at, gpa in (
            (registers.QUEUE_DESC, driver.desc),
            (registers.QUEUE_DRIVER, driver.driver),
            (registers.QUEUE_DEVICE, driver.device),
        ):
            self.write(at, gpa & 0xFFFFFFFF)
            self.write(at + 4, gpa >> 32)
        self.write(registers.QUEUE_READY, 1)

    def start(self, features: int = VERSION_1, *, size: int = 8) -> list[Driver]:
        """Everything up to DRIVER_OK; a driver for each queue."""
        assert self.negotiate(features)
        drivers = []
        for index in range(len(self.device.queue_max_sizes)):
            at = 0x10000 + 0x4000 * index
            driver = Driver(
                self.memory, size, desc=at, driver=at + 0x1000, device=at + 0x2000,
                event_idx=bool(features & EVENT_IDX),
            )  # fmt: skip
            self.memory.fill(at, 0x4000)
            self.set_up(index, driver)
            drivers.append(driver)
        self.write(registers.STATUS, self.status | DRIVER_OK)
        return drivers

    def notify(self, index: int = 0) -> None:
        """Ring the doorbell."""
        self.write(registers.QUEUE_NOTIFY, index)

    def close(self) -> None:
        self.window.close()
        self.memory.close()
        if self.irq >= 0:
            os.close(self.irq)
            self.irq = -1

    def __enter__(self) -> VirtioGuest:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def latch_bits(guest: VirtioGuest) -> int:
    """The interrupt status, without an access."""
    claim: Any = guest.fake.mmio.find(BASE + registers.INTERRUPT_STATUS)
    assert claim.on_read == lib.PYKVM_LATCH
    return int(claim.device.bits)
