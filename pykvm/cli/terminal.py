"""The user's terminal as the guest's: raw while a machine runs, and always put back.

Keys go to the guest as they are, Ctrl-C too. Ctrl-A is ours: Ctrl-A x quits, Ctrl-A b sends a
BREAK, Ctrl-A Ctrl-A types one Ctrl-A.
"""

from __future__ import annotations

import os
import select
import threading

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

ESCAPE = 0x01


class EscapeFilter:
    """Splits what is typed into what the guest gets and commands of ours.

    Args:
        commands: key → function, for the key after Ctrl-A.
    """

    def __init__(self, commands: Mapping[bytes, Callable[[], object]]) -> None:
        self._commands = commands
        self._escaped = False

    def __call__(self, typed: bytes) -> bytes:
        """What the guest is to get of these bytes; commands are run as they come."""
        passed = bytearray()
        for byte in typed:
            key = bytes([byte])
            if self._escaped:
                self._escaped = False
                if byte == ESCAPE:
                    passed.append(byte)
                elif key.lower() in self._commands:
                    self._commands[key.lower()]()
            elif byte == ESCAPE and self._commands:
                self._escaped = True
            else:
                passed.append(byte)
        return bytes(passed)


class Terminal:
    """Standard input, for the length of a ``with``: to the guest, raw if it is a terminal.

    Args:
        type_in: takes what the guest is to get.
        commands: for :class:`EscapeFilter`; only where standard input is a terminal.
        fd: standard input.
    """

    def __init__(
        self,
        type_in: Callable[[bytes], object],
        commands: Mapping[bytes, Callable[[], object]],
        fd: int = 0,
    ) -> None:
        self._fd = fd
        self.is_terminal = os.isatty(fd)
        self._background = self.is_terminal and not _in_foreground(fd)
        self._type_in = type_in
        self._filter = EscapeFilter(commands if self.is_terminal else {})
        self._before: list[Any] | None = None
        self._wake = -1
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Terminal:
        if self._background:  # not ours to change or to read: either would stop us
            return self
        if self.is_terminal:
            import termios
            import tty

            self._before = termios.tcgetattr(self._fd)
            tty.setraw(self._fd, termios.TCSANOW)
            raw = termios.tcgetattr(self._fd)
            raw[1] |= termios.OPOST  # our own lines still end properly
            termios.tcsetattr(self._fd, termios.TCSANOW, raw)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._read, name="stdin", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            if self._thread is not None:
                os.eventfd_write(self._wake, 1)
                self._thread.join()
                os.close(self._wake)
        finally:
            if self._before is not None:
                import termios

                termios.tcsetattr(self._fd, termios.TCSANOW, self._before)  # never waits

    def _read(self) -> None:
        while True:
            try:
                ready, _, _ = select.select([self._fd, self._wake], [], [])
                if self._wake in ready:
                    return
                typed = os.read(self._fd, 4096)
            except (OSError, ValueError):
                return  # closed, or a terminal that is gone
            if not typed:
                return
            passed = self._filter(typed)
            if passed:
                self._type_in(passed)


def _in_foreground(fd: int) -> bool:
    """Whether this terminal lets us read and change it (``pykvm boot … &`` may not)."""
    try:
        return os.tcgetpgrp(fd) == os.getpgrp()
    except OSError:  # a terminal, but not the one that controls us: nobody minds
        return True
