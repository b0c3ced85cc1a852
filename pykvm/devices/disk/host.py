"""The door to the host: a file or block device, one method a system call.

Nothing here is retried, completed or remembered; that is the business of who calls. Tests put
something else in the place of a :class:`HostFile` to have a call fail, fall short or be written
down.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress

from pykvm._abi import ffi, lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, Self

    from typing_extensions import Buffer

_DIRECT_SIZES = (512, 1024, 2048, 4096, 65536)
"""Lengths that O_DIRECT may want multiples of; the least that works is taken."""


_HONOUR_DSYNC = ("ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "tmpfs")
"""File systems whose writes end in generic_write_sync(), which is what RWF_DSYNC asks for. FUSE
leaves it to its server, and QEMU's does nothing; of others it is not known."""


class Limits:
    """The sizes that a host file or device prefers, in bytes.

    Attributes:
        logical: reads and writes are in multiples of it.
        physical: a write of less costs the host a read.
        min_io, opt_io: preferred least and best size, 0: unknown.
        alignment: where the first physical block begins.
    """

    __slots__ = ("alignment", "logical", "min_io", "opt_io", "physical")

    def __init__(
        self, logical: int, physical: int, min_io: int = 0, opt_io: int = 0, alignment: int = 0
    ) -> None:
        self.logical = logical
        self.physical = max(logical, physical)
        self.min_io = min_io
        self.opt_io = opt_io
        self.alignment = alignment


class HostFile:
    """An open regular file or block device.

    Every method may raise OSError, with the file's name.

    Args:
        fd: its descriptor, which is owned from now on.
        path: its name, for messages.

    Attributes:
        is_block: it is a block device.
        honours_dsync: a write with RWF_DSYNC is stable when it returns.
    """

    def __init__(self, fd: int, path: str) -> None:
        self.fd = fd
        self.path = path
        mode = os.fstat(fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            os.close(fd)
            raise OSError(errno.EINVAL, "neither a file nor a block device", path)
        self.is_block = stat.S_ISBLK(mode)
        self.honours_dsync = self.is_block or file_system(fd) in _HONOUR_DSYNC

    @classmethod
    def open(cls, path: str, *, readonly: bool = False, direct: bool = False) -> Self:
        """Open what is there; nothing is created."""
        flags = os.O_RDONLY if readonly else os.O_RDWR
        # A FIFO would block without O_NONBLOCK; files and disks do not look at it.
        flags |= os.O_CLOEXEC | os.O_NONBLOCK | (os.O_DIRECT if direct else 0)
        try:
            fd = os.open(path, flags)
        except OSError as error:
            denied = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
            if denied and not readonly and os.access(path, os.R_OK):
                error.strerror = f"{error.strerror} to write it: open it with ro, or as overlay"
            raise
        return cls(fd, path)

    @classmethod
    def temporary(cls, folder: str, size: int) -> Self:
        """Make a file without a name, which vanishes when it is closed."""
        try:
            fd = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR):
                raise
            import tempfile  # a file system without O_TMPFILE: 9p, some FUSE

            fd, name = tempfile.mkstemp(dir=folder)
            os.unlink(name)
        file = cls(fd, f"temporary file in {folder}")
        try:
            file.truncate(size)
        except BaseException:
            file.close()
            raise
        return file

    # ---- data

    def preadv(self, views: Sequence[Buffer], offset: int) -> int:
        """preadv(2): how many bytes came, 0 at the end of the file."""
        return os.preadv(self.fd, views, offset)

    def pwritev(self, views: Sequence[Buffer], offset: int, sync: bool) -> int:
        """pwritev2(2), with RWF_DSYNC if ``sync``: how many bytes were taken."""
        return os.pwritev(self.fd, views, offset, os.RWF_DSYNC if sync else 0)

    def fdatasync(self) -> None:
        """fdatasync(2)."""
        os.fdatasync(self.fd)

    def punch(self, offset: int, length: int) -> None:
        """Give a range back to the host; it reads as zeros."""
        self._check(lib.pykvm_file_punch(self.fd, offset, length))

    def zero(self, offset: int, length: int) -> None:
        """Make a range zeros that keeps its space."""
        self._check(lib.pykvm_file_zero(self.fd, offset, length))

    def discard(self, offset: int, length: int) -> None:
        """Forget a range of a block device; what is read there afterwards may be anything."""
        self._check(lib.pykvm_block_discard(self.fd, offset, length))

    # ---- the rest

    def size(self) -> int:
        """Bytes, now."""
        return self._block_limits().size if self.is_block else os.fstat(self.fd).st_size

    def truncate(self, size: int) -> None:
        """ftruncate(2)."""
        os.ftruncate(self.fd, size)

    def limits(self, direct: bool) -> Limits:
        """What it prefers."""
        if self.is_block:
            found = self._block_limits()
            return Limits(
                found.logical, found.physical, found.min_io, found.opt_io, found.alignment
            )
        block = os.fstat(self.fd).st_blksize
        if not 512 <= block <= 1 << 20 or block & (block - 1):
            block = 4096
        return Limits(self._direct_size() if direct else 512, min(block, 4096), min(block, 4096))

    def _direct_size(self) -> int:
        """The least length that O_DIRECT takes: tried, as an old kernel cannot be asked."""
        import mmap

        with mmap.mmap(-1, _DIRECT_SIZES[-1]) as buffer, memoryview(buffer) as view:
            for size in _DIRECT_SIZES:
                try:
                    with view[:size] as piece:
                        os.preadv(self.fd, [piece], 0)
                    return size
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        raise
        raise OSError(errno.EINVAL, "no size of blocks that O_DIRECT takes", self.path)

    def _block_limits(self) -> Any:
        limits = ffi.new("struct pykvm_block_limits *")
        self._check(lib.pykvm_block_limits(self.fd, limits))
        return limits

    def _check(self, result: int) -> None:
        if result < 0:
            raise OSError(-result, os.strerror(-result), self.path)

    def fileno(self) -> int:
        """The descriptor."""
        return self.fd

    def close(self) -> None:
        """Close it. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.path}>"


def file_system(fd: int) -> str:
    """The type of the file system that holds an open file, or "" if that is not to be seen."""
    device = os.fstat(fd).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    with suppress(OSError), open("/proc/self/mountinfo", errors="replace") as file:
        for line in file:  # "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw"
            if line.split(" ", 3)[2] == number:
                return line.partition(" - ")[2].partition(" ")[0]
    return ""
