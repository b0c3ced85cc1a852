"""A program under KVM that fires random accesses and ring traffic at virtio devices."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

import pykvm
from pykvm import result as reasons
from pykvm.arch.x86_64.paging import PageTables
from pykvm.devices.virtio.device import VirtioDevice
from pykvm.devices.virtio.mmio import VirtioMmio
from pykvm.virtio import Console, Rng
from tests.hostile.program import FLOOD, SOURCE

PLAY = 0x1_8000_0000
"""RAM for rings and buffers: so far from the program that no slip of an address reaches that."""
PLAY_BYTES = 1 << 20
DISK_BYTES = 1 << 20
CODE, TABLES, TABLES_END = 0x8000, 0x100000, 0x1C0000


class Lost(AssertionError):
    """The guest found a device that does not work any more, or the run ended otherwise."""


class Outcome:
    """What a run of the program gave.

    Attributes:
        operations: how many.
        states: distinct situations of the devices, as far as accesses reached Python.
        counters: of each device.
        exits: of the vCPU.
        seconds: it took.
    """

    def __init__(self, operations: int, states: int, result: Any) -> None:
        self.operations = operations
        self.states = states
        self.counters: dict[str, dict[str, Any]] = result.devices
        self.exits: int = result.exits
        self.seconds: float = result.seconds


PATIENCE = {"sync": 1000, "thread": 400_000_000}
"""How often the program looks for what it asked for: once would do, and some seconds."""


def machine(io: str, source: str = SOURCE, output: Any = None) -> pykvm.Machine:
    """A machine with an entropy device, a console, a disk, and the program in ring 3."""
    memory = pykvm.GuestMemory()
    memory.add(0, "2M")
    memory.add(PLAY, PLAY_BYTES)
    m = pykvm.Machine(memory)
    try:
        m.virtio(Rng(rate=None), io=io)
        m.virtio(Console(keep=1 << 16, output=output), io=io)
        with tempfile.NamedTemporaryFile(prefix="pykvm-hostile-") as image:
            image.truncate(DISK_BYTES)
            m.disk(image.name, io=io)
        m.debug_exit()
        m.mmio.unclaimed("ignore")  # an access may reach beyond the end of the last window
        source = source.replace("PLAY", hex(PLAY)).replace("PATIENCE", str(PATIENCE[io]))
        code = pykvm.asm(source, mode="long64", at=CODE)
        m.load(code, at=CODE)
        m.cpu.enter("long64", entry=CODE, ring=3, iopl=3)
        tables = PageTables(m.memory, TABLES, TABLES_END)
        tables.page_sizes = tables.page_sizes[:2]
        tables.identity(1 << 32, perms="rwxu")
        tables.map(PLAY, PLAY, 2 << 20, perms="rwxu")
        m.cpu.cr3 = tables.cr3
    except BaseException:
        m.close()
        raise
    return m


@contextmanager
def states_seen() -> Iterator[set[tuple[object, ...]]]:
    """The situations in which accesses to windows find their devices."""
    seen: set[tuple[object, ...]] = set()
    plain = VirtioMmio._access

    def access(self: VirtioMmio, access: Any) -> int | None:
        device: VirtioDevice = self.device
        seen.add(
            (
                device.NAME,
                device.status,
                self._latch.bits,
                device.driver_features >> 28 & 3,
                *(
                    (q.c.enabled, q.c.quiet, (q.c.avail_seen - q.c.next_avail) % 65536)
                    for q in device.queues
                ),
            )
        )
        return plain(self, access)

    VirtioMmio._access = access  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        VirtioMmio._access = plain  # type: ignore[method-assign]


def run(operations: int, seed: int, io: str = "sync", timeout: float | None = None) -> Outcome:
    """Run the program; raises Lost."""
    with states_seen() as states, machine(io) as m:
        m.cpu.r14 = operations
        m.cpu.r15 = Random(seed).getrandbits(64) | 1
        result = m.run(timeout=timeout)
        if result.reason != reasons.DEBUG_EXIT or result.code != 0:
            left = m.cpu.r14
            why = {1: "a request was not served", 2: "a fresh driver's device is not well"}
            raise Lost(
                f"{why.get(result.code or 0, 'the run ended')}: {result}, {left} operations left,"
                f" {m.devices}"
            )
        return Outcome(operations, len(states), result)


def flood(notifies: int, stops: int, io: str = "thread") -> tuple[list[float], int, int]:
    """Ring a doorbell so often, in a row, and stop the run now and then.

    Returns:
        How long each stop took, in seconds; how many characters the console showed; and doorbells
        rung, at least.
    """
    shown: list[bytes] = []
    latencies: list[float] = []
    with machine(io, FLOOD, shown.append) as m:
        _start_rng(m)
        m.cpu.r14 = 1 << 40  # more than there is time for
        while len(latencies) < stops:
            ended: list[float] = []

            def run(ended: list[float] = ended) -> None:
                m.run(timeout=60)
                ended.append(time.perf_counter())

            before = sum(map(len, shown))
            thread = threading.Thread(target=run)
            thread.start()
            patience = time.perf_counter() + 60
            while sum(map(len, shown)) == before and thread.is_alive():  # the console lives
                if time.perf_counter() > patience:
                    raise Lost("the console shows nothing any more")
                time.sleep(0.001)
            asked = time.perf_counter()
            m.stop()
            thread.join(60)
            latencies.append(ended[0] - asked)
        rung = 1000 * sum(map(len, shown))
        while rung < notifies:  # what is left, in one go
            m.cpu.rip = CODE
            m.cpu.r14 = notifies - rung
            m.run(timeout=600)
            rung = 1000 * sum(map(len, shown))
        return latencies, sum(map(len, shown)), rung


def _start_rng(m: pykvm.Machine) -> None:
    """Start the entropy device from here, with a ring in the playground."""
    device = m.devices["rng"]
    device.write_status(3)
    device.write_features(1, 1)
    device.write_status(11)
    for what, gpa in (("desc", PLAY), ("driver", PLAY + 0x1000), ("device", PLAY + 0x2000)):
        device.queue_set(0, f"{what}_low", gpa & 0xFFFFFFFF)
        device.queue_set(0, f"{what}_high", gpa >> 32)
    device.queue_set(0, "size", 8)
    device.queue_set(0, "ready", 1)
    device.write_status(15)
    if not device.activated or not device.queue_ready(0):
        raise Lost(f"the entropy device did not start: {device!r}")
