"""A block device for the search: its model, and a driver that knows how requests look."""

from __future__ import annotations

import os
from itertools import pairwise
from random import Random
from struct import iter_unpack, pack
from typing import Any

from pykvm.devices.disk.host import HostFile
from pykvm.devices.disk.raw import RawDisk
from pykvm.devices.virtio import blk_request as req
from pykvm.devices.virtio.blk import Blk
from pykvm.errors import GuestError
from tests.support.ring_writer import RingWriter
from tests.support.twin_memory import PlainMemory, Twins
from tests.support.virtio_model import DRIVER_OK, FEATURES_OK, NEEDS_RESET, ModelDevice
from tests.support.vring_model import Breach, ModelChain, ModelRing

SECTORS = 24
MOST_SECTORS = 64
FLUSH, CONFIG_WCE, DISCARD, WRITE_ZEROES, RO = 9, 11, 13, 14, 5
FEATURES = sum(1 << bit for bit in (1, 2, 6, FLUSH, 10, CONFIG_WCE, DISCARD, WRITE_ZEROES))
READ_ONLY = sum(1 << bit for bit in (1, 2, RO, 6, FLUSH, 10, CONFIG_WCE))
OK, IOERR, UNSUPP = 0, 1, 2
WRITEBACK = 32
"""Where the configuration has the field of that name."""


def content(sectors: int) -> bytes:
    """What is on the disk at first."""
    return b"".join(pack("<Q", n + 1) * 64 for n in range(sectors))


def device(readonly: bool) -> Blk:
    """A block device over a file in memory."""
    fd = os.memfd_create("disk", os.MFD_CLOEXEC)
    os.write(fd, content(SECTORS))
    return Blk(RawDisk(HostFile(fd, "disk"), readonly=readonly), serial="hostile")


