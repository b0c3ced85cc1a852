"""Descriptor chains without a ring, for tests of what a device does with them."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

Pieces = Sequence[bytes | bytearray | memoryview]


class FakeChain:
    """What ``Queue.pop()`` gives: views of memory that the "guest" keeps."""

    def __init__(self, readable: Pieces = (), writable: Pieces = ()) -> None:
        self.readable = [memoryview(piece).toreadonly() for piece in readable if len(piece)]
        self.writable = [memoryview(piece) for piece in writable if len(piece)]
        self.read_bytes = sum(view.nbytes for view in self.readable)
        self.write_bytes = sum(view.nbytes for view in self.writable)
        self.head = self.began = self.generation = 0


class BlkDriver:
    """Sends requests to a ``Blk`` without a queue, one at a time.

    Attributes:
        written: what the device said it has written, for the last request.
    """

    def __init__(self, device: Any, features: int | None = None) -> None:
        self.device = device
        device.driver_features = device.device_features if features is None else features
        device.activate()
        self.written = 0

    @property
    def errors(self) -> int:
        """Requests that were answered with an error."""
        return int(self.device.counters.errors)

    def send(self, readable: Pieces, writable: Pieces) -> None:
        self.written = self.device._one(None, FakeChain(readable, writable))

    def request(self, type: int, sector: int = 0, out: Pieces = (), into: Pieces = ()) -> int:
        """One request as Linux frames it: its status."""
        status = bytearray(b"\xee")
        self.send([struct.pack("<IIQ", type, 0, sector), *out], [*into, status])
        return status[0]

    def read(self, sector: int, length: int) -> tuple[int, bytes]:
        data = bytearray(length)
        return self.request(0, sector, into=[data]), bytes(data)

    def write(self, sector: int, data: bytes) -> int:
        return self.request(1, sector, out=[data])

    def flush(self) -> int:
        return self.request(4)

    def ranges(self, type: int, *segments: tuple[int, int, int]) -> int:
        """A discard (11) or write-zeroes (13) request of (sector, count, flags)."""
        return self.request(type, out=[b"".join(struct.pack("<QII", *s) for s in segments)])
