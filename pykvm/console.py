"""The serial console of a booted machine, from the host's side: read, type, expect, keep.

The guest's bytes arrive in a ring in C; a pump takes them out when its eventfd says so, keeps the
last of them as the transcript, and hands them on.
"""

from __future__ import annotations

import os
import select
import threading
import time

from pykvm.devices.transcript import LINE_SHOWN, TRANSCRIPT_BYTES, ExpectError, Transcript, readable

__all__ = ["LINE_SHOWN", "TRANSCRIPT_BYTES", "Console", "ExpectError", "readable"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    import re
    from collections.abc import Callable
    from typing import Protocol

    class Serial(Protocol):
        """What a console needs of the UART below."""

        @property
        def room(self) -> int:
            """Bytes that write() would take now."""

        def read(self) -> bytes:
            """Take what the guest printed."""

        def write(self, data: bytes) -> None:
            """Queue input, at most ``room`` bytes."""

        def send_break(self) -> None:
            """A BREAK on the line."""

        def fileno(self) -> int:
            """Readable when there is output."""

        def input_fileno(self) -> int:
            """Readable when all input was read."""


class Console:
    """What a guest prints, and what it is typed.

    Args:
        serial: the UART.
        output: called with bytes as they come, in the pump's thread; None to only keep them.
        watch: called with bytes as they come as well, before ``output``.
        keep: bytes of the transcript.

    Attributes:
        first_byte: time.monotonic() of the first byte, or 0.0.
    """

    def __init__(
        self,
        serial: Serial,
        *,
        output: Callable[[bytes], object] | None = None,
        watch: Callable[[bytes], object] | None = None,
        keep: int = TRANSCRIPT_BYTES,
    ) -> None:
        self.first_byte = 0.0
        self._serial = serial
        self._output = output
        self._watch = watch
        self._transcript = Transcript(keep)
        self._typed = bytearray()
        self._lock = threading.Lock()
        self._ended = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread: threading.Thread | None = None

    @property
    def transcript(self) -> bytes:
        """The last ``keep`` bytes that the guest printed."""
        return self._transcript.kept

    def lines(self, count: int = 10) -> list[str]:
        """The last lines of the transcript, for reading: none too long, no control characters."""
        return self._transcript.lines(count)

    def write(self, data: bytes) -> None:
        """Type: bytes the guest will read, as soon as its UART has room; any amount."""
        with self._lock:
            self._typed += data
        os.eventfd_write(self._wake, 1)

    def send_break(self) -> None:
        """A BREAK on the line: Linux takes the next key as a magic SysRq."""
        self._serial.send_break()

    def expect(self, pattern: bytes | re.Pattern[bytes], timeout: float | None = None) -> bytes:
        """Wait until the guest prints ``pattern``: see :meth:`Transcript.expect`.

        Raises:
            ExpectError: the time is over, or the run ended first; with what was there instead.
        """
        return self._transcript.expect(pattern, timeout)

    # ---- the pump ------------------------------------------------------------------------------

    def start(self) -> None:
        """Pump from now on, in a thread."""
        if self._thread is None:
            self._ended = False
            self._transcript.end(False)
            self._thread = threading.Thread(target=self._pump, name="console", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Pump what is left, then no more. What waits to be typed stays for the next start."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._ended = True
            os.eventfd_write(self._wake, 1)
            thread.join()
        self._take()
        self._ended = True
        self._transcript.end()

    def close(self) -> None:
        """Stop, and give the eventfd back. Idempotent."""
        self.stop()
        if self._wake >= 0:
            os.close(self._wake)
            self._wake = -1

    def _pump(self) -> None:
        poll = select.poll()
        poll.register(self._serial.fileno(), select.POLLIN)
        poll.register(self._serial.input_fileno(), select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while not self._ended:
            for fd, _ in poll.poll():
                if fd != self._serial.fileno():
                    os.eventfd_read(fd)
            self._take()
            self._type()

    def _take(self) -> None:
        data = self._serial.read()
        if not data:
            return
        if not self.first_byte:
            self.first_byte = time.monotonic()
        self._transcript.feed(data)
        if self._watch is not None:
            self._watch(data)
        if self._output is not None:
            self._output(data)

    def _type(self) -> None:
        with self._lock:
            piece = bytes(self._typed[: self._serial.room])
            del self._typed[: len(piece)]
        if piece:
            self._serial.write(piece)
