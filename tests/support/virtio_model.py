"""Virtio devices over MMIO in plain Python: what pykvm's are compared with.

Written from virtio 1.2 (2.1 status, 2.2 features, 4.2.2 registers, 5.3 console, 5.4 entropy), with
what pykvm chose where the specification leaves it open. Slow, and without anything clever.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from tests.support.twin_memory import PlainMemory
from tests.support.vring_model import Breach, ModelChain, ModelRing

ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET, FAILED = 1, 2, 4, 8, 64, 128
RINGS = 1 << 28 | 1 << 29 | 1 << 32


@dataclass
class ModelQueue:
    """A queue's registers, and its ring."""

    ring: ModelRing
    size: int
    addresses: list[int] = field(default_factory=lambda: [0, 0, 0])


class ModelDevice:
    """A device of any type; a subclass serves its queues.

    Attributes:
        edges: interrupts raised so far.
        interrupt: the interrupt status.
    """

    device_id = 0
    queue_sizes: tuple[int, ...] = ()
    features = 0

    def __init__(self, memory: PlainMemory) -> None:
        self.memory = memory
        self.edges = 0
        self.generation = 0
        self.selects = {0x14: 0, 0x24: 0, 0x30: 0}
        self._fresh()

    def _fresh(self) -> None:
        self.status = 0
        self.interrupt = 0
        self.wanted = 0
        self.queues = [ModelQueue(ModelRing(self.memory, size), size) for size in self.queue_sizes]

    # ---- registers -------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """A load within the window."""
        if offset >= 0x100:
            return int.from_bytes(self.config(offset - 0x100, size)[:size], "little")
        if size != 4 or offset % 4:
            return 0
        queue = self._selected()
        features = self.features | RINGS
        select = self.selects[0x14]
        registers = {
            0x00: 0x74726976,
            0x04: 2,
            0x08: self.device_id,
            0x0C: int.from_bytes(b"pykv", "little"),
            0x10: (features >> 32 * min(select, 4)) & 0xFFFFFFFF,
            0x34: queue.ring.max_size if queue else 0,
            0x44: int(queue.ring.enabled) if queue else 0,
            0x60: self.interrupt,
            0x70: self.status,
            0xB0: 0xFFFFFFFF,
            0xB4: 0xFFFFFFFF,
            0xB8: 0xFFFFFFFF,
            0xBC: 0xFFFFFFFF,
            0xFC: self.generation,
        }
        return registers.get(offset, 0)

    def write(self, offset: int, size: int, value: int) -> None:
        """A store within the window."""
        if offset >= 0x100:
            self.guarded(lambda: self.write_config(offset - 0x100, value.to_bytes(size, "little")))
            return
        if size != 4 or offset % 4:
            return
        queue = self._selected()
        if offset in self.selects:
            self.selects[offset] = value
        elif offset == 0x20 and not self.status & FEATURES_OK and self.selects[0x24] < 4:
            shift = 32 * self.selects[0x24]
            self.wanted = self.wanted & ~(0xFFFFFFFF << shift) | value << shift
        elif offset == 0x50:
            self.notify(value)
        elif offset == 0x64:
            self.interrupt &= ~value
        elif offset == 0x70:
            self._write_status(value)
        elif queue and offset == 0x38 and not queue.ring.enabled:
            queue.size = value
        elif queue and offset == 0x44:
            self.guarded(lambda: self._ready(queue, value))
        elif queue and offset in (0x80, 0x84, 0x90, 0x94, 0xA0, 0xA4) and not queue.ring.enabled:
            part, high = (offset - 0x80) // 16, offset % 16 // 4
            kept = queue.addresses[part] & (0xFFFFFFFF if high else 0xFFFFFFFF << 32)
            queue.addresses[part] = kept | value << 32 * high

    def _selected(self) -> ModelQueue | None:
        at = self.selects[0x30]
        return self.queues[at] if at < len(self.queues) else None

    def _write_status(self, value: int) -> None:
        value &= 0xFF
        if not value:
            self._fresh()
            return
        for bit, needed in (
            (ACKNOWLEDGE, 0),
            (DRIVER, 0),
            (FEATURES_OK, ACKNOWLEDGE | DRIVER),
            (DRIVER_OK, FEATURES_OK),
            (FAILED, 0),
        ):
            if not value & bit or self.status & needed != needed:
                continue
            if bit == FEATURES_OK and not self.status & bit:
                offered = self.features | RINGS
                if self.wanted & offered != self.wanted or not self.wanted >> 32 & 1:
                    continue
            self.status |= bit

    def _ready(self, queue: ModelQueue, value: int) -> None:
        if self.status & NEEDS_RESET:
            return
        ring = queue.ring
        if not value & 1:
            ring.enabled = False
            return
        if not self.status & FEATURES_OK:
            raise Breach("too early")
        if ring.enabled:
            return
        ring.size = queue.size
        ring.desc, ring.driver, ring.device = queue.addresses
        ring.event_idx = bool(self.wanted >> 29 & 1)
        ring.indirect = bool(self.wanted >> 28 & 1)
        ring.enable()

    # ---- breaches and interrupts -----------------------------------------------------------------

    def guarded(self, function: Callable[[], object]) -> None:
        """Call it; a breach asks for a reset."""
        try:
            function()
        except Breach:
            if self.status & NEEDS_RESET:
                return
            self.status |= NEEDS_RESET
            for queue in self.queues:
                queue.ring.enabled = False
            if self.status & DRIVER_OK:
                self._raise(2)

    def _raise(self, bits: int) -> None:
        self.interrupt |= bits
        self.edges += 1

    def config_changed(self) -> None:
        """The host changed the configuration."""
        self.generation += 1
        if self.running:
            self._raise(2)

    @property
    def running(self) -> bool:
        """Whether queues are served."""
        return self.status & (DRIVER_OK | NEEDS_RESET) == DRIVER_OK

    # ---- service ---------------------------------------------------------------------------------

    def notify(self, index: int) -> None:
        """A doorbell."""
        if self.running and index < len(self.queues) and self.queues[index].ring.enabled:
            self.guarded(lambda: self._serve(index))

    def _serve(self, index: int) -> None:
        ring = self.queues[index].ring
        pushed = False
        try:
            for _ in range(ring.size):
                if not self.has_something(index):
                    return
                chain = ring.pop()
                if chain is None:
                    return
                written = self.one(index, chain)
                ring.push(chain.head, written)
                pushed = True
            if self.has_something(index):
                ring.waiting()
        finally:
            if pushed and ring.should_interrupt():
                self._raise(1)

    def gather(self, chain: ModelChain) -> bytes:
        """All that the driver sends."""
        return b"".join(self.memory.read(gpa, length) for gpa, length in chain.readable)

    def scatter(self, chain: ModelChain, data: bytes) -> int:
        """Write into the chain; how many bytes fitted."""
        written = 0
        for gpa, length in chain.writable:
            piece = data[written : written + length]
            self.memory.write(gpa, piece)
            written += len(piece)
        return written

    def has_something(self, index: int) -> bool:
        """Whether the device wants a chain at all."""
        return True

    def one(self, index: int, chain: ModelChain) -> int:
        """Serve a chain; how many bytes were written."""
        raise NotImplementedError

    def config(self, offset: int, size: int) -> bytes:
        """Read the configuration."""
        return b""

    def write_config(self, offset: int, data: bytes) -> None:
        """Write the configuration."""


