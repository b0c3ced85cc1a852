"""A lock against a second writer: an open-file-description lock, as QEMU understands it as well.

fcntl(2), "Open file description locks". It belongs to the open file, so a second disk in the same
process meets it too, and it is gone when the process is.

A writer locks the whole file for itself. A reader does as QEMU's readers do: it holds the byte that
says "nobody else may write", and looks whether anybody holds the byte that says "I write"
(qemu's block/file-posix.c, RAW_LOCK_PERM_BASE and RAW_LOCK_SHARED_BASE). So readers share, and
neither of the two programs opens what the other one writes.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from pykvm.errors import DiskError

_FLOCK = struct.Struct("hhqqi4x")  # struct flock on x86-64: type, whence, start, length, pid

_WRITES = 100 + 1  # QEMU's byte for "I have the permission to write"
_KEEPS_WRITERS_OUT = 200 + 1  # and its byte for "I do not share that permission"


def lock(fd: int, path: str, *, readonly: bool) -> None:
    """Take the lock that a reader or a writer needs, and keep it until ``fd`` is closed.

    Raises:
        DiskError: somebody else has the file; who, as far as /proc tells.
    """
    try:
        if readonly:
            _set(fd, fcntl.F_RDLCK, _KEEPS_WRITERS_OUT, 1)
            if _is_locked(fd, _WRITES):
                raise BlockingIOError(errno.EAGAIN, "written by somebody")
        else:
            _set(fd, fcntl.F_WRLCK, 0, 0)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise DiskError(_explain(fd, path, readonly)) from None
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL):
            raise
        # A file system without locks: nothing to hold on to.


def _set(fd: int, kind: int, start: int, length: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, start, length, 0))


def _is_locked(fd: int, byte: int) -> bool:
    """Whether another open file holds any lock on the byte."""
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    found: int = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked))[0]
    return found != fcntl.F_UNLCK


def _explain(fd: int, path: str, readonly: bool) -> str:
    who = ", ".join(holders(fd)) or "another process"
    if readonly:
        return (
            f"{path}: {who} is writing it, and what is read meanwhile would change underfoot: "
            "end that first, or use a copy (cp --reflink=auto)"
        )
    return (
        f"{path}: {who} has it open as a disk, and two users of a disk that is written destroy "
        "what is on it: end that first, or open it as overlay, or read-only if nobody writes it"
    )


def holders(fd: int) -> list[str]:
    """The processes that hold an open-file-description lock on the file, as far as /proc tells."""
    there = os.fstat(fd)
    inode = f":{there.st_ino} "
    found = []
    for pid in os.listdir("/proc"):
        if not pid.isdigit():
            continue
        try:
            for entry in os.listdir(f"/proc/{pid}/fdinfo"):
                if pid == str(os.getpid()) and entry == str(fd):
                    continue
                with open(f"/proc/{pid}/fdinfo/{entry}") as file:
                    locked = any("OFDLCK" in line and inode in line for line in file)
                # /proc names the device of the lock; the inode may be of another one
                if locked and os.stat(f"/proc/{pid}/fd/{entry}").st_dev == there.st_dev:
                    with open(f"/proc/{pid}/comm") as file:
                        found.append(f"process {pid} ({file.read().strip()})")
                    break
        except OSError:
            continue  # it is gone, or not ours to look at
    if f"process {os.getpid()} " in " ".join(found):
        return ["this process"]
    return found
