"""Files that are there whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import errno
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType


class Replacing:
    """For the length of a ``with``: a new file, which takes the place of ``path`` at its end.

    It is its owner's alone (mode 0600): such files have what a guest has in memory, its keys too.
    Where the ``with`` ends by an exception it is removed, and what was at ``path`` stays.

    Args:
        path: of the file; of a symbolic link, what it leads to.

    Raises:
        OSError: it cannot be written there, or something is there that is no file.
    """

    def __init__(self, path: str) -> None:
        self._given = path
        self._path = os.path.realpath(path)
        if os.path.exists(self._path) and not os.path.isfile(self._path):
            raise OSError(errno.EINVAL, "is there, and is no regular file", path)
        self._scratch = f"{self._path}.{os.urandom(6).hex()}.tmp"

    def __enter__(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            self._fd = os.open(self._scratch, flags, 0o600)
        except OSError as error:  # of the scratch file nobody knows
            raise OSError(error.errno, error.strerror, self._given) from None
        return self._fd

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if exc is None:
                os.fsync(self._fd)
                os.replace(self._scratch, self._path)
                self._scratch = ""
        finally:
            os.close(self._fd)
            if self._scratch:
                os.unlink(self._scratch)


def write_all(fd: int, data: bytes, offset: int) -> None:
    """Write all of it."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written
