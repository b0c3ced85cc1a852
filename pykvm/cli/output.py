"""What a guest prints, passed on to standard output, whatever becomes of who reads it."""

from __future__ import annotations

import errno
import os
import select
import sys

from .failures import tell

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


def standard_output() -> int:
    """The descriptor of standard output.

    Raises:
        OSError: EBADF; it was closed when we started.
    """
    if sys.stdout is None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF), "standard output")
    return sys.stdout.fileno()


class ConsoleOutput:
    """Standard output as it comes, or kept for JSON. What fails is told at the end.

    Args:
        fd: where it goes, or None to keep it. A context manager closes what is needed to wait for
            it, not this.

    Attributes:
        error: why nothing more can be written, or None.
        on_error: called when that happens.
    """

    PIECE = 4096
    """PIPE_BUF: a pipe that select() finds writable takes so much without blocking (pipe(7))."""
    PATIENCE = 0.2
    """Seconds that a reader still has after give_up()."""

    def __init__(self, fd: int | None) -> None:
        self._fd = fd
        self._last = b""
        self._given_up = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        self._kept: list[bytes] = []
        self.error: OSError | None = None
        self.on_error: Callable[[], object] = lambda: None

    def __enter__(self) -> ConsoleOutput:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._wake)

    def __call__(self, data: bytes) -> None:
        """Write all of it, also where somebody made the descriptor non-blocking, or keep it."""
        self._last = data[-1:]
        if self._fd is None:
            self._kept.append(data)
            return
        while data and self.error is None:
            try:
                if not self._ready(self._fd):
                    return
                data = data[os.write(self._fd, data[: self.PIECE]) :]
            except BlockingIOError:
                pass  # somebody else made it so, and wrote in between
            except OSError as error:
                self.error = error
                self.on_error()

    def _ready(self, fd: int) -> bool:
        """Wait until it can be written to; False if nobody waits for that any longer."""
        poll = select.poll()
        poll.register(fd, select.POLLOUT)
        if not self._given_up:
            poll.register(self._wake, select.POLLIN)
            if any(ready == fd for ready, _ in poll.poll()):
                return True
            poll.unregister(self._wake)
        return bool(poll.poll(self.PATIENCE * 1000))

    def give_up(self) -> None:
        """Wait no longer for a reader that does not read. Safe in a signal's handler."""
        self._given_up = True
        os.eventfd_write(self._wake, 1)

    @property
    def captures(self) -> bool:
        """Whether it is kept, and nobody reads along."""
        return self._fd is None

    @property
    def text(self) -> str:
        """What was kept: UTF-8, with surrogate escapes for what is none."""
        return b"".join(self._kept).decode("utf-8", "surrogateescape")

    def close_line(self) -> None:
        """On a terminal, keep our closing line apart from a last line that has no end."""
        if self._last in (b"", b"\n") or sys.stderr is None:
            return
        if sys.stdout.isatty() and sys.stderr.isatty():
            tell("")
