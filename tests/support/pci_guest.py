"""A guest on the PCI bus without KVM: its accesses go through the C loop, as a guest's do."""

from __future__ import annotations

from typing import Any

from pykvm import result as reasons
from pykvm._abi import lib
from pykvm.devices import pci
from pykvm.devices.io_thread import IoThread
from pykvm.devices.pci import PciRoot
from pykvm.devices.virtio import pci as virtio
from pykvm.devices.virtio.core import ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK
from pykvm.devices.virtio.device import VirtioDevice
from pykvm.devices.virtio.pci import VirtioPci
from pykvm.memory import GuestMemory
from pykvm.vcpu_thread import NEVER
from tests.support.fake_vcpu import HLT, FakeRun, mmio
from tests.support.vring_driver import Driver

VERSION_1 = 1 << 32
ADDRESS, DATA = 0xCF8, 0xCFC
MESSAGE = 0xFEE0_1000


class Lines:
    """Interrupt lines that write down what happens to them."""

    def __init__(self, count: int = 0) -> None:
        self.count = count
        self.routes: list[dict[int, Any]] = []
        self.fired: list[int] = []
        self.fds: dict[int, int] = {}
        self.closed = False

    def route(self, messages: dict[int, Any]) -> None:
        self.routes.append(dict(messages))

    def fire(self, vector: int) -> None:
        self.fired.append(vector)

    def eventfd(self, vector: int) -> int:
        return self.fds.get(vector, -1)

    def close(self) -> None:
        self.closed = True

    def taken(self) -> list[int]:
        """What was sent since this was asked last."""
        found = self.fired[:]
        del self.fired[: len(found)]
        return found


class PciGuest:
    """Two buses, a PCI root, and a vCPU that makes one access at a time."""

    def __init__(self) -> None:
        self.fake = FakeRun(mmio(0), HLT)
        self.root = PciRoot(self.fake.pio, self.fake.mmio)
        self.fake.pio.unclaimed("ignore")
        self.fake.mmio.unclaimed("ignore")

    def _access(self, reason: int, address: int, size: int, value: int | None) -> int:
        exit = self.fake.script[0]
        exit.reason, exit.address, exit.size, exit.count = reason, address, size, 1
        exit.is_write = value is not None
        exit.data[0:8] = (value or 0).to_bytes(8, "little")
        end = self.fake.runner.run(NEVER, None)
        assert end.reason == reasons.HALTED, end.reason
        return int.from_bytes(self.fake.answered(0, size), "little")

    def port(self, port: int, size: int, value: int | None = None) -> int:
        """IN, or OUT of ``value``."""
        return self._access(lib.KVM_EXIT_IO, port, size, value)

    def memory_access(self, gpa: int, size: int, value: int | None = None) -> int:
        """Load, or store of ``value``."""
        return self._access(lib.KVM_EXIT_MMIO, gpa, size, value)

    def config(self, device: int, offset: int, size: int = 4, value: int | None = None) -> int:
        """An access to configuration space."""
        self.port(ADDRESS, 4, 1 << 31 | device << 11 | offset & 0xFC)
        return self.port(DATA + (offset & 3), size, value)

    def bar(self, device: int, number: int) -> int:
        """Where a BAR is."""
        value = self.config(device, pci.BARS + 4 * number)
        return value & ~3 if value & 1 else value & ~15

    def close(self) -> None:
        self.root.close()

    def __enter__(self) -> PciGuest:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class VirtioPciGuest(PciGuest):
    """The same with RAM, one virtio device, and its driver."""

    def __init__(
        self,
        device: VirtioDevice,
        *,
        io: IoThread | None = None,
        ram: str = "1M",
        msix: bool = True,
    ) -> None:
        super().__init__()
        self.memory = GuestMemory(ram)
        self.lines = Lines()
        self.device = device
        self.function = VirtioPci(
            device,
            self.memory,
            root=self.root,
            lines=self._make_lines if msix else None,
            io=io,
        )
        self.number = self.function.number
        self.config(self.number, pci.COMMAND, 2, 7)
        self.registers = self.bar(self.number, virtio.MEMORY)
        self.doorbells = self.bar(self.number, virtio.PORTS)

    def _make_lines(self, count: int) -> Lines:
        self.lines.count = count
        return self.lines

    def capabilities(self) -> list[tuple[int, int, bytes]]:
        """Offset, id and the first 20 bytes of each."""
        found = []
        at = self.config(self.number, pci.CAPABILITIES, 1)
        while at:
            words = [self.config(self.number, at + 4 * i) for i in range(5)]
            body = b"".join(word.to_bytes(4, "little") for word in words)
            found.append((at, body[0], body))
            at = body[1]
        return found

    def read(self, offset: int, size: int) -> int:
        """Load from BAR 0."""
        return self.memory_access(self.registers + offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """Store to BAR 0."""
        self.memory_access(self.registers + offset, size, value)

    @property
    def status(self) -> int:
        return self.read(20, 1)

    def negotiate(self, features: int = VERSION_1) -> bool:
        """Reset, and up to FEATURES_OK; whether the device took the features."""
        for status in (0, ACKNOWLEDGE, ACKNOWLEDGE | DRIVER):
            self.write(20, 1, status)
        for select in range(2):
            self.write(8, 4, select)
            self.write(12, 4, features >> 32 * select & 0xFFFFFFFF)
        self.write(20, 1, ACKNOWLEDGE | DRIVER | FEATURES_OK)
        return bool(self.status & FEATURES_OK)

    def use_msix(self) -> None:
        """Switch MSI-X on, every vector with a message of its own, unmasked."""
        (at,) = (at for at, id, _ in self.capabilities() if id == 0x11)
        self.config(self.number, at + 2, 2, 1 << 15)
        for vector in range(self.lines.count):
            entry = virtio.TABLE + 16 * vector
            for offset, value in ((0, MESSAGE), (4, 0), (8, 0x40 + vector), (12, 0)):
                self.write(entry + offset, 4, value)

    def start(self, features: int = VERSION_1, *, size: int = 8) -> list[Driver]:
        """Everything up to DRIVER_OK; a driver for each queue."""
        assert self.negotiate(features)
        self.write(16, 2, 0)
        drivers = []
        for index in range(self.read(18, 2)):
            at = 0x10000 + 0x4000 * index
            driver = Driver(self.memory, size, desc=at, driver=at + 0x1000, device=at + 0x2000)
            self.memory.fill(at, 0x4000)
            self.write(22, 2, index)
            self.write(24, 2, size)
            self.write(26, 2, index + 1)
            for offset, gpa in ((32, driver.desc), (40, driver.driver), (48, driver.device)):
                self.write(offset, 4, gpa)
                self.write(offset + 4, 4, 0)
            self.write(28, 2, 1)
            drivers.append(driver)
        self.write(20, 1, self.status | DRIVER_OK)
        return drivers

    def notify(self, index: int = 0) -> None:
        """Ring the doorbell, by its port."""
        self.port(self.doorbells + virtio.DOORBELL * index, 2, index)

    def close(self) -> None:
        self.function.close()
        super().close()
        self.memory.close()

    def __enter__(self) -> VirtioPciGuest:
        return self
