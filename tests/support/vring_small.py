"""A queue in a little memory, and its driver."""

from __future__ import annotations

from pykvm.devices.virtio.queue import Queue
from pykvm.memory import GuestMemory
from tests.support.vring_driver import Driver

SIZE = 8
ROM = 0x80000
HOLE = 0x40000
BUFFER = 0x10000


def make(
    size: int = SIZE, *, event_idx: bool = False, indirect: bool = True, max_size: int = 16
) -> tuple[GuestMemory, Queue, Driver]:
    """RAM from 0 to HOLE, in two regions that adjoin at half of it; a ROM."""
    memory = GuestMemory()
    memory.add(0, HOLE // 2)
    memory.add(ROM, 0x1000, readonly=True)
    memory.add(HOLE // 2, HOLE // 2)
    queue = Queue(0, max_size, memory)
    driver = Driver(memory, size, event_idx=event_idx)
    place(queue, driver)
    queue.enable(event_idx=event_idx, indirect=indirect)
    return memory, queue, driver


def place(queue: Queue, driver: Driver) -> None:
    queue.set_size(driver.size)
    for part in ("desc", "driver", "device"):
        queue.set_address(part, getattr(driver, part))
