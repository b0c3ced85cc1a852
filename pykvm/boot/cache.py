"""Unpacked kernels, kept between runs.

An entry is named by the SHA-256 of the packed payload and holds an ``Image``: a header, and the
bytes that are not zero, ready to be copied. To read a whole kernel only to learn its digest would
cost more than the copying, so a kernel that is a file is also known by its inode, size and times: a
symbolic link of that name points to its entry.

Nothing here ever fails a boot. An entry appears whole, by rename, or not at all; one that is
truncated, damaged in its header, or another user's is as good as none; and where the folder cannot
be written, nothing is kept. The bytes themselves are not summed up on each start: that would cost
more than the cache saves, and a file system that loses blocks of a complete file loses the kernel's
own file as well.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
import zlib

from pykvm.boot.image import Image

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MAX_BYTES = 512 << 20
"""Entries used least recently are dropped beyond this."""
MAX_AGE = 90 * 24 * 3600
"""Seconds after which an entry that nobody used is dropped."""
_STRAY_AGE = 3600  # a temporary file this old has lost its writer
_SETTLED = 2 * 10**9
"""Nanoseconds: a file changed this recently might change again within one tick of its ctime."""

_MAGIC = b"pykvmimg"
_VERSION = 1
# magic, version, header bytes, CRC-32 of what follows, file bytes; entry, pvh_entry, ranges, runs
_HEAD = struct.Struct("<8sIIIQQQII")
_CRC_FROM = 20
_NO_PVH = (1 << 64) - 1
_MOST_HEADER = 1 << 20
_SUFFIX = f".{_VERSION}"

_ENTRY = r"[0-9a-f]{64}\.\d+"
_LINK = r"id-[0-9a-f-]+"
_TEMPORARY = r"\.[0-9a-f]{16}\.tmp"


def default_folder() -> str | None:
    """$XDG_CACHE_HOME or ~/.cache, /pykvm/vmlinux; None for a user without a home."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(root):  # as the XDG base directory specification has it
        root = os.path.expanduser("~/.cache")
    return os.path.join(root, "pykvm", "vmlinux") if os.path.isabs(root) else None


def identity(status: os.stat_result) -> str:
    """Name a file's contents by all that changes with them, or ``""`` if it changed just now."""
    if time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) < _SETTLED:
        return ""
    parts = (
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )
    return "id-" + "-".join(f"{part:x}" for part in parts)


def digest(payload: memoryview) -> str:
    """The name of a payload: its SHA-256."""
    import hashlib

    return hashlib.sha256(payload).hexdigest()


class Cache:
    """A folder of unpacked kernels.

    Args:
        folder: where; made when something is stored. None keeps nothing.

    Attributes:
        trouble: why the last ``store`` failed, or "".
    """

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        self.folder = None if folder is None else os.fspath(folder)
        self.trouble = ""

    def find(self, name: str) -> Image | None:
        """The entry of this digest, or of the file with this ``identity``, or None."""
        if self.folder is None or not name:
            return None
        path = os.path.join(self.folder, name + ("" if name.startswith("id-") else _SUFFIX))
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            return None
        try:
            image = _read(fd)
            if image is not None:
                _try(os.utime, fd)  # used now
            return image
        except (OSError, ValueError):
            return None
        finally:
            os.close(fd)

    def store(self, name: str, image: Image, alias: str = "") -> bool:
        """Keep an image under its digest, and under a file's ``identity``; False if it failed."""
        if self.folder is None:
            return False
        try:
            os.makedirs(self.folder, mode=0o700, exist_ok=True)
            self._write(name + _SUFFIX, image)
        except OSError as error:
            self.trouble = error.strerror or str(error)
            return False
        self.link(alias, name)
        _try(self._sweep, name + _SUFFIX)
        return True

    def link(self, alias: str, name: str) -> None:
        """Let a file's ``identity`` lead to an entry, where that is possible."""
        if self.folder is None or not alias:
            return
        temporary = self._temporary()
        _try(os.symlink, name + _SUFFIX, temporary)
        _try(os.replace, temporary, os.path.join(self.folder, alias))

    def _temporary(self) -> str:
        """A name that no other writer has."""
        assert self.folder is not None
        return os.path.join(self.folder, f".{os.urandom(8).hex()}.tmp")

    def _write(self, name: str, image: Image) -> None:
        assert self.folder is not None
        temporary = self._temporary()
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with open(fd, "wb", buffering=0) as file:
                for part in _parts(image):
                    view = memoryview(part)
                    while len(view):
                        view = view[file.write(view) :]
            os.replace(temporary, os.path.join(self.folder, name))
        except BaseException:
            os.unlink(temporary)
            raise

    def _sweep(self, keep: str) -> None:
        """Drop what is too old or too much, dead links, and what killed writers left.

        Only what has a name as given here: the folder may be one that somebody chose.
        """
        import re

        assert self.folder is not None
        now = time.time()
        entries = []
        with os.scandir(self.folder) as found:
            for item in found:
                status = item.stat(follow_symlinks=False)
                age = now - status.st_mtime
                if item.name == keep:
                    entries.append((-1.0, status.st_size, item.path))
                elif re.fullmatch(_LINK, item.name) and item.is_symlink():
                    if not os.path.exists(item.path):
                        os.unlink(item.path)
                elif re.fullmatch(_TEMPORARY, item.name):
                    if age > _STRAY_AGE:
                        os.unlink(item.path)
                elif re.fullmatch(_ENTRY, item.name):
                    if age > MAX_AGE or not item.name.endswith(_SUFFIX):
                        os.unlink(item.path)
                    else:
                        entries.append((age, status.st_size, item.path))
        total = 0
        for _, size, path in sorted(entries):
            total += size
            if total > MAX_BYTES and size < total:
                os.unlink(path)


