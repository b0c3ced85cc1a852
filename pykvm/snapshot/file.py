"""Snapshots in files: a header that people can read, then memory with holes where it is zero.

::

    pykvm-snapshot 1 5231 8c5e…          version, bytes of JSON, their SHA-256
    { "id": …, "options": …, "vcpus": …, "devices": …, "memory": { "parts": [ … ] } }
    (up to a page boundary)
    memory: each region in full, its pages of zeros as holes of the file

The header is checked whole when a file is loaded. Memory has a CRC-32 for each MiB of what is
there, checked unless that is declined, and is mapped: a page comes from the disk when the guest
touches it.
A file with a ``base`` has the pages that differ from that file's, one after the other.

Whoever changes a file while it is mapped changes the guest's memory; who shortens it kills the
process (SIGBUS).
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from base64 import b64decode, b64encode

from pykvm._abi import ffi
from pykvm.errors import SnapshotError
from pykvm.memory.units import PAGE_SIZE
from pykvm.snapshot import atomic
from pykvm.snapshot import image as images
from pykvm.snapshot.image import Image, Part
from pykvm.snapshot.vcpu import STRUCTS, VcpuState
from pykvm.snapshot.vm import STRUCTS as VM_STRUCTS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

MAGIC = b"pykvm-snapshot"
VERSION = 1
CHUNK = 1 << 20
MOST_HEADER = 256 << 20
MOST_LINKS = 64
"""Files of a chain."""
MOST_PAGES = (1 << 31) - 1
"""Of a region: KVM takes no more in a slot (KVM_MEM_MAX_NR_PAGES of linux/kvm_host.h)."""
SENSELESS = (ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError)
"""What comes of a header in which something else is than should be."""

Header = dict[str, "Any"]


# ---- writing -----------------------------------------------------------------------------------


def save(header: Header, image: Image, path: str, base: tuple[str, str, Image] | None) -> None:
    """Write a snapshot; the file is there whole or not at all.

    Args:
        header: all but ``memory`` and ``base``.
        image: its memory.
        path: of the file.
        base: (path, id, memory) of a saved snapshot to write the difference from, or None.

    Raises:
        SnapshotError: the base's file is another snapshot's by now, or would be overwritten.
        OSError: it cannot be written.
    """
    if base is not None:
        _check_chain(path, base[0], base[1])
    with atomic.Replacing(path) as fd:
        _write(fd, header, image, path, base)


def _check_chain(path: str, below: str, expected: str) -> None:
    """SnapshotError if writing ``path`` took away a file of the chain that it is to build upon."""
    for _ in range(MOST_LINKS):
        if os.path.realpath(below) == os.path.realpath(path):
            raise SnapshotError(f"{path}: is a file that the snapshot builds upon")
        header = read_header(below)
        if header.get("id") != expected:
            raise SnapshotError(
                f"{below}: is the snapshot {header.get('id')}, and not {expected} any more"
            )
        base = header["base"]
        if base is None:
            return
        below, expected = _below(below, base)
    raise SnapshotError(f"{path}: the chain has more than {MOST_LINKS} files")


def read_header(path: str) -> Header:
    """The header of a file, checked.

    Raises:
        SnapshotError: it is no snapshot, or damaged.
        OSError: it cannot be read.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _header(fd, path)[0]
    finally:
        os.close(fd)


def _below(path: str, base: Header) -> tuple[str, str]:
    """The path and the id of what the file ``path`` is built upon."""
    return os.path.join(os.path.dirname(os.path.abspath(path)), str(base["path"])), str(base["id"])


def _write(
    fd: int, header: Header, image: Image, path: str, base: tuple[str, str, Image] | None
) -> None:
    parts: list[dict[str, Any]] = []
    offset = 0
    pages: list[Any] = [part.held for part in image.parts]
    if base is not None:
        pages = [bitmap for _, bitmap, _ in images.differing(base[2], image)]
    for part, bitmap in zip(image.parts, pages, strict=True):
        raw = ffi.buffer(bitmap)[:]
        there = _pack(raw)
        parts.append(
            {
                "slot": part.slot,
                "gpa": part.gpa,
                "size": part.size,
                "readonly": part.readonly,
                "name": part.name,
                "offset": offset,
                "pages": there,
                "held": there if base is None else _pack(ffi.buffer(part.held)[:]),
                "crc": list(_checksums(_data(image, part, bitmap))),
            }
        )
        count = int.from_bytes(raw, "little").bit_count()
        offset += part.size if base is None else count * PAGE_SIZE
    header = {**header, "base": None, "memory": {"parts": parts, "size": offset}}
    if base is not None:
        relative = os.path.relpath(base[0], os.path.dirname(os.path.abspath(path)))
        header["base"] = {"path": relative, "id": base[1]}
    text = _text(header)
    line = b"%s %d %d %s\n" % (MAGIC, VERSION, len(text), _digest(text))
    atomic.write_all(fd, line + text, 0)
    start = _start(len(line), len(text))
    os.ftruncate(fd, start + offset)
    for part, bitmap, said in zip(image.parts, pages, parts, strict=True):
        at = start + said["offset"]
        for first, data in _data(image, part, bitmap):
            if base is None:
                atomic.write_all(fd, data, at + first * PAGE_SIZE)
            else:
                atomic.write_all(fd, data, at)
                at += len(data)


