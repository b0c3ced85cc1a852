"""A disk's content that can be told apart, and plain reads and writes of it."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pykvm.devices.disk.base import Disk
from tests.support.waiting import read as read_pipe

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


@contextmanager
def another_process(statements: str, image: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has executed these statements, with ``image`` as ``sys.argv[1]``; killed."""
    script = f"import sys; {statements}; print('up', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", script, str(image)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    ) as child:
        try:
            assert child.stdout is not None
            assert read_pipe(child.stdout, 3) == b"up\n"
            yield child
        finally:
            child.kill()
