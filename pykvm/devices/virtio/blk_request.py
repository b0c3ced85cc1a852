"""What a driver asks of a block device: parsing, apart from doing it (virtio 1.2, 5.2.6).

Every word of the guest is read once, into Python's integers, which do not overflow; only then is it
looked at. The framing is free (2.7.4.1): the header may be spread over several descriptors, and the
status byte may end one that holds data.
"""

from __future__ import annotations

import struct

from pykvm.errors import GuestError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.devices.virtio.queue import Chain

SECTOR = 512

T_IN, T_OUT, T_FLUSH, T_GET_ID, T_DISCARD, T_WRITE_ZEROES = 0, 1, 4, 8, 11, 13
S_OK, S_IOERR, S_UNSUPP = 0, 1, 2

ID_BYTES = 20
MAX_TRANSFER = 64 << 20
"""The most bytes that one request moves. No driver that keeps to size_max and seg_max has more; one
that does not is told of an error, so that what one request costs the host stays bounded."""

FLAG_UNMAP = 1

_SENDS = (T_OUT, T_DISCARD, T_WRITE_ZEROES)
"""What has its data in the readable buffers."""

_HEADER = struct.Struct("<I4xQ")  # type, reserved, sector
_SEGMENT = struct.Struct("<QII")  # sector, number of sectors, flags


class Refused(Exception):
    """The request is answered with :attr:`status`, and nothing is done.

    Attributes:
        status: ``S_IOERR`` or ``S_UNSUPP``.
    """

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


class Request:
    """One request, taken apart but not checked.

    Attributes:
        type: ``T_IN``, …, or what else the driver wrote; -1 if there is no whole header.
        sector: where.
        data: for what goes to the device its readable bytes after the header, else its writable
            ones before the status.
        length: the bytes of ``data``.
        status: the view whose last byte is the status.
    """

    __slots__ = ("data", "length", "sector", "status", "type")

    def __init__(
        self, type: int, sector: int, data: list[memoryview], length: int, status: memoryview
    ) -> None:
        self.type = type
        self.sector = sector
        self.data = data
        self.length = length
        self.status = status

    def __repr__(self) -> str:
        return f"<Request type {self.type} sector {self.sector:#x} {self.length} bytes>"


def parse(chain: Chain) -> Request:
    """Take a chain apart.

    Raises:
        GuestError: there is no byte for the status, so the driver cannot even be told.
    """
    readable, writable = chain.readable, chain.writable
    if not writable:
        raise GuestError("a block request without a byte for its status (virtio 1.2, 5.2.6)")
    status = writable[-1]
    header_size = readable[0].nbytes if readable else 0
    if header_size == 16:  # what every driver does
        type, sector = _HEADER.unpack(readable[0])
        rest = readable[1:]
    elif chain.read_bytes < 16:
        return Request(-1, 0, [], 0, status)
    else:
        head, rest = _split(readable, 16)
        type, sector = _HEADER.unpack(b"".join(head))
    if type in _SENDS:
        return Request(type, sector, rest, chain.read_bytes - 16, status)
    data = writable[:-1]
    if status.nbytes > 1:
        data.append(status[:-1])
    return Request(type, sector, data, chain.write_bytes - 1, status)


def _split(views: list[memoryview], at: int) -> tuple[list[memoryview], list[memoryview]]:
    """What comes before byte ``at``, and what after."""
    head: list[memoryview] = []
    for index, view in enumerate(views):
        if view.nbytes > at:
            if at:
                head.append(view[:at])
            return head, [view[at:] if at else view, *views[index + 1 :]]
        head.append(view)
        at -= view.nbytes
    return head, []


def check_transfer(request: Request, sectors: int, block: int) -> int:
    """The offset of a read or write, if all of it is on the disk.

    Args:
        request: one of ``T_IN`` or ``T_OUT``.
        sectors: the disk's capacity.
        block: its logical block size in bytes; like a disk's it is the least that is transferred.

    Raises:
        Refused: too long, beyond the end, or no whole number of blocks.
    """
    length = request.length
    offset = request.sector * SECTOR
    if offset + length > sectors * SECTOR or length > MAX_TRANSFER or (offset | length) % block:
        raise Refused(
            S_IOERR, f"{length} bytes at sector {request.sector} of {sectors}, blocks of {block}"
        )
    return offset


def segments(
    request: Request, sectors: int, max_segments: int, max_sectors: int
) -> list[tuple[int, int, bool]]:
    """The ranges of a discard or write-zeroes request: (offset, length, unmap), in bytes.

    All of them are checked before any is returned, so a request is not done in part.

    Raises:
        Refused: too many, too long, beyond the end, or flags that there are not.
    """
    length = request.length
    if not length or length % _SEGMENT.size or length > max_segments * _SEGMENT.size:
        raise Refused(S_IOERR, f"{length} bytes are not 1 to {max_segments} segments of 16")
    known = FLAG_UNMAP if request.type == T_WRITE_ZEROES else 0
    found = []
    for sector, count, flags in _SEGMENT.iter_unpack(b"".join(request.data)):
        if flags & ~known:
            raise Refused(S_UNSUPP, f"flags {flags:#x}")
        if count > max_sectors or sector + count > sectors:
            raise Refused(S_IOERR, f"{count} sectors at {sector} of {sectors}")
        if count:
            found.append((sector * SECTOR, count * SECTOR, bool(flags & FLAG_UNMAP)))
    return found