class ModelBlk(ModelDevice):
    """virtio 1.2, 5.2, with limits of 2**21 sectors and 32 ranges a discard, 2**17 and 1 of zeros.

    Attributes:
        disk: what is on it.
    """

    device_id, queue_sizes = 2, (256,)

    def __init__(self, memory: PlainMemory, readonly: bool) -> None:
        self.disk = bytearray(content(SECTORS))
        self.readonly = readonly
        self.features = READ_ONLY if readonly else FEATURES
        super().__init__(memory)

    def _fresh(self) -> None:
        super()._fresh()
        self.write_back = True

    def _write_status(self, value: int) -> None:
        before = self.status
        super()._write_status(value)
        if self.status & ~before & DRIVER_OK and not self.status & NEEDS_RESET:
            self.write_back = self.write_back and self._has(FLUSH)

    def _has(self, feature: int) -> bool:
        return bool(self.wanted >> feature & 1)

    def config(self, offset: int, size: int) -> bytes:
        back = self.write_back
        if self.status & (FEATURES_OK | DRIVER_OK) == FEATURES_OK and not self._has(FLUSH):
            back = False
        limits = (1 << 21, 32, 8, 1 << 17, 1, 1) if not self.readonly else (0,) * 6
        fields = (
            pack("<QII4xIBBHI", len(self.disk) // 512, 1 << 18, 254, 512, 3, 0, 8, 0),
            pack("<BBH6I", back, 0, 1, *limits),
        )
        return b"".join(fields)[offset : offset + size]

    def write_config(self, offset: int, data: bytes) -> None:
        if offset == WRITEBACK and len(data) == 1 and self._has(CONFIG_WCE):
            self.write_back = data != b"\0"

    # ---- requests --------------------------------------------------------------------------------

    def one(self, index: int, chain: ModelChain) -> int:
        sent = self.gather(chain)
        room = sum(length for _, length in chain.writable)
        if not room:
            raise Breach("no status")
        status, answer = self._do(sent, room - 1)
        self.scatter(chain, answer)
        at, length = chain.writable[-1]
        self.memory.write(at + length - 1, bytes((status,)))
        return len(answer) + (len(answer) == room - 1)

    def _do(self, sent: bytes, room: int) -> tuple[int, bytes]:
        """The status, and what is written before it."""
        if len(sent) < 16:
            return IOERR, b""
        kind = int.from_bytes(sent[:4], "little")
        first = 512 * int.from_bytes(sent[8:16], "little")
        data = sent[16:]
        if kind == 0:
            if room % 512 or first + room > len(self.disk):
                return IOERR, b""
            return OK, bytes(self.disk[first : first + room])
        if kind == 1:
            if self.readonly or len(data) % 512 or first + len(data) > len(self.disk):
                return IOERR, b""
            self.disk[first : first + len(data)] = data
            return OK, b""
        if kind == 4:
            return OK, b""
        if kind == 8:
            return OK, b"hostile".ljust(20, b"\0")[:room]
        if kind == 11 and self._has(DISCARD):
            return self._ranges(data, 32, 1 << 21, 0), b""
        if kind == 13 and self._has(WRITE_ZEROES):
            return self._ranges(data, 1, 1 << 17, 1), b""
        return UNSUPP, b""

    def _ranges(self, data: bytes, most: int, longest: int, flags: int) -> int:
        if len(data) % 16 or not 16 <= len(data) <= 16 * most:
            return IOERR
        ranges = list(iter_unpack("<QII", data))
        for first, count, given in ranges:
            if given & ~flags:
                return UNSUPP
            if count > longest or 512 * (first + count) > len(self.disk):
                return IOERR
        for first, count, _ in ranges:  # discarded from a file in memory it is zeros as well
            self.disk[512 * first : 512 * (first + count)] = bytes(512 * count)
        return OK


class BlkWriter(RingWriter):
    """Requests that are right but for some details, among any other chains."""

    def __init__(self, random: Random, twins: Twins, model: ModelRing) -> None:
        super().__init__(random, twins, model)
        self.sectors = SECTORS

    def _sector(self) -> int:
        random = self.random
        if random.random() < 0.8:
            return random.randrange(self.sectors + 1)
        wraps = (1 << 55, (1 << 55) - 1, (1 << 64) - 1, (1 << 64) - 8, 1 << 63, self.sectors)
        return random.choice(wraps)

    def _range(self) -> bytes:
        random = self.random
        flags = random.choice((0, 0, 0, 0, 0, 1, 2, 1 << 31))
        if random.random() < 0.4:  # around the end
            count = random.randrange(1, self.sectors)
            return pack("<QII", self.sectors - count + random.randrange(2), count, flags)
        count = random.choice((0, 1, 3, 8, self.sectors, 1 << 17, 1 << 21, (1 << 32) - 1))
        return pack("<QII", self._sector(), count, flags)

    def write_chain(self) -> int:
        """A request in the ring's first descriptors, its bytes in one place; the head."""
        random = self.random
        if random.random() < 0.3:
            return super().write_chain()
        kind = random.choice((0, 0, 0, 1, 1, 1, 4, 8, 11, 11, 13, 13, random.getrandbits(32)))
        sent = pack("<III", kind, 0, 0)[:8] + pack("<Q", self._sector())
        room = 0
        if kind in (11, 13):
            ranges = random.choice((1, 1, 1, 2, 32, 33, 0))
            sent += b"".join(self._range() for _ in range(ranges))
        elif kind == 1:
            sent += random.randbytes(random.choice((512, 512, 1024, 4096, 511)))
        elif kind == 8:
            room = random.choice((20, 20, 19, 21))
        else:
            room = random.choice((512, 512, 1024, 4096, 513, 0))
        if random.random() < 0.05:
            sent = sent[: random.randrange(len(sent) + 1)]
        self.poke(0x3000, sent)
        pieces = self._pieces(0x3000, len(sent), 0, 16)
        if random.random() < 0.97:
            pieces += self._pieces(0x5000, room + 1, 2, room)
        pieces = pieces[: max(min(self.model.size, self.max_size), 1)] or [(0, 0, 0)]
        head = random.randrange(max(1, min(self.model.size, self.max_size) - len(pieces)))
        for number, (gpa, length, flags) in enumerate(pieces, head):
            more = number < head + len(pieces) - 1
            packed = pack("<QIHH", gpa, length, flags | more, number + 1)
            self.poke(self.model.desc + 16 * number, packed)
        return head

    def _pieces(self, gpa: int, length: int, flags: int, usual: int) -> list[tuple[int, int, int]]:
        """Cut where Linux does, or anywhere."""
        random = self.random
        cuts = [usual] if 0 < usual < length else []
        if random.random() < 0.3:
            cuts = sorted(random.randrange(length + 1) for _ in range(random.randrange(4)))
        ends = [0, *cuts, length]
        return [(gpa + a, b - a, flags) for a, b in pairwise(ends)]


# ---- bugs to be found ----------------------------------------------------------------------------


def _no_bound(request: req.Request, sectors: int, block: int) -> int:
    return request.sector * 512


def _wraps(request: req.Request, sectors: int, block: int) -> int:
    """64 bits, as it would be in C."""
    offset = request.sector * 512 % (1 << 64)
    if (offset + request.length) % (1 << 64) > sectors * 512 or request.length % 512:
        raise req.Refused(req.S_IOERR, "")
    return offset


def _half_sectors(request: req.Request, sectors: int, block: int) -> int:
    if request.sector * 512 + request.length > sectors * 512:
        raise req.Refused(req.S_IOERR, "")
    return request.sector * 512


def _any_flags(*arguments: Any) -> list[tuple[int, int, bool]]:
    request, sectors = arguments[:2]
    request = req.Request(13, 0, request.data, request.length, request.status)
    masked = [pack("<QII", a, b, c & 1) for a, b, c in iter_unpack("<QII", b"".join(request.data))]
    request.data = [memoryview(b"".join(masked))]
    return _segments(request, sectors, *arguments[2:])


def _end_of_range(*arguments: Any) -> list[tuple[int, int, bool]]:
    """One sector beyond the end."""
    request, sectors = arguments[:2]
    return _segments(request, sectors + 1, *arguments[2:])


def _first_byte(self: Blk, queue: Any, chain: Any) -> int:
    """The status is not the last byte, but the first of the last buffer."""
    written = _one(self, queue, chain)
    last = chain.writable[-1]
    if last.nbytes > 1:
        last[0] = last[-1]
    return written


def _reads_twice(chain: Any) -> req.Request:
    """The length comes from the driver's own field, not from the chain."""
    request = _parse(chain)
    request.length += 1
    return request


def _no_answer(self: Blk, request: req.Request) -> int:
    raise GuestError("an unknown request")


def _stale_mode(self: Blk) -> None:
    """A reset leaves the cache mode of the driver before."""


_segments, _parse, _one = req.segments, req.parse, Blk._one

PLANTED: dict[str, tuple[Any, str, Any]] = {
    "a transfer is not compared with the capacity": (req, "check_transfer", _no_bound),
    "a sector times 512 wraps": (req, "check_transfer", _wraps),
    "half a sector is transferred": (req, "check_transfer", _half_sectors),
    "unknown flags of a range are ignored": (req, "segments", _any_flags),
    "a range may end a sector beyond the end": (req, "segments", _end_of_range),
    "the status is not the last byte": (Blk, "_one", _first_byte),
    "the length is not the chain's": (req, "parse", _reads_twice),
    "an unknown request breaks the device": (Blk, "_unsupported", _no_answer),
    "a reset leaves the cache mode": (Blk, "reset", _stale_mode),
    "what was not negotiated is done": (Blk, "_needs", lambda self, feature: None),
}
"""The module or class, what of it, and what takes its place."""
