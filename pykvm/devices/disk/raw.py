"""A disk that is a raw file or a block device: its bytes are the disk's, one to one."""

from __future__ import annotations

import errno
import os
from contextlib import suppress

from pykvm.devices.disk.base import SECTOR, ZEROS, Disk, clear, part, rest
from pykvm.devices.disk.host import HostFile

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

IOV_MAX = 1024
"""How many pieces one preadv or pwritev takes (Linux, UIO_MAXIOV)."""

_ZEROS_AT_ONCE = 64
"""Pieces of zeros of one pwritev, where zeros have to be written."""

_NOT_POSSIBLE = (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY, errno.ENODEV)


class RawDisk(Disk):
    """A raw image.

    Reads and writes go straight between the host file and the views. A file whose size is no
    multiple of a sector ends in a sector filled up with zeros; writing that one lengthens the file.

    Args:
        file: the open image, which is owned from now on.
        readonly: refuse to be written.
        direct: ``file`` was opened with O_DIRECT.
        write_back: see :class:`Disk`.
    """

    def __init__(
        self,
        file: HostFile,
        *,
        readonly: bool = False,
        direct: bool = False,
        write_back: bool = True,
    ) -> None:
        self.file = file
        self.path = file.path
        self.readonly = readonly
        self._direct = direct
        self._write_back = write_back
        self._volatile = False
        self.failed = None
        self.can_discard = not readonly
        self._can_zero = self._can_punch = True
        self._bytes = self.sectors = 0
        self.limits = file.limits(direct)
        self.refresh()

    # ---- reading and writing

    def read(self, views: Sequence[memoryview], offset: int) -> None:
        """Fill all ``views``; what lies beyond the file's end in its last sector is zeros."""
        left: Sequence[memoryview] = views
        while left:
            if offset >= self._bytes:
                clear(left)
                return
            done = self._transfer(left, offset, False)
            if not done:
                raise OSError(errno.EIO, "the file has been cut shorter", self.path)
            offset += done
            left = rest(left, done)

    def write(self, views: Sequence[memoryview], offset: int) -> None:
        """Write all ``views``."""
        sync = not self._write_back and self.file.honours_dsync
        if not sync:
            self._volatile = True
        left: Sequence[memoryview] = views
        while left:
            done = self._transfer(left, offset, True, sync)
            if not done:
                raise OSError(errno.EIO, "the host took nothing", self.path)
            offset += done
            left = rest(left, done)
        if not self._write_back and not sync:
            self.flush()

    def _transfer(
        self, views: Sequence[memoryview], offset: int, write: bool, sync: bool = False
    ) -> int:
        """One system call for as much as it takes: how many bytes it did."""
        if len(views) > IOV_MAX:
            views = views[:IOV_MAX]
        try:
            if write:
                return self.file.pwritev(views, offset, sync)
            return self.file.preadv(views, offset)
        except OSError as error:
            # O_DIRECT wants the memory aligned, and a guest need not know.
            if not self._direct or error.errno != errno.EINVAL:
                raise
        return self._bounce(views, offset, write, sync)

    def _bounce(self, views: Sequence[memoryview], offset: int, write: bool, sync: bool) -> int:
        """The same by way of a buffer whose address suits O_DIRECT."""
        import mmap

        views = part(views, 0, 1 << 20)
        length = sum(view.nbytes for view in views)
        with mmap.mmap(-1, length) as buffer, memoryview(buffer) as whole, whole[:length] as data:
            at = 0
            if write:
                for view in views:
                    data[at : at + view.nbytes] = view
                    at += view.nbytes
                return self.file.pwritev([data], offset, sync)
            done = self.file.preadv([data], offset)
            for view in part(views, 0, done):
                view[:] = data[at : at + view.nbytes]
                at += view.nbytes
            return done

    # ---- stability

    @property
    def write_back(self) -> bool:
        """Whether a write may be volatile until the next flush."""
        return self._write_back

    @write_back.setter
    def write_back(self, value: bool) -> None:
        if self._volatile and not value:
            # The error of an earlier write would else be told to a later one, and the flush after
            # that would find nothing wrong: Linux reports it once to each open file.
            with suppress(OSError):  # it is remembered: no flush succeeds any more
                self.flush()
        self._write_back = value

    def flush(self) -> None:
        """Make stable what was written; if nothing was, nothing is done.

        A failed fdatasync is never tried again: Linux may have dropped the pages that it could not
        write and marked them clean, and the next one would succeed without them.
        """
        if self.failed is not None:
            raise OSError(errno.EIO, f"an earlier flush failed ({self.failed.strerror})", self.path)
        if not self._volatile:
            return
        self._volatile = False
        try:
            self.file.fdatasync()
        except OSError as error:
            self.failed = error
            raise

    # ---- ranges

    def discard(self, offset: int, length: int) -> None:
        """Give a range back to the host, where it can take it."""
        if not self.can_discard:
            return
        try:
            if self.file.is_block:
                self.file.discard(offset, length)
            else:
                self.file.punch(offset, length)
        except OSError as error:
            if error.errno not in _NOT_POSSIBLE:
                raise
            self.can_discard = False  # a hint that was of no use, and never will be
        # Needs no flush: nobody may assume anything of the range (virtio 1.2, 5.2.6.1).

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        """Make a range zeros: by the file system if it can, else by writing them."""
        # Neither lengthens a file; its last sector may have to be.
        inside = min(offset + length, self._bytes) - offset if not self.file.is_block else length
        done = inside > 0 and (
            (unmap and self._range("_can_punch", self.file.punch, offset, inside))
            or self._range("_can_zero", self.file.zero, offset, inside)
        )
        if done:
            self._volatile = True
            if not self._write_back:
                self.flush()  # RWF_DSYNC has no part in it
            return
        end = offset + length
        while offset < end:
            views = part([ZEROS] * _ZEROS_AT_ONCE, 0, end - offset)
            self.write(views, offset)
            offset += sum(view.nbytes for view in views)

    def _range(self, can: str, do: object, offset: int, length: int) -> bool:
        """Have the file system do it: whether it can."""
        if not getattr(self, can):
            return False
        try:
            do(offset, length)  # type: ignore[operator]
        except OSError as error:
            if error.errno not in _NOT_POSSIBLE:
                raise
            setattr(self, can, False)
            return False
        return True

    # ---- the rest

    def refresh(self) -> bool:
        """Take over the size that the file has now."""
        self._bytes = self.file.size()
        before, self.sectors = self.sectors, -(-self._bytes // SECTOR)
        return self.sectors != before

    def lend(self) -> tuple[int, int, bool, bool, bool] | None:
        """Lend the file, if nothing stands between it and us, up to its last whole block."""
        file = self.file
        if type(file) is not HostFile or file.fd < 0:
            return None
        can_write = not self.readonly and self._write_back
        reach = min(self._bytes, self.sectors * SECTOR)
        return (
            file.fd,
            reach - reach % self.limits.logical,
            can_write,
            self.failed is None,
            self._volatile,
        )

    def take_back(self, volatile: bool, flush_error: int) -> None:
        """See :class:`Disk`."""
        self._volatile = volatile
        if flush_error and self.failed is None:
            self.failed = OSError(flush_error, os.strerror(flush_error), self.path)

    def close(self) -> None:
        """Close the file, and with it the lock."""
        self.file.close()


def open_raw(path: str | os.PathLike[str], *, readonly: bool = False, cache: str = "") -> RawDisk:
    """Open a raw file or block device and lock it.

    Args:
        path: the image, which has to exist.
        readonly: the disk cannot be written, and others may read it too.
        cache: ``"writeback"`` (the default): a write is in the host's page cache when it is
            completed, and stable after a flush. ``"writethrough"``: it is stable when it is
            completed. ``"none"``: as write-back, past the page cache (O_DIRECT).

    Raises:
        OSError: it cannot be opened.
        DiskError: it is in use.
    """
    from pykvm.devices.disk.locks import lock

    direct = cache == "none"
    file = HostFile.open(os.fspath(path), readonly=readonly, direct=direct)
    try:
        lock(file.fd, file.path, readonly=readonly)
        return RawDisk(file, readonly=readonly, direct=direct, write_back=cache != "writethrough")
    except BaseException:
        file.close()
        raise
