"""Host memory behind a region: anonymous, a sealed memfd, or a file; in small or huge pages.

A backing is a Python ``mmap`` object, and its life is that of the mapping: whoever holds a
memoryview into it (a user's view, a numpy array) holds the mapping, so ``close()`` lets go of it
and the last holder unmaps. The host-virtual address is read once and no buffer export is kept.

Where it lies matters: KVM maps a slot with large pages only if ``userspace_addr`` and
``guest_phys_addr`` agree in their low 21 bits (api.rst, KVM_SET_USER_MEMORY_REGION), and a
transparent huge page needs a stretch that begins on a 2 MiB boundary. So anonymous memory of 2 MiB
and more is placed at an address that agrees with its gpa. Python's mmap takes no address; the
mapping is made 2 MiB longer than needed and a window inside is used. The rest is never touched and
costs nothing but address space.
"""

from __future__ import annotations

import errno
import mmap
import os
import sys

from pykvm._abi import ffi
from pykvm.errors import CapabilityError

from .units import PAGE_SIZE, check_pages, format_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

# linux/mman.h for x86; Python's mmap module names neither before 3.13.
_MAP_NORESERVE = 0x4000
_MAP_HUGETLB = 0x40000

_THP_SIZE = 2 << 20
# log2 of the page size, as MAP_HUGE_* and MFD_HUGE_* carry it in bits 26 to 31.
_HUGETLB_SHIFTS = {"2M": 21, "1G": 30}

_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE


