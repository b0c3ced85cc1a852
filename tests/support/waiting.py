"""Waiting that ends: what does not come is said by name, long before the watchdog ends it all."""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable
from typing import IO

PATIENCE = 60.0
"""Seconds; a busy machine may take its time."""


def join(thread: threading.Thread, seconds: float = PATIENCE) -> None:
    """Wait for the end of a thread."""
    thread.join(seconds)
    assert not thread.is_alive(), f"the thread {thread.name!r} still runs after {seconds:g} s"


def until(what: str, condition: Callable[[], object], seconds: float = PATIENCE) -> None:
    """Wait, without a pause, until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {seconds:g} s"


def read(pipe: IO[bytes], size: int, seconds: float = PATIENCE) -> bytes:
    """So many bytes of a pipe that nobody reads otherwise; fewer where it ends."""
    end, found = time.monotonic() + seconds, b""
    while len(found) < size:
        left = max(0.0, end - time.monotonic())
        ready, _, _ = select.select([pipe], [], [], left)
        assert ready, f"{len(found)} of {size} bytes came within {seconds:g} s: {found[-80:]!r}"
        data = os.read(pipe.fileno(), size - len(found))
        if not data:
            break
        found += data
    return found


def is_alive(pid: int) -> bool:
    """Whether there is such a process, and it has not ended."""
    try:
        with open(f"/proc/{pid}/status") as status:
            return "State:\tZ" not in status.read()
    except OSError:
        return False