def _text(header: Header) -> bytes:
    """The header as JSON; SnapshotError names the device whose state is none."""
    try:
        return json.dumps(header, indent=1).encode()
    except (TypeError, ValueError, RecursionError):
        for name, state in header["devices"].items():
            try:
                json.dumps(state)
            except (TypeError, ValueError, RecursionError) as error:
                raise SnapshotError(f"the state of the device at {name}: {error}") from error
        raise


def _start(line: int, text: int) -> int:
    return -(-(line + text) // PAGE_SIZE) * PAGE_SIZE


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest().encode()


def _pack(bitmap: bytes) -> str:
    """Up to the last page that is there, so that unused memory costs loading nothing."""
    return b64encode(zlib.compress(bitmap.rstrip(b"\0"), 1)).decode()


def _data(image: Image, part: Part, bitmap: Any) -> Iterator[tuple[int, bytes]]:
    """The pages of a bitmap, in pieces of a MiB at most: (first page, bytes)."""
    for first, count in part.runs(bitmap):
        for at in range(first, first + count, CHUNK // PAGE_SIZE):
            length = min(CHUNK // PAGE_SIZE, first + count - at)
            yield at, image.read(part.gpa + at * PAGE_SIZE, length * PAGE_SIZE)


def _checksums(data: Iterator[tuple[int, bytes]]) -> Iterator[int]:
    """A CRC-32 for every piece."""
    for _, piece in data:
        yield zlib.crc32(piece)


# ---- reading -----------------------------------------------------------------------------------


def load(path: str, verify: bool, links: int = 0, expected: str = "") -> tuple[Header, Image]:
    """Read a file and those that it builds upon.

    Raises:
        SnapshotError: why it is none, or not to be read.
        OSError: it cannot be opened.
    """
    if links >= MOST_LINKS:
        raise SnapshotError(f"{path}: the chain has more than {MOST_LINKS} files")
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        header, start = _header(fd, path)
        if expected and header.get("id") != expected:
            raise SnapshotError(
                f"{path}: is the snapshot {header.get('id')}, and {expected} was built upon"
            )
        try:
            parts, pages, crcs = _parts(header, start, os.fstat(fd).st_size)
            base = header["base"]
            if verify:
                _verify(fd, parts, pages, crcs, base is not None)
            if base is None:
                return header, Image(os.dup(fd), parts)
            below, identity = _below(path, base)
        except (*SENSELESS, zlib.error) as error:
            if isinstance(error, SnapshotError):
                raise SnapshotError(f"{path}: {error}") from None
            raise SnapshotError(f"{path}: the header does not make sense: {error!r}") from error
        try:
            _, image = load(below, verify, links + 1, identity)
        except OSError as error:
            raise SnapshotError(f"{path}: what it is built upon: {error}") from error
        return header, _patched(fd, path, image, parts, pages)
    finally:
        os.close(fd)


def _header(fd: int, path: str) -> tuple[Header, int]:
    head = os.pread(fd, 256, 0)
    line, newline, _ = head.partition(b"\n")
    words = line.split(b" ")
    if words[0] != MAGIC or not newline or len(words) < 2 or not words[1].isdigit():
        raise SnapshotError(f"{path}: is no snapshot of pykvm")
    if int(words[1]) != VERSION:
        raise SnapshotError(
            f"{path}: has version {int(words[1])} of the format, and this pykvm reads {VERSION}"
        )
    if len(words) != 4 or not words[2].isdigit() or not 0 < int(words[2]) <= MOST_HEADER:
        raise SnapshotError(f"{path}: is damaged: its first line")
    length = int(words[2])
    text = os.pread(fd, length, len(line) + 1)
    if len(text) != length:
        raise SnapshotError(f"{path}: is damaged: it ends within its header")
    if _digest(text) != words[3]:
        raise SnapshotError(f"{path}: is damaged: the header has another checksum")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SnapshotError(f"{path}: the header does not make sense: {error}") from error
    if not isinstance(header, dict):
        raise SnapshotError(f"{path}: the header does not make sense")
    return header, _start(len(line) + 1, length)


def _parts(header: Header, start: int, size: int) -> tuple[list[Part], list[Any], list[list[int]]]:
    """The regions, which pages of each are in the file, and their checksums."""
    parts, pages, crcs = [], [], []
    whole = header["base"] is None
    end, slots = 0, set[int]()
    for said in header["memory"]["parts"]:
        slot, gpa, length, offset = (_number(said[n]) for n in ("slot", "gpa", "size", "offset"))
        if slot >= 1 << 16 or slot in slots or gpa + length > 1 << 52 or not length:
            raise SnapshotError("is damaged: a region is nowhere in guest-physical memory")
        if gpa % PAGE_SIZE or length % PAGE_SIZE or offset % PAGE_SIZE or gpa < end:
            raise SnapshotError("is damaged: a region is not on page boundaries, or overlaps")
        end = gpa + length
        slots.add(slot)
        if length // PAGE_SIZE > MOST_PAGES:
            raise SnapshotError("is damaged: a region is larger than KVM takes")
        if whole and start + offset + length > size:
            raise SnapshotError("is damaged: it ends before its memory does")
        if length > 64 * size and length > 1 << 32 and not whole:
            raise SnapshotError("is damaged: a region is larger than any that it could describe")
        part = Part(slot, gpa, length, bool(said["readonly"]), str(said["name"]), start + offset)
        _unpack(said["held"], part.held)
        there = part.held
        if whole:
            if said["pages"] != said["held"]:
                raise SnapshotError("is damaged: pages that it holds are not there")
        else:
            there = ffi.new("uint64_t[]", part.words)
            _unpack(said["pages"], there)
            count = int.from_bytes(ffi.buffer(there)[:], "little").bit_count()
            if start + offset + count * PAGE_SIZE > size:
                raise SnapshotError("is damaged: it ends before its memory does")
        parts.append(part)
        pages.append(there)
        crcs.append([_number(crc) for crc in said["crc"]])
    return parts, pages, crcs


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 64:
        raise ValueError(f"{value!r} is no number here")
    return value


def _unpack(text: str, bitmap: Any) -> None:
    room = ffi.buffer(bitmap)
    unpacker = zlib.decompressobj()
    data = unpacker.decompress(b64decode(text, validate=True), len(room) + 1)
    if len(data) > len(room) or not unpacker.eof:
        raise SnapshotError("is damaged: a map of pages is not one of its region")
    room[: len(data)] = data


def _verify(
    fd: int,
    parts: list[Part],
    pages: list[Any],
    crcs: list[list[int]],
    packed: bool,
) -> None:
    for part, bitmap, expected in zip(parts, pages, crcs, strict=True):
        at, left = part.offset, iter(expected)
        for first, count in part.runs(bitmap):
            for page in range(first, first + count, CHUNK // PAGE_SIZE):
                size = min(CHUNK // PAGE_SIZE, first + count - page) * PAGE_SIZE
                offset = at if packed else part.offset + page * PAGE_SIZE
                data = os.pread(fd, size, offset)
                at += size
                if len(data) != size or zlib.crc32(data) != next(left, None):
                    gpa = part.gpa + page * PAGE_SIZE
                    raise SnapshotError(
                        f"is damaged: the memory at {gpa:#x}..{gpa + size:#x} has another checksum"
                    )


def _patched(fd: int, path: str, image: Image, parts: list[Part], pages: list[Any]) -> Image:
    """What the base has, with the pages of this file over it."""
    try:
        if [part.place for part in parts] != [part.place for part in image.parts]:
            raise SnapshotError(f"{path}: has another memory map than what it is built upon")
        under, *fds = _duplicates([image.fd, *(each[0] for each in image.patches), fd])
        patches = [(own, *each[1:]) for own, each in zip(fds, image.patches, strict=False)]
        patches += [(fds[-1], n, pages[n], part.offset) for n, part in enumerate(parts)]
        for part, below in zip(parts, image.parts, strict=True):
            part.offset = below.offset
        return Image(under, parts, patches)
    finally:
        image.close()


def _duplicates(fds: list[int]) -> list[int]:
    """Others of the same files: one of each file descriptor, or none."""
    made: list[int] = []
    try:
        for fd in fds:
            made.append(os.dup(fd))
    except OSError:
        for fd in made:
            os.close(fd)
        raise
    return made


# ---- state as text -------------------------------------------------------------------------------


def vcpu_to_json(state: VcpuState) -> dict[str, Any]:
    """The state of a vCPU as plain data."""
    return {
        "parts": {name: data.hex() for name, data in state.parts.items()},
        "msrs": {f"{index:#x}": value for index, value in state.msrs.items()},
        "tsc": state.tsc,
    }


def vcpu_of_json(said: dict[str, Any]) -> VcpuState:
    """Back from :func:`vcpu_to_json`."""
    parts = {name: bytes.fromhex(said["parts"][name]) for name in STRUCTS if name in said["parts"]}
    for name, data in parts.items():
        size = ffi.sizeof(STRUCTS[name][0])
        if len(data) < size or (len(data) > size and name not in ("xsave", "nested")):
            raise ValueError(f"{name} has {len(data)} bytes, not {size}")
    if "nested" in parts:  # the structure says how long it is, and KVM believes it
        size = int.from_bytes(parts["nested"][4:8], "little")
        if size > len(parts["nested"]):
            raise ValueError(f"nested state of {size} bytes has {len(parts['nested'])}")
    msrs = {_number(int(index, 16)): _number(value) for index, value in said["msrs"].items()}
    tsc = said["tsc"]
    return VcpuState(parts, msrs, None if tsc is None else (_number(tsc[0]), _number(tsc[1])))


def vm_of_json(said: dict[str, Any]) -> dict[str, bytes]:
    """The state of a VM."""
    return {name: bytes.fromhex(said[name]) for name in VM_STRUCTS if name in said}
