"""What guest memory was: pages in a file of their own, which nobody writes any more.

A page of zeros is not kept: the image knows which pages it holds, and the file has holes.
"""

from __future__ import annotations

import mmap
import os

from pykvm._abi import ffi, lib
from pykvm.errors import ClosedError, SnapshotError
from pykvm.memory.units import PAGE_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from typing import Any

    from pykvm.memory import GuestMemory, Region

    Patch = tuple[int, int, Any, int]

_PIECE = 4096
"""Bits of a bitmap that are looked at together."""
_SEALS = ("F_SEAL_SHRINK", "F_SEAL_GROW", "F_SEAL_FUTURE_WRITE", "F_SEAL_SEAL")


class Part:
    """One region in an image.

    Attributes:
        slot, gpa, size, readonly, name: as the region's.
        offset: where in the image's file it begins.
        held: bitmap of the pages that are there (``uint64_t[]``); the others are zeros.
    """

    __slots__ = ("gpa", "held", "name", "offset", "readonly", "size", "slot")

    def __init__(
        self, slot: int, gpa: int, size: int, readonly: bool, name: str, offset: int
    ) -> None:
        self.slot = slot
        self.gpa = gpa
        self.size = size
        self.readonly = readonly
        self.name = name
        self.offset = offset
        self.held: Any = ffi.new("uint64_t[]", self.words)

    @property
    def pages(self) -> int:
        """How many pages it has, held or not."""
        return self.size // PAGE_SIZE

    @property
    def words(self) -> int:
        """64-bit words of a bitmap of its pages."""
        return (self.pages + 63) // 64

    @property
    def place(self) -> tuple[int, int, int, bool]:
        """What must be the same of a region that takes it over."""
        return self.slot, self.gpa, self.size, self.readonly

    def runs(self, bitmap: Any = None) -> Iterator[tuple[int, int]]:
        """Runs of set bits, of the pages held or of another bitmap: (first page, how many)."""
        return runs(ffi.buffer(self.held if bitmap is None else bitmap)[:], self.pages)


