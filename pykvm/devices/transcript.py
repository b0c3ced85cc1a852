"""What a guest printed, kept and waited for: the host's side of any console."""

from __future__ import annotations

import threading
import time

from pykvm.errors import PykvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import re

TRANSCRIPT_BYTES = 1 << 20
"""How much of the guest's output is kept, by default."""

LINE_BYTES = 4096
LINE_SHOWN = 400
"""Of a line that is shown to somebody, at most."""


def readable(line: bytes) -> str:
    """A line of the guest's for our own messages: decoded, cut, and nothing that moves a cursor.

    A guest may print anything, and a terminal does what escape sequences tell it.
    """
    text = line[:LINE_BYTES].decode("utf-8", "replace").rstrip().expandtabs()
    shown = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text[:LINE_SHOWN])
    return shown + "…" * (len(text) > LINE_SHOWN)


class ExpectError(PykvmError):
    """The console did not show what was waited for.

    Attributes:
        tail: the last bytes that it did show.
    """

    def __init__(self, message: str, tail: bytes) -> None:
        super().__init__(message)
        self.tail = tail


class Transcript:
    """The last bytes of an output; any thread may feed it, any may wait.

    Args:
        keep: how many bytes.
    """

    def __init__(self, keep: int = TRANSCRIPT_BYTES) -> None:
        self._keep = keep
        self._kept = bytearray()
        self._total = 0  # bytes ever fed; what is kept ends there
        self._seen = 0  # up to where expect() has matched
        self._read = 0  # up to where read() has taken
        self._change = threading.Condition()
        self._ended = False

    def feed(self, data: bytes) -> None:
        """Take the next bytes."""
        with self._change:
            self._kept += data
            self._total += len(data)
            del self._kept[: max(len(self._kept) - self._keep, 0)]
            self._change.notify_all()

    def end(self, ended: bool = True) -> None:
        """Nothing more comes, until this is taken back: nobody waits any longer."""
        with self._change:
            self._ended = ended
            self._change.notify_all()

    @property
    def kept(self) -> bytes:
        """The last bytes."""
        with self._change:
            return bytes(self._kept)

    def read(self) -> bytes:
        """What came since this was called last, as far as it is kept."""
        with self._change:
            fresh = self._from(self._read)
            self._read = self._total
            return fresh

    def _from(self, number: int) -> bytes:
        return bytes(self._kept[max(len(self._kept) - (self._total - number), 0) :])

    def lines(self, count: int = 10) -> list[str]:
        """The last lines, for reading: see :func:`readable`."""
        end = self.kept[-count * LINE_BYTES :]
        return [readable(line) for line in end.splitlines()[-count:]]

    def expect(self, pattern: bytes | re.Pattern[bytes], timeout: float | None = None) -> bytes:
        """Wait until ``pattern`` comes, looking from where the last match ended.

        Args:
            pattern: plain bytes, or a compiled ``re`` pattern over bytes.
            timeout: seconds; None to wait as long as the guest runs.

        Returns:
            Everything from the last match up to and including this one.

        Raises:
            ExpectError: the time is over, or the run ended first; with what was there instead.
        """
        find = None if isinstance(pattern, bytes) else pattern.search
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._change:
            while True:
                fresh = self._from(self._seen)
                if find is not None:
                    match = find(fresh)
                    end = match.end() if match else -1
                else:
                    assert isinstance(pattern, bytes)
                    at = fresh.find(pattern)
                    end = at + len(pattern) if at >= 0 else -1
                if end >= 0:
                    self._seen = self._total - (len(fresh) - end)
                    return fresh[:end]
                left = None if deadline is None else deadline - time.monotonic()
                if self._ended or (left is not None and left <= 0):
                    why = "the run ended" if self._ended else f"{timeout} s passed"
                    tail = fresh[-400:]
                    raise ExpectError(f"{why} before {pattern!r} came; last: {tail!r}", tail)
                self._change.wait(left)
