"""What does a block request cost that Python serves, the work on the file excluded?

A read of 4 KiB as Linux frames it, popped from a ring in guest memory, parsed, checked, given to a
disk that does nothing, answered and pushed back, counters and interrupt included: one request a
doorbell, and 64. The reference is the work left out: one preadv of 4 KiB from the page cache.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from struct import pack
from time import perf_counter_ns

from benches.measure import OF_OURS, BenchError, Goal, Result, compare, take_turns
from pykvm.devices.disk.base import Disk
from pykvm.devices.disk.host import Limits
from pykvm.devices.virtio.blk import Blk
from pykvm.memory import GuestMemory

C_ONLY = False

DESC, AVAIL, USED, HEADERS, STATUSES, DATA = 0x1000, 0x3000, 0x4000, 0x8000, 0xA000, 0x10000
SIZE, CHAINS, BLOCK = 256, 64, 4096
REQUESTS = 4096
"""Of a sample."""

GOAL_NS = 8000


class NoDisk(Disk):
    """Has no file behind it."""

    path = "nothing"
    readonly = False
    sectors = 1 << 21
    can_discard = True
    write_back = True

    def __init__(self) -> None:
        self.limits = Limits(512, 4096)
        self.reads = 0

    def read(self, views: Sequence[memoryview], offset: int) -> None:
        self.reads += 1

    def close(self) -> None:
        pass


def driver(memory: GuestMemory) -> None:
    """Fill a ring with chains of header, data and status; entry n of it is chain n mod CHAINS."""
    for n in range(CHAINS):
        head = 4 * n
        memory.write(HEADERS + 16 * n, pack("<IIQ", 0, 0, 8 * n))
        buffers = (HEADERS + 16 * n, 16, 1), (DATA + BLOCK * n, BLOCK, 3), (STATUSES + n, 1, 2)
        for at, (gpa, length, flags) in enumerate(buffers, head):
            memory.write(DESC + 16 * at, pack("<QIHH", gpa, length, flags, at + 1))
    for n in range(SIZE):
        memory.u16[AVAIL + 4 + 2 * n] = 4 * (n % CHAINS)


def measure(pairs: int) -> Iterator[Result]:
    """One request a doorbell, then many."""
    with GuestMemory("1M") as memory:
        driver(memory)
        disk = NoDisk()
        device = Blk(disk)
        device.attach(memory)
        device.write_features(0, device.offered & 0xFFFFFFFF & ~(1 << 29))
        device.write_features(1, device.offered >> 32)
        for status in (1, 3, 11):
            device.write_status(status)
        parts = {"desc_low": DESC, "driver_low": AVAIL, "device_low": USED, "ready": 1}
        for what, value in {"size": SIZE, **parts}.items():
            device.queue_set(0, what, value)
        device.write_status(15)
        samplers = [_requests(memory, device, 1), _requests(memory, device, CHAINS), _preadv()]
        one, many, file = take_turns(samplers, pairs)
        if disk.reads != (pairs + 1) * 2 * REQUESTS or memory.u8[STATUSES] or device.broken:
            raise BenchError(f"{disk.reads} reads of {(pairs + 1) * 2 * REQUESTS}: {device}")
        note = "reference: a preadv of 4 KiB from the page cache, which is not in ours"
        goal = Goal(GOAL_NS, OF_OURS)
        yield compare("blk-request/one", "ns/request", one, file, goal=goal, note=note)
        yield compare(f"blk-request/{CHAINS}", "ns/request", many, file, goal=goal, note=note)
        device.close()


def _requests(memory: GuestMemory, device: Blk, batch: int) -> Callable[[], float]:
    index = memory.view(AVAIL + 2, 2).cast("H")

    def sample() -> float:
        notify = device.notify
        start = perf_counter_ns()
        for _ in range(REQUESTS // batch):
            index[0] = (index[0] + batch) & 0xFFFF
            notify(0)
        return (perf_counter_ns() - start) / REQUESTS

    return sample


def _preadv() -> Callable[[], float]:
    fd = os.memfd_create("file")
    os.truncate(fd, BLOCK)
    views = [memoryview(bytearray(BLOCK))]

    def sample() -> float:
        start = perf_counter_ns()
        for _ in range(REQUESTS):
            os.preadv(fd, views, 0)
        return (perf_counter_ns() - start) / REQUESTS

    return sample