def runs(bitmap: bytes, pages: int) -> Iterator[tuple[int, int]]:
    """Runs of set bits: (first, how many).

    Piece by piece, for the time must not grow with the square of a memory that a guest has made
    holes in.
    """
    first = count = 0  # the run that may go on in the next piece
    for at in range(0, pages, _PIECE):
        bits = int.from_bytes(bitmap[at // 8 : (at + _PIECE) // 8], "little")
        bits &= (1 << min(_PIECE, pages - at)) - 1
        while bits:
            skip = (bits & -bits).bit_length() - 1
            bits >>= skip
            at += skip
            length = (bits + 1 & -(bits + 1)).bit_length() - 1
            if first + count == at and count:
                count += length
            else:
                if count:
                    yield first, count
                first, count = at, length
            bits >>= length
            at += length
    if count:
        yield first, count


class Image:
    """The pages of a machine's memory at one moment.

    Args:
        fd: the file, which is the image's from here on; as patches' are. It closes them where it
            cannot be made.
        parts: one for each region, by gpa.
        patches: of a chain of files: (fd, number of the part, bitmap of the pages in it, offset of
            the first), in order; those pages take the place of the file's.

    Attributes:
        parts, patches: see above.
    """

    def __init__(self, fd: int, parts: Sequence[Part], patches: Sequence[Patch] = ()) -> None:
        self.parts = tuple(parts)
        self._fd = fd
        self.patches = tuple(patches)
        self._map: mmap.mmap | None = None
        self._address = 0
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        length = max((part.offset + part.size for part in self.parts), default=0)
        if length:
            # Patched, it is a private mapping, and pages of the file come in as they are looked at.
            self._map = (
                mmap.mmap(self._fd, length, mmap.MAP_PRIVATE)
                if self.patches
                else mmap.mmap(self._fd, length, mmap.MAP_SHARED, mmap.PROT_READ)
            )
            with ffi.from_buffer(self._map) as start:
                self._address = int(ffi.cast("uintptr_t", start))
        for source, number, bitmap, at in self.patches:
            part = self.parts[number]
            for first, count in part.runs(bitmap):
                size = count * PAGE_SIZE
                assert self._map is not None
                _read_into(source, at, memoryview(self._map), part.offset + first * PAGE_SIZE, size)
                at += size

    @property
    def fd(self) -> int:
        """The file."""
        if self._fd < 0:
            raise ClosedError("this snapshot is closed")
        return self._fd

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._fd < 0

    def address(self, part: Part) -> int:
        """Where in this process a part lies; pages that are not held are not to be looked at."""
        if self._map is None:
            raise ClosedError("this snapshot is closed")
        return self._address + part.offset

    @property
    def held(self) -> int:
        """Bytes of the pages that are not all zeros."""
        return sum(
            int.from_bytes(ffi.buffer(part.held)[:], "little").bit_count() * PAGE_SIZE
            for part in self.parts
        )

    def read(self, gpa: int, length: int) -> bytes:
        """Bytes as they were; GuestMemory's rules, but within one region."""
        for part in self.parts:
            if part.gpa <= gpa and 0 <= length <= part.gpa + part.size - gpa:
                break
        else:
            raise SnapshotError(f"{gpa:#x}..{gpa + length:#x} is not in one region of the snapshot")
        if self._map is None:
            raise ClosedError("this snapshot is closed")
        data, at, end = bytearray(), gpa - part.gpa, gpa - part.gpa + length
        while at < end:
            stop = min(end, (at // PAGE_SIZE + 1) * PAGE_SIZE)
            if part.held[at // PAGE_SIZE // 64] >> at // PAGE_SIZE % 64 & 1:
                data += self._map[part.offset + at : part.offset + stop]
            else:
                data += bytes(stop - at)
            at = stop
        return bytes(data)

    def map_into(self, memory: GuestMemory) -> None:
        """Give a memory regions that begin as the parts, sharing every page until it is written."""
        for part in self.parts:
            memory.add_private(
                part.gpa,
                self.fd,
                part.size,
                offset=part.offset,
                readonly=part.readonly,
                slot=part.slot,
                name=part.name,
                source=part,
            )
        for _, number, bitmap, _ in self.patches:
            part = self.parts[number]
            for first, count in part.runs(bitmap):
                at = part.offset + first * PAGE_SIZE
                assert self._map is not None
                view = memoryview(self._map)[at : at + count * PAGE_SIZE]
                memory.load(part.gpa + first * PAGE_SIZE, view)
                view.release()

    def check(self, memory: GuestMemory) -> None:
        """SnapshotError unless a memory has the same regions in the same slots; both are open."""
        if memory.closed:
            raise ClosedError("this guest memory was closed")
        if self.closed:
            raise ClosedError("this snapshot is closed")
        there = [(r.slot, r.guest_phys_addr, r.memory_size, r.readonly) for r in memory.regions]
        if there != [part.place for part in self.parts]:
            raise SnapshotError(
                "the memory map is another than when the snapshot was taken:"
                f" {len(there)} regions, {sum(each[2] for each in there):#x} bytes"
            )

    def close(self) -> None:
        """Let go of the file. Idempotent."""
        mapping, self._map = self._map, None
        if mapping is not None:
            mapping.close()
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
        for source in {patch[0] for patch in self.patches}:
            os.close(source)
        self.patches = ()

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:  # a value: what nobody can restore any more just goes
            self.close()


def _read_into(fd: int, offset: int, buffer: memoryview, at: int, size: int) -> None:
    done = 0
    while done < size:
        count = os.preadv(fd, [buffer[at + done : at + size]], offset + done)
        if not count:
            raise SnapshotError("a snapshot's file is shorter than it was")
        done += count
    buffer.release()


def capture(memory: GuestMemory) -> Image:
    """Copy a stopped guest's memory, what was ever touched of it."""
    import fcntl

    fd = os.memfd_create("pykvm-snapshot", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        parts, offset = [], 0
        for region in memory.regions:
            part = Part(
                region.slot,
                region.guest_phys_addr,
                region.memory_size,
                region.readonly,
                region.name,
                offset,
            )
            parts.append(part)
            offset += region.memory_size
        os.ftruncate(fd, offset)
        for part, region in zip(parts, memory.regions, strict=True):
            _copy(fd, part, region)
        seals = 0
        for name in _SEALS:  # linux/fcntl.h; FUTURE_WRITE is newer than Python's module
            seals |= getattr(fcntl, name, 0x10 if name == "F_SEAL_FUTURE_WRITE" else 0)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(fd)
        raise
    return Image(fd, parts)


def _copy(fd: int, part: Part, region: Region) -> None:
    touched, source = pagemap(region), region.source
    written = lib.pykvm_image_write(
        fd,
        part.offset,
        ffi.cast("uint8_t *", region.userspace_addr),
        part.pages,
        ffi.NULL if touched is None else ffi.from_buffer("uint64_t[]", touched),
        source.held if isinstance(source, Part) else ffi.NULL,
        part.held,
    )
    if written < 0:
        raise SnapshotError(f"the snapshot's memory cannot be written: {os.strerror(-written)}")


def pagemap(region: Region) -> bytes | None:
    """The region's part of /proc/self/pagemap; None where untouched pages may be anything.

    Untouched pages of a fork are those of the image that it is of.
    """
    if region.kind != "anonymous" and not isinstance(region.source, Part):
        return None
    pages = region.memory_size // PAGE_SIZE
    try:
        fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        data = os.pread(fd, pages * 8, region.userspace_addr // PAGE_SIZE * 8)
    except OSError:
        return None
    finally:
        os.close(fd)
    return data if len(data) == pages * 8 else None


def differing(a: Image, b: Image) -> Iterable[tuple[Part, Any, int]]:
    """Of two images of the same regions, each part with the pages that differ, and how many."""
    if [part.place for part in a.parts] != [part.place for part in b.parts]:
        raise SnapshotError("the two snapshots have different memory maps")
    for one, two in zip(a.parts, b.parts, strict=True):
        bitmap = ffi.new("uint64_t[]", one.words)
        count = lib.pykvm_image_diff(
            ffi.cast("uint8_t *", a.address(one)),
            one.held,
            ffi.cast("uint8_t *", b.address(two)),
            two.held,
            one.pages,
            bitmap,
        )
        yield one, bitmap, int(count)
