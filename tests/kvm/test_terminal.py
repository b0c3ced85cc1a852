"""``pykvm boot`` on a terminal: raw while the guest runs, and put back whatever ends it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pykvm import result as reasons
from pykvm.cli import exitcodes
from tests.support import tiny_kernel

PATIENCE = 60.0
"""Seconds to wait for what should come at once."""

IFLAG, OFLAG, LFLAG = 0, 1, 3


class Session:
    """A process with a terminal of its own, and the hand that types and eyes that read there."""

    def __init__(self, kernel: Path, *, stdout: Any = None) -> None:
        self._master, self._slave = pty.openpty()
        self.settings = termios.tcgetattr(self._slave)
        self.shown = b""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pykvm", "boot", str(kernel), "--no-cache", "--memory", "16M"],
            stdin=self._slave,
            stdout=self._slave if stdout is None else stdout,
            stderr=self._slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )

    def now(self) -> list[Any]:
        """The terminal's settings as they are."""
        return termios.tcgetattr(self._slave)

    def type(self, keys: bytes) -> None:
        os.write(self._master, keys)

    def read(self, until: bytes) -> bytes:
        """What the terminal shows from here on, up to ``until`` and maybe a little more."""
        begin = len(self.shown)
        deadline = time.monotonic() + PATIENCE
        while until not in self.shown[begin:]:
            left = deadline - time.monotonic()
            assert select.select([self._master], [], [], max(left, 0))[0], self.shown
            self.shown += os.read(self._master, 4096)
        return self.shown[begin:]

    def wait(self) -> int:
        """Read to its end; the exit code."""
        deadline = time.monotonic() + PATIENCE
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.shown
            if select.select([self._master], [], [], 0.02)[0]:
                self.shown += os.read(self._master, 4096)
        while select.select([self._master], [], [], 0)[0]:
            self.shown += os.read(self._master, 4096)
        return self.process.returncode

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._slave)
        os.close(self._master)


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Callable[..., Session]]:
    """``session()``: a boot of a kernel that echoes what it is typed, up to its "ready"."""
    opened: list[Session] = []

    def begin(text: str = tiny_kernel.ECHO, **options: Any) -> Session:
        kernel = tmp_path / "kernel"
        kernel.write_bytes(tiny_kernel.elf(text))
        made = Session(kernel, **options)
        opened.append(made)
        return made

    yield begin
    for each in opened:
        each.close()


def test_it_is_raw_while_the_guest_runs_and_lines_are_whole(
    session: Callable[..., Session],
) -> None:
    s = session()
    assert s.read(b"\n") == b"ready\r\n"  # the guest's line feed goes to the line's start
    now = s.now()
    assert not now[LFLAG] & (termios.ICANON | termios.ECHO | termios.ISIG)
    assert not now[IFLAG] & (termios.ICRNL | termios.IXON)
    assert now[OFLAG] & termios.OPOST and now[OFLAG] & termios.ONLCR
    s.type(b"a\rb\x03\x1a\x13c")  # Return, Ctrl-C, Ctrl-Z and Ctrl-S are the guest's
    assert s.read(b"c") == b"a\rb\x03\x1a\x13c"  # by its echo: once, and as it was typed
    s.type(b".")
    assert s.wait() == exitcodes.OK
    assert s.now() == s.settings
    assert b"\r\npykvm: kernel: power-off after " in s.shown  # on a line of its own
    assert s.shown.count(b"\n") == s.shown.count(b"\r\n")


def test_ctrl_a_is_ours(session: Callable[..., Session]) -> None:
    s = session()
    s.read(b"ready\r\n")
    s.type(b"\x01\x01")
    assert s.read(b"\x01") == b"\x01"  # twice: one for the guest
    s.type(b"\x01?z")
    assert s.read(b"z") == b"z"  # an unknown command is none, and no input
    s.type(b"\x01x")
    assert s.wait() == exitcodes.INTERRUPTED
    assert s.now() == s.settings
    assert b"pykvm: kernel: interrupted after " in s.shown


@pytest.mark.parametrize(
    ("number", "reason", "code"),
    [
        (signal.SIGINT, reasons.INTERRUPTED, 130),
        (signal.SIGTERM, reasons.TERMINATED, 143),
        (signal.SIGHUP, reasons.TERMINATED, 129),
    ],
)
def test_a_signal_ends_it_says_where_the_guest_was_and_leaves_the_terminal_as_it_was(
    session: Callable[..., Session], number: int, reason: str, code: int
) -> None:
    s = session()
    s.read(b"ready\r\n")
    s.process.send_signal(number)
    began = time.monotonic()
    assert s.wait() == code
    print(f"{reason}: ended after {time.monotonic() - began:.3f} s")
    assert s.now() == s.settings
    told = s.shown.decode()
    assert f"\r\npykvm: kernel: {reason} after " in told
    assert re.search(r"cpu 0 running at rip 0x200[0-9a-f]{3} IF=0", told)
    assert "  | ready" in told
    assert "Traceback" not in told


def test_an_exception_leaves_the_terminal_as_it_was(session: Callable[..., Session]) -> None:
    with open("/dev/full", "wb") as full:
        s = session(stdout=full)
        assert s.wait() == exitcodes.ERROR
    assert b"pykvm: No space left on device\r\n" in s.shown
    assert s.now() == s.settings


def test_a_guest_that_ends_badly_leaves_the_terminal_as_it_was(
    session: Callable[..., Session],
) -> None:
    s = session(tiny_kernel.PRINT.format("no end of line") + tiny_kernel.ENDS["shutdown"])
    assert s.wait() == exitcodes.SHUTDOWN
    assert b"no end of line\r\npykvm: kernel: shutdown after " in s.shown
    assert s.now() == s.settings
