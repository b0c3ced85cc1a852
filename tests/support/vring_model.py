"""The device's side of a split virtqueue in plain Python: what ``csrc/vring.c`` is compared with.

Written from the clauses of virtio 1.2 (2.7) over any object with ``read(gpa, n)``, ``write(gpa,
data)``, and ``covers(gpa, n, writable)``; slow, and without anything clever.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

NEXT, WRITE, INDIRECT = 1, 2, 4
INDIRECT_MAX = 1024
PIECES = 1024


class Memory(Protocol):
    """Guest memory as the model sees it."""

    def read(self, gpa: int, length: int, /) -> bytes: ...
    def write(self, gpa: int, data: bytes, /) -> None: ...
    def covers(self, gpa: int, length: int, writable: bool, /) -> bool: ...
    def pieces(self, gpa: int, length: int, /) -> list[tuple[int, int]]:
        """Split at the borders of regions."""
        ...


class Breach(Exception):
    """What the driver did: the name of a PYKVM_BREACH_* constant."""


@dataclass
class ModelChain:
    """A chain as ``(gpa, length)`` pieces."""

    head: int
    readable: list[tuple[int, int]] = field(default_factory=list)
    writable: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class ModelRing:
    """One ring; addresses and features are set before :meth:`enable`."""

    memory: Memory
    max_size: int
    size: int = 0
    desc: int = 0
    driver: int = 0
    device: int = 0
    event_idx: bool = False
    indirect: bool = False
    enabled: bool = False
    next_avail: int = 0
    used: int = 0
    signalled: int = 0
    pushed_since: int = 0
    in_flight: int = 0

    def _int(self, gpa: int, length: int) -> int:
        return int.from_bytes(self.memory.read(gpa, length), "little")

    def _put(self, gpa: int, value: int, length: int) -> None:
        self.memory.write(gpa, value.to_bytes(length, "little"))

    def enable(self) -> None:
        """2.7: sizes and alignments of the parts."""
        size = self.size
        if not 0 < size <= self.max_size or bin(size).count("1") != 1:
            raise Breach("SIZE")
        for gpa, align, length, writable in (
            (self.desc, 16, 16 * size, False),
            (self.driver, 2, 6 + 2 * size, False),
            (self.device, 4, 6 + 8 * size, True),
        ):
            if gpa % align:
                raise Breach("ALIGN")
            if not self.memory.covers(gpa, length, writable):
                raise Breach("RING")
        self.next_avail = self.used = self.signalled = self.pushed_since = self.in_flight = 0
        self.quiet = False
        self.seen = 0
        self.enabled = True

    quiet: bool = False
    seen: int = 0

    def _waiting(self) -> int:
        """The driver's index is looked at when all it told of before is served, not sooner."""
        if self.seen == self.next_avail:
            self.seen = self._int(self.driver + 2, 2)
        return (self.seen - self.next_avail) % 65536

    def waiting(self) -> bool:
        """2.7.10: none waits, and notifications are on; or some do."""
        if not self.enabled:
            return False
        if self._waiting() == 0:
            if self.event_idx:
                self._put(self.device + 4 + 8 * self.size, self.next_avail, 2)
            elif self.quiet:
                self._put(self.device, 0, 2)
                self.quiet = False
            return self._waiting() != 0
        return True

    def pop(self) -> ModelChain | None:
        """2.7.14, from the other side."""
        if not self.waiting():
            return None
        if not self.event_idx and not self.quiet:
            self._put(self.device, 1, 2)
            self.quiet = True
        if self._waiting() > self.size:
            raise Breach("INDEX")
        if self.in_flight >= self.size:
            raise Breach("FLIGHT")
        head = self._int(self.driver + 4 + 2 * (self.next_avail % self.size), 2)
        if head >= self.size:
            raise Breach("HEAD")
        chain = ModelChain(head)
        self._walk(chain)
        self.next_avail = (self.next_avail + 1) % 65536
        self.in_flight += 1
        return chain

    def _descriptor(self, table: int, count: int, index: int) -> bytes:
        """In the steps in which a device may read it, as a driver may write in between."""
        spans = len(self.memory.pieces(table, 16 * count)) > 1 and table != self.desc
        step = 1 if spans else 8
        at = table + 16 * index
        return b"".join(self.memory.read(at + n, step) for n in range(0, 16, step))

    def _walk(self, chain: ModelChain) -> None:
        table, count, index, steps, direct = self.desc, self.size, chain.head, 0, True
        wrote = False
        total = 0
        while True:
            raw = self._descriptor(table, count, index)
            gpa = int.from_bytes(raw[0:8], "little")
            length = int.from_bytes(raw[8:12], "little")
            flags = int.from_bytes(raw[12:14], "little")
            following = int.from_bytes(raw[14:16], "little")
            if flags & INDIRECT:
                if not direct or not self.indirect or flags & NEXT:
                    raise Breach("INDIRECT")
                if not length or length % 16 or length > 16 * INDIRECT_MAX:
                    raise Breach("TABLE")
                if not self.memory.covers(gpa, length, False):
                    raise Breach("TABLE")
                table, count, index, steps, direct = gpa, length // 16, 0, 0, False
                continue
            if wrote and not flags & WRITE:
                raise Breach("ORDER")
            wrote = wrote or bool(flags & WRITE)
            total += length
            if total > 1 << 32:
                raise Breach("TOTAL")
            pieces = chain.writable if wrote else chain.readable
            room = self.max_size + PIECES - len(chain.readable) - len(chain.writable)
            if length and not self.memory.covers(gpa, length, wrote):
                raise Breach("BUFFER")
            made = self.memory.pieces(gpa, length) if length else []
            if len(made) > room:
                raise Breach("LONG")
            pieces += made
            if not flags & NEXT:
                return
            steps += 1
            if steps == count:
                raise Breach("LOOP")
            if following >= count:
                raise Breach("NEXT")
            index = following

    def push(self, head: int, written: int) -> bool:
        """2.7.8."""
        at = self.device + 4 + 8 * (self.used % self.size)
        self._put(at, head, 4)
        self._put(at + 4, written, 4)
        self.used = (self.used + 1) % 65536
        self.in_flight -= 1
        self.pushed_since += 1
        self._put(self.device + 2, self.used, 2)
        return True

    def should_interrupt(self) -> bool:
        """2.7.7.2: whether any index from the last look to now has passed used_event."""
        pushed, self.pushed_since = self.pushed_since, 0
        if not self.enabled or not pushed:
            return False
        if not self.event_idx:
            return not self._int(self.driver, 2) & 1
        event = self._int(self.driver + 4 + 2 * self.size, 2)
        return pushed >= 65536 or any(
            (self.used - back) % 65536 == event for back in range(1, pushed + 1)
        )
