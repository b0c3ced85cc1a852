"""A disk's content that can be told apart, and plain reads and writes of it."""

from __future__ import annotations

import random

from pykvm.devices.disk.base import Disk

SIZE = 256 * 1024


def content(size: int = SIZE, seed: int = 1) -> bytes:
    """Random bytes, the same for the same seed."""
    return random.Random(seed).randbytes(size)


def read(disk: Disk, offset: int, *sizes: int) -> bytes:
    """Read pieces of these sizes in one go."""
    pieces = [bytearray(b"\xaa" * size) for size in sizes]
    disk.read([memoryview(piece) for piece in pieces], offset)
    return b"".join(pieces)


def write(disk: Disk, offset: int, *pieces: bytes) -> None:
    """Write pieces in one go."""
    disk.write([memoryview(piece) for piece in pieces], offset)