def _try(action: Callable[..., object], *args: object) -> None:
    """Do what would be good but need not be: others may own the file, or sweep as well."""
    try:
        action(*args)
    except OSError:
        return


def _parts(image: Image) -> Iterator[bytes | memoryview]:
    """The file's contents: header, tables, padding, then the runs one after another."""
    tables = b"".join(struct.pack("<QQ", *one) for one in image.ranges)
    size = _HEAD.size + len(tables) + 24 * len(image.runs)
    start = offset = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    for gpa, data in image.runs:
        tables += struct.pack("<QQQ", gpa, offset, len(data))
        offset += len(data)
    pvh = _NO_PVH if image.pvh_entry is None else image.pvh_entry
    counts = len(image.ranges), len(image.runs)
    head = _HEAD.pack(_MAGIC, _VERSION, size, 0, offset, image.entry, pvh, *counts)
    crc = zlib.crc32(head[_CRC_FROM:] + tables)
    yield head[: _CRC_FROM - 4] + struct.pack("<I", crc) + head[_CRC_FROM:] + tables
    yield bytes(start - size)
    for _, data in image.runs:
        yield memoryview(data)


def _read(fd: int) -> Image | None:
    """The image in a file, mapped; ValueError or None for anything that is not a whole entry."""
    status = os.fstat(fd)
    if status.st_uid not in (os.geteuid(), 0) or status.st_mode & 0o022:
        return None
    # An empty file cannot be mapped: a ValueError, as for any other that is no entry.
    view = memoryview(mmap.mmap(fd, 0, mmap.MAP_PRIVATE, mmap.PROT_READ))
    if len(view) < _HEAD.size:
        return None
    magic, version, size, crc, total, entry, pvh, n_ranges, n_runs = _HEAD.unpack_from(view)
    if (magic, version, total) != (_MAGIC, _VERSION, len(view)):
        return None
    if size != _HEAD.size + 16 * n_ranges + 24 * n_runs or not size <= min(total, _MOST_HEADER):
        return None
    if zlib.crc32(view[_CRC_FROM:size]) != crc:
        return None
    tables = view[_HEAD.size : size]
    ranges = list(struct.iter_unpack("<QQ", tables[: 16 * n_ranges]))
    runs = []
    for gpa, offset, length in struct.iter_unpack("<QQQ", tables[16 * n_ranges :]):
        inside = any(low <= gpa and gpa + length <= low + room for low, room in ranges)
        if not inside or offset + length > total:
            return None
        runs.append((gpa, view[offset : offset + length]))
    return Image(entry, None if pvh == _NO_PVH else pvh, ranges, runs) if ranges else None
