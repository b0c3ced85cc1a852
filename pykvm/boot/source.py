"""A kernel or initrd as it comes: a path, or bytes."""

from __future__ import annotations

import mmap
import os
import stat

from pykvm.errors import BootError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.boot.ram import Buffer

    Given = str | os.PathLike[str] | Buffer

MOST = 4 << 30
"""Bytes a file may have: no kernel or initrd can use more below 4 GiB."""
_PIECE = 1 << 20


class Source:
    """The bytes of a file, and what names it.

    A regular file is mapped, so that only what is looked at is read; whoever truncates it meanwhile
    kills the process, as with any loader that maps (replace files by renaming). Anything else (a
    pipe, a block device) is read to its end.

    Attributes:
        data: the contents.
        path: as given, or "".
        status: of a regular file, or None.
    """

    def __init__(self, given: Given, what: str) -> None:
        self.path = ""
        self.status: os.stat_result | None = None
        if not isinstance(given, str | os.PathLike):
            self.data = memoryview(given).cast("B")
            return
        self.path = os.fspath(given)
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise BootError(f"{what}: cannot be read: {error}") from error
        try:
            self.data = self._contents(fd, what)
        except OSError as error:
            raise BootError(f"{what}: {self.path!r}: cannot be read: {error.strerror}") from error
        finally:
            os.close(fd)

    def _contents(self, fd: int, what: str) -> memoryview:
        status = os.fstat(fd)
        if stat.S_ISREG(status.st_mode) and status.st_size:
            self.status = status
            if status.st_size > MOST:
                raise _too_large(what, f"{status.st_size} bytes")
            return memoryview(mmap.mmap(fd, 0, mmap.MAP_PRIVATE, mmap.PROT_READ))
        data = bytearray()
        while piece := os.read(fd, _PIECE):
            data += piece
            if len(data) > MOST:
                raise _too_large(what, "more")
        return memoryview(data)


def _too_large(what: str, found: str) -> BootError:
    return BootError(f"{what}: expected a file of at most {MOST} bytes, found {found}")