class Backing:
    """One host mapping: ``size`` bytes at ``hva``, which is ``window`` bytes into ``mapping``.

    A mapping that is longer than ``size`` leaves room for a window that agrees with ``gpa``.

    Attributes:
        kind: ``"anonymous"``, ``"memfd"``, ``"file"`` or ``"private"``.
        fd: descriptor of a memfd or a shared file, owned by the backing, or -1.
        huge: None, ``"thp"``, ``"2M"`` or ``"1G"``.
        writable: whether the host mapping itself may be written.
        source: of a private one, what its owner says it is of.
    """

    __slots__ = (
        "fd", "huge", "hva", "kind", "mapping", "path", "size", "source", "window", "writable",
    )  # fmt: skip

    def __init__(
        self,
        kind: str,
        mapping: mmap.mmap,
        size: int,
        *,
        gpa: int = 0,
        fd: int = -1,
        path: str = "",
        huge: str | None = None,
        writable: bool = True,
    ) -> None:
        self.kind = kind
        self.mapping: mmap.mmap | None = mapping
        self.size = size
        self.fd = fd
        self.path = path
        self.huge = huge
        self.writable = writable
        self.source: object = None
        start = _address(mapping)
        self.window = (gpa - start) % _THP_SIZE if len(mapping) > size else 0
        self.hva = start + self.window

    def discard(self, start: int, end: int) -> bool:
        """Give back the pages of a range of offsets, so that they read as zeros; False if not.

        Only private anonymous memory reads as zeros again: a file's pages would be the file's, and
        hugetlb pages are kept, as they were reserved.
        """
        if self.kind != "anonymous" or self.huge in _HUGETLB_SHIFTS or self.mapping is None:
            return False
        try:
            self.mapping.madvise(mmap.MADV_DONTNEED, self.window + start, end - start)
        except OSError:  # locked in memory (mlock)
            return False
        return True

    def close(self) -> None:
        """Close the descriptor, and unmap unless somebody still holds a view. Idempotent."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
        mapping, self.mapping = self.mapping, None
        try:
            if mapping is not None:
                mapping.close()
        except BufferError:
            pass  # a view is alive: it holds the mmap object, and unmaps as it goes

    def __del__(self) -> None:
        # Once the interpreter shuts down nothing can be imported, and the kernel cleans up.
        if getattr(self, "fd", -1) >= 0 and not sys.is_finalizing():
            import warnings

            warnings.warn(
                f"guest memory with fd {self.fd} was never closed",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )
            self.close()


def anonymous(gpa: int, size: int, huge: str | None = None) -> Backing:
    """Map private anonymous memory, not reserved in advance: pages appear as they are touched.

    ``huge`` is None, ``"thp"`` (advice: the kernel gives huge pages if the host's setting in
    /sys/kernel/mm/transparent_hugepage/enabled allows it), or ``"2M"``/``"1G"`` (hugetlb pages,
    reserved here, so that a guest never dies of one missing later).

    Raises:
        CapabilityError: not enough free huge pages of that size.
        OSError: no room in the address space.
    """
    if huge is not None:
        _check_huge(gpa, size, huge)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    if huge in _HUGETLB_SHIFTS:
        # Without a reservation (NORESERVE) mmap would succeed and the first access die of SIGBUS.
        flags |= _MAP_HUGETLB | _HUGETLB_SHIFTS[huge] << os.MFD_HUGE_SHIFT
        return Backing("anonymous", _map(-1, size, flags, huge=huge), size, huge=huge)
    slack = _THP_SIZE if size >= _THP_SIZE else 0
    mapping = _map(-1, size, flags | _MAP_NORESERVE, slack=slack)
    made = Backing("anonymous", mapping, size, gpa=gpa, huge=huge)
    if huge == "thp":
        _advise(mapping, made.window, size)
    return made


def memfd(gpa: int, size: int, huge: str | None = None, name: str = "") -> Backing:
    """Map a new memfd, shared, so that another process can map the same RAM by its descriptor.

    It is sealed against shrinking (and the seals against change): whoever gets the descriptor
    cannot make an access here die of SIGBUS by truncating it. ``huge`` as in ``anonymous``, except
    that ``"thp"`` obeys .../transparent_hugepage/shmem_enabled and the kernel chooses the place.
    """
    import fcntl

    if huge is not None:
        _check_huge(gpa, size, huge)
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    if huge in _HUGETLB_SHIFTS:
        flags |= os.MFD_HUGETLB | _HUGETLB_SHIFTS[huge] << os.MFD_HUGE_SHIFT
    fd = -1
    try:
        try:
            fd = os.memfd_create(name or "pykvm", flags)
            os.ftruncate(fd, size)
        except OSError as error:
            _refuse(error, size, "memfd", huge)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
        mapping = _map(fd, size, mmap.MAP_SHARED, huge=huge)
        if huge == "thp":
            _advise(mapping, 0, size)
        return Backing("memfd", mapping, size, fd=fd, huge=huge)
    except BaseException:
        if fd >= 0:
            os.close(fd)
        raise


def file(
    path: str, size: int | None, offset: int = 0, shared: bool = False, readonly: bool = False
) -> Backing:
    """Map ``size`` bytes of a file from ``offset``, by default all that is left of it.

    ``shared`` writes go to the file; else they stay private to this process. With ``shared`` and
    ``readonly`` the file is opened for reading only, and nobody can write the mapping.

    The file must be long enough now: an access beyond its end is SIGBUS, no exception. Nothing can
    stop another process from truncating it later (a memfd can be sealed, a file cannot).

    Raises:
        ValueError: too short, not whole pages, or neither a regular file nor a block device.
        OSError: it cannot be opened or mapped.
    """
    import stat

    check_pages(offset, "file offset")
    writable = not (shared and readonly)
    # O_NONBLOCK: opening a fifo by mistake must fail below, not hang here.
    mode = os.O_RDWR if shared and writable else os.O_RDONLY
    fd = os.open(path, mode | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        kind = os.fstat(fd).st_mode
        if not (stat.S_ISREG(kind) or stat.S_ISBLK(kind)):
            raise ValueError(f"{path}: neither a regular file nor a block device")
        end = os.lseek(fd, 0, os.SEEK_END)
        left = max(end - offset, 0)
        if size is None:
            size = left
        if left < size:
            raise ValueError(
                f"{path}: is {end:#x} bytes long, too short for {size:#x} bytes from offset "
                f"{offset:#x} (an access past its end would be SIGBUS)"
            )
        if size == 0 or size % PAGE_SIZE:
            raise ValueError(
                f"{path}: {size:#x} bytes from offset {offset:#x} are not a whole number of "
                f"{PAGE_SIZE:#x}-byte pages: give a size, or load() the contents into RAM"
            )
        mapping = _map(
            fd,
            size,
            mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE | _MAP_NORESERVE,
            prot=_READ_WRITE if writable else mmap.PROT_READ,
            offset=offset,
        )
    except BaseException:
        os.close(fd)
        raise
    if not shared:
        os.close(fd)
        fd = -1
    return Backing("file", mapping, size, fd=fd, path=path, writable=writable)


def private(fd: int, size: int, offset: int = 0, source: object = None) -> Backing:
    """Map ``size`` bytes of a descriptor privately: what is written here stays here.

    Nobody may shorten the file meanwhile (a memfd can be sealed): an access beyond its end is
    SIGBUS.

    Raises:
        ValueError: the file is too short.
        OSError: it cannot be mapped.
    """
    check_pages(offset, "file offset")
    left = os.fstat(fd).st_size - offset
    if left < size:
        raise ValueError(f"there are {left:#x} bytes from offset {offset:#x}, not {size:#x}")
    mapping = _map(fd, size, mmap.MAP_PRIVATE | _MAP_NORESERVE, offset=offset)
    made = Backing("private", mapping, size)
    made.source = source
    return made


def _address(mapping: mmap.mmap) -> int:
    """Return where ``mapping`` begins. The export ends here: it would block ``mmap.close()``."""
    with ffi.from_buffer(mapping) as start:
        return int(ffi.cast("uintptr_t", start))


def _map(
    fd: int,
    size: int,
    flags: int,
    *,
    prot: int = _READ_WRITE,
    offset: int = 0,
    slack: int = 0,
    huge: str | None = None,
) -> mmap.mmap:
    length = size + slack
    try:
        if sys.version_info >= (3, 13):
            return mmap.mmap(fd, length, flags=flags, prot=prot, offset=offset, trackfd=False)
        # Here mmap keeps a duplicate of the descriptor for itself, as long as the mapping lives.
        return mmap.mmap(fd, length, flags=flags, prot=prot, offset=offset)
    except OSError as error:
        _refuse(error, size, "memory" if fd < 0 else "file", huge)


def _refuse(error: OSError, size: int, what: str, huge: str | None) -> NoReturn:
    """Raise what the user can act upon in place of a bare errno."""
    if huge in _HUGETLB_SHIFTS:
        pages = f"/sys/kernel/mm/hugepages/hugepages-{(1 << _HUGETLB_SHIFTS[huge]) >> 10}kB"
        try:
            with open(f"{pages}/free_hugepages") as file:
                free = file.read().strip()
        except OSError:
            raise CapabilityError(
                f"this host has no {huge} huge pages ({pages} is missing)"
            ) from error
        if error.errno == errno.ENOMEM:
            knob = "/proc/sys/vm/nr_hugepages" if huge == "2M" else f"{pages}/nr_hugepages"
            raise CapabilityError(
                f"{size >> _HUGETLB_SHIFTS[huge]} huge pages of {huge} are needed and {free} are "
                f"free: reserve more by writing their number to {knob}"
            ) from error
    raise OSError(
        error.errno, f"cannot map {format_size(size)} of {what}: {os.strerror(error.errno or 0)}"
    ) from error


def _check_huge(gpa: int, size: int, huge: str) -> None:
    if huge == "thp":
        if size < _THP_SIZE:
            raise ValueError(f'huge="thp": {format_size(size)} is less than one huge page, 2M')
        return
    if huge not in _HUGETLB_SHIFTS:
        raise ValueError(f'huge is None, "thp", "2M" or "1G", not {huge!r}')
    page = 1 << _HUGETLB_SHIFTS[huge]
    # hugetlb mappings begin on a page of theirs, so only such a gpa agrees with the hva.
    if gpa % page or size % page:
        raise ValueError(
            f'huge="{huge}": gpa {gpa:#x} and size {size:#x} must be multiples of {huge}'
        )


def _advise(mapping: mmap.mmap, window: int, size: int) -> None:
    try:
        mapping.madvise(mmap.MADV_HUGEPAGE, window, size)
    except OSError as error:
        raise CapabilityError(
            "this kernel has no transparent huge pages (CONFIG_TRANSPARENT_HUGEPAGE)"
        ) from error
