"""Devices and their registers beside a model of both: any access, any ring, any order."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from random import Random
from typing import Any

from pykvm import result as reasons
from pykvm.devices.virtio.console import VirtioConsole
from pykvm.devices.virtio.device import VirtioDevice
from pykvm.devices.virtio.mmio import VirtioMmio
from pykvm.devices.virtio.queue import Chain, Queue
from pykvm.devices.virtio.rng import Rng
from pykvm.errors import GuestError
from pykvm.vcpu_thread import NEVER
from tests.hostile import blk
from tests.hostile.blk import BlkWriter, ModelBlk
from tests.support.fake_vcpu import HLT, FakeRun, mmio
from tests.support.ring_writer import RingWriter
from tests.support.twin_memory import Mismatch, Twins
from tests.support.virtio_model import (
    ModelConsole,
    ModelDevice,
    ModelEcho,
    ModelRng,
    counting,
)

BASE = 0xD000_0000
KEEP = 1 << 16
"""Bytes of output that a console keeps here: what a guest can make the host remember."""

REGISTERS = (
    0x00, 0x04, 0x08, 0x0C, 0x10, 0x14, 0x20, 0x24, 0x30, 0x34, 0x38, 0x44, 0x50, 0x60, 0x64, 0x70,
    0x80, 0x84, 0x90, 0x94, 0xA0, 0xA4, 0xAC, 0xB0, 0xB8, 0xC0, 0xFC, 0x100, 0x104, 0x108, 0x10C,
)  # fmt: skip


class Echo(VirtioDevice):
    """The device of ModelEcho."""

    NAME = "echo"
    device_id = 42
    queue_max_sizes = (8, 4)
    device_features = 1 << 3

    def __init__(self) -> None:
        super().__init__()
        self.fields = bytearray(b"0123456789abcdef")

    def queue_notify(self, index: int) -> bool:
        return self.serve(index, self._one)

    def _one(self, queue: Queue, chain: Chain) -> int:
        data = chain.read()
        if data[:1] == b"\xbd":
            raise GuestError("a bad request")
        return chain.write(data)

    def config_read(self, offset: int, size: int) -> bytes:
        return bytes(self.fields[offset : offset + size])

    def config_write(self, offset: int, data: bytes) -> None:
        if offset + len(data) > len(self.fields):
            raise GuestError("no such field")
        self.fields[offset : offset + len(data)] = data


class HostileDriver:
    """A device in its window, its model, and a driver that does what it likes.

    Attributes:
        steps: made so far.
    """

    def __init__(self, random: Random, kind: str = "") -> None:
        self.random = random
        self.twins = Twins()
        self.printed = b""
        kind = kind or random.choice(("rng", "console", "echo", "blk"))
        self.device: Any
        self.model: Any
        if kind == "rng":
            self.device = Rng(rate=None, source=counting)
            self.model = ModelRng(self.twins.plain)
        elif kind == "console":
            self.device = VirtioConsole(output=self._print, keep=KEEP)
            self.model = ModelConsole(self.twins.plain)
        elif kind == "blk":
            readonly = random.random() < 0.2
            self.device, self.model = blk.device(readonly), ModelBlk(self.twins.plain, readonly)
        else:
            self.device, self.model = Echo(), ModelEcho(self.twins.plain)
        self.kind = kind
        self._irq = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.fake = FakeRun(mmio(BASE), HLT)
        self.window = VirtioMmio(
            self.device, self.twins.memory, bus=self.fake.mmio, base=BASE, irq=self._irq
        )
        self.edges = 0
        self.writers = self._writers()
        self.start()

    def _print(self, data: bytes) -> None:
        self.printed += data

    def _writers(self) -> list[RingWriter]:
        kind = BlkWriter if self.kind == "blk" else RingWriter
        return [kind(self.random, self.twins, queue.ring) for queue in self.model.queues]

    def close(self) -> None:
        self.window.close()
        self.twins.memory.close()
        os.close(self._irq)

    # ---- accesses --------------------------------------------------------------------------------

    def _access(self, offset: int, size: int, value: int | None) -> int:
        exit = self.fake.script[0]
        exit.address, exit.size, exit.is_write = BASE + offset, size, value is not None
        exit.data[0:8] = (value or 0).to_bytes(8, "little")
        end = self.fake.runner.run(NEVER, None)
        if end.reason != reasons.HALTED:
            raise Mismatch(f"the run ended: {end.reason}")
        return int.from_bytes(self.fake.answered(0, size), "little")

    def read(self, offset: int, size: int = 4) -> int:
        ours, theirs = self._access(offset, size, None), self.model.read(offset, size)
        if ours != theirs:
            raise Mismatch(f"read of {offset:#x} ({size}): {ours:#x}, the model says {theirs:#x}")
        return ours

    def write(self, offset: int, value: int, size: int = 4) -> None:
        queues = self.model.queues
        value &= (1 << 8 * size) - 1
        self._access(offset, size, value)
        self.model.write(offset, size, value)
        if self.model.queues is not queues:  # a reset made them anew
            for writer, queue in zip(self.writers, self.model.queues, strict=True):
                writer.model, writer.index = queue.ring, 0

    # ---- what a driver does ----------------------------------------------------------------------

    def start(self, until: int = 8, sane: bool = True) -> None:
        """A driver's start (3.1.1), or the first steps of it."""
        random = self.random
        wanted = 1 << 32 | (self.model.features | 1 << 28 | 1 << 29) & random.getrandbits(30)
        if not sane and random.random() < 0.3:
            wanted ^= 1 << random.randrange(64)
        steps: list[Callable[[], None]] = [
            lambda: self.write(0x70, 0),
            lambda: self.write(0x70, 1),
            lambda: self.write(0x70, 3),
            lambda: self._want(0, wanted),
            lambda: self._want(1, wanted >> 32),
            lambda: self.write(0x70, 11),
            lambda: self._set_up_all(sane),
            lambda: self.write(0x70, 15),
        ]
        for step in steps[:until]:
            if sane or random.random() < 0.97:
                step()

    def _want(self, select: int, features: int) -> None:
        self.write(0x24, select)
        self.write(0x20, features)

    def _set_up_all(self, sane: bool) -> None:
        for index in range(len(self.writers)):
            self.set_up(index, sane)

    def set_up(self, index: int, sane: bool = False) -> None:
        """Tell the device of a ring."""
        random, writer = self.random, self.writers[index]
        if not self.model.queues[index].ring.enabled:
            sane = sane or random.random() < 0.8
            size, desc, driver, device = writer.choose(sane, 0x100 + 0x800 * index)
            ring = writer.model
            if not ring.enabled:  # the writer goes by it from now on
                ring.size, ring.desc, ring.driver, ring.device = size, desc, driver, device
        else:
            size, desc, driver, device = (random.getrandbits(32) for _ in range(4))
        self.write(0x30, index)
        self.write(0x38, size)
        for at, gpa in ((0x80, desc), (0x90, driver), (0xA0, device)):
            self.write(at, gpa)
            self.write(at + 4, gpa >> 32)
        self.write(0x44, 1)

    def prove(self) -> None:
        """Whatever came before: after a reset a driver that does it right is served."""
        self.start()
        index = 1 if self.kind == "console" else 0
        writer = self.writers[index]
        ring = writer.model
        if not self.model.running or not ring.enabled:
            raise Mismatch("a fresh driver could not start")
        before = self.device.counters.requests
        self.twins.poke(ring.desc, (0x6000).to_bytes(8, "little") + bytes((16, 0, 0, 0)) + bytes(4))
        if self.kind != "console":
            self.twins.poke(ring.desc + 12, b"\2")
        self.twins.poke(ring.driver + 4, b"\0\0")
        self.twins.poke(ring.driver + 2, b"\1\0")
        self.write(0x50, index)
        if self.device.counters.requests != before + 1 or self.model.status & 64:
            raise Mismatch("a fresh driver was not served")
        self.check()

    # ---- steps -----------------------------------------------------------------------------------

    def step(self) -> str:
        """One step of a random kind; its name. Raises Mismatch."""
        random = self.random
        names, shares = (
            ("offer", "notify", "read", "write", "status", "set_up", "scribble", "ack", "host",
             "start"),
            (22, 22, 16, 14, 4, 4, 4, 6, 5, 3),
        )  # fmt: skip
        name = random.choices(names, shares)[0]
        if not self.model.running and random.random() < 0.2:
            name = "start"  # else most steps would meet a device that sleeps
        getattr(self, f"_{name}")()
        self.check()
        return name

    def _writer(self) -> RingWriter:
        return self.random.choice(self.writers)

    def _offer(self) -> None:
        self._writer().offer()

    def _scribble(self) -> None:
        self._writer().scribble()

    def _notify(self) -> None:
        random = self.random
        index = random.randrange(len(self.writers))
        if random.random() < 0.05:
            index = random.choice((2, 3, 0xFFFF, 0xFFFFFFFF))
        self.write(0x50, index, random.choice((4, 4, 4, 4, 4, 4, 1, 2, 8)))

    def _where(self) -> tuple[int, int]:
        random = self.random
        offset = random.choice(REGISTERS)
        if random.random() < 0.2:
            offset = random.choice((random.randrange(0x140), random.randrange(0x1000 - 8)))
        if self.kind == "blk" and random.random() < 0.2:
            return 0x100 + blk.WRITEBACK, 1
        return offset, random.choice((4, 4, 4, 4, 1, 2, 8))

    def _read(self) -> None:
        self.read(*self._where())

    def _write(self) -> None:
        random = self.random
        offset, size = self._where()
        value = random.choice((0, 1, 2, 3, 0xFF, 0xFFFFFFFF, random.getrandbits(32)))
        self.write(offset, value, size)

    def _status(self) -> None:
        value = self.random.choice((0, 1, 2, 3, 4, 8, 11, 15, 15, 64, 128, 255, 1 << 8))
        self.write(0x70, value)
        self.read(0x70)

    def _set_up(self) -> None:
        index = self.random.randrange(len(self.writers))
        if self.random.random() < 0.5:
            self.write(0x30, index)
            self.write(0x44, 0)
        self.set_up(index)

    def _ack(self) -> None:
        self.write(0x64, self.read(0x60) if self.random.random() < 0.8 else 1)

    def _start(self) -> None:
        random = self.random
        self.start(random.choice((1, 4, 6, 8, 8, 8, 8)), sane=random.random() < 0.7)

    def _host(self) -> None:
        """What the host does to its devices."""
        random = self.random
        if random.random() < 0.2:  # a snapshot of itself changes nothing
            state = json.loads(json.dumps(self.window.state()))
            self.window.restore(state)
            if self.window.state() != state:
                raise Mismatch(f"{self.window.state()} was made of {state}")
        elif self.kind == "console" and random.random() < 0.7:
            if len(self.model.typed) < 10000:
                data = random.randbytes(random.choice((1, 10, 5000)))
                self.model.typed += data
                self.model.notify(0)
                self.device.write(data)
        elif self.kind == "blk":
            self._grow()
        elif self.kind == "console":
            self.model.columns, self.model.rows = columns, rows = 80 + random.randrange(80), 50
            self.model.config_changed()
            self.device.resize(columns, rows)
        else:
            self.model.config_changed()
            self.device.config_changed()

    def _grow(self) -> None:
        """The image becomes larger, now and then, or only is looked at."""
        model, disk = self.model, self.device.disk
        grows = len(model.disk) < 512 * blk.MOST_SECTORS and self.random.random() < 0.5
        if grows:
            model.disk += bytes(512)
            disk.file.truncate(len(model.disk))
            model.config_changed()
        if self.device.refresh() != grows:
            raise Mismatch("the image's size was not seen")
        for writer in self.writers:
            if isinstance(writer, BlkWriter):
                writer.sectors = len(model.disk) // 512

    # ---- what must be the same -------------------------------------------------------------------

    def check(self) -> None:
        """Compare all that can be seen. Raises Mismatch."""
        model: ModelDevice = self.model
        with suppress(BlockingIOError):
            self.edges += os.eventfd_read(self._irq)
        ready = [queue.ready for queue in self.device.queues]
        status = self.window._latch.bits
        for what, ours, theirs in (
            ("status", self.device.status, model.status),
            ("features", self.device.driver_features, model.wanted),
            ("interrupts", self.edges, model.edges),
            ("interrupt status", status, model.interrupt),
            ("ready", ready, [queue.ring.enabled for queue in model.queues]),
        ):
            if ours != theirs:
                raise Mismatch(f"{what}: {ours!r}, and the model says {theirs!r}")
        if isinstance(model, ModelConsole):
            if self.printed != model.printed or self.device.pending != len(model.typed):
                raise Mismatch("the console's text differs")
            if len(self.device.transcript) > KEEP:
                raise Mismatch(f"the console keeps {len(self.device.transcript)} bytes")
            if len(model.printed) > 4 * KEEP:
                self.printed = model.printed = b""
        if isinstance(model, ModelBlk):
            there = bytearray(len(model.disk) + 1)
            size = self.device.disk.file.preadv([memoryview(there)], 0)
            if there[:size] != model.disk:
                raise Mismatch("something else is on the disk")
        self.twins.check_memory()

    def state(self) -> tuple[object, ...]:
        """What tells situations apart, for counting how many were met."""
        model = self.model
        return (
            self.kind, model.status, model.interrupt, model.wanted >> 28 & 3,
            *(
                (q.ring.enabled, q.ring.size if q.ring.enabled else 0, q.ring.quiet,
                 (q.ring.seen - q.ring.next_avail) % 65536)
                for q in model.queues
            ),
        )  # fmt: skip