class ModelRng(ModelDevice):
    """Its bytes count up from 1."""

    device_id, queue_sizes = 4, (64,)

    def one(self, index: int, chain: ModelChain) -> int:
        total = sum(length for _, length in chain.writable)
        return self.scatter(chain, counting(min(total, 4096)))


class ModelConsole(ModelDevice):
    """What it prints is kept whole."""

    device_id, queue_sizes, features = 3, (64, 64), 1 << 0 | 1 << 2

    def __init__(self, memory: PlainMemory) -> None:
        super().__init__(memory)
        self.printed = b""
        self.typed = b""
        self.columns, self.rows = 80, 25

    def has_something(self, index: int) -> bool:
        return index == 1 or bool(self.typed)

    def one(self, index: int, chain: ModelChain) -> int:
        if index == 1:
            if sum(length for _, length in chain.readable) > 1 << 20:
                raise Breach("output")
            self.printed += self.gather(chain)
            return 0
        written = self.scatter(chain, self.typed[:4096])
        self.typed = self.typed[written:]
        return written

    def config(self, offset: int, size: int) -> bytes:
        low = self.columns | self.rows << 16 | 1 << 32
        return low.to_bytes(12, "little")[offset : offset + size]

    def write_config(self, offset: int, data: bytes) -> None:
        if offset == 8:
            self.printed += data[:1]


class ModelEcho(ModelDevice):
    """Answers with what it was sent, but for one request that it calls a breach."""

    device_id, queue_sizes, features = 42, (8, 4), 1 << 3

    def __init__(self, memory: PlainMemory) -> None:
        super().__init__(memory)
        self.fields = b"0123456789abcdef"

    def one(self, index: int, chain: ModelChain) -> int:
        data = self.gather(chain)
        if data[:1] == b"\xbd":
            raise Breach("request")
        return self.scatter(chain, data)

    def config(self, offset: int, size: int) -> bytes:
        return self.fields[offset : offset + size]

    def write_config(self, offset: int, data: bytes) -> None:
        if offset + len(data) > 16:
            raise Breach("config")
        self.fields = self.fields[:offset] + data + self.fields[offset + len(data) :]


def counting(count: int) -> bytes:
    """So many bytes that are easily told apart."""
    return bytes((n + 1) & 0xFF for n in range(count))
