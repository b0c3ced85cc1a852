"""A virtio device for tests of what all of them share: it answers with what it was sent."""

from __future__ import annotations

from pykvm.devices.virtio.device import VirtioDevice
from pykvm.devices.virtio.queue import Chain, Queue
from pykvm.errors import GuestError
from tests.support.virtio_guest import VirtioGuest
from tests.support.vring_driver import WRITE, Driver

BUFFER = 0x40000


class Echo(VirtioDevice):
    """Answers with what it was sent; queue 1 keeps its chains until it is told."""

    NAME = "echo"
    device_id = 42
    queue_max_sizes = (16, 16)
    device_features = 1 << 3

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Chain] = []
        self.config = bytearray(b"0123456789abcdef")
        self.activations = 0
        self.drains = 0

    def activate(self) -> None:
        self.activations += 1

    def queue_notify(self, index: int) -> bool:
        return self.serve(index, self._one)

    def _one(self, queue: Queue, chain: Chain) -> int | None:
        if queue.index == 1:
            self.kept.append(chain)
            return None
        data = chain.read()
        if data == b"bad":
            raise GuestError("a bad request")
        return chain.write(data)

    def config_read(self, offset: int, size: int) -> bytes:
        return bytes(self.config[offset : offset + size])

    def config_write(self, offset: int, data: bytes) -> None:
        if offset + len(data) > len(self.config):
            raise GuestError("no such field")
        self.config[offset : offset + len(data)] = data

    def drain(self) -> None:
        self.drains += 1


def send(guest: VirtioGuest, driver: Driver, data: bytes, first: int = 0) -> None:
    guest.memory.write(BUFFER, data)
    driver.send((BUFFER, len(data), 0), (BUFFER + 0x100, 64, WRITE), first=first)
