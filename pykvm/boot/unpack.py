"""Unpack a bzImage's payload on the host, bounded in memory and time whatever the payload says.

zlib, bz2 and lzma come with Python, ``compression.zstd`` with Python 3.14; LZ4 takes the lz4
package, Zstandard on an older Python the zstandard package. A format without its library, and LZO,
are no error: the image can unpack itself, and ``can_unpack`` says so beforehand.
"""

from __future__ import annotations

import mmap

from pykvm.errors import BootError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    Stream = Callable[[memoryview, int], Iterator[bytes]]
    Errors = tuple[type[Exception], ...]

# The magic numbers of Linux/x86 boot protocol, payload_offset, and scripts/extract-vmlinux.
_MAGIC = (
    (b"\x1f\x8b", "gzip"),
    (b"BZh", "bzip2"),
    (b"\x5d\0\0", "lzma"),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x89LZO", "lzo"),
    (b"\x02\x21\x4c\x18", "lz4"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\x7fELF", "elf"),
)

QUICK = ("lz4", "elf")
"""Formats that are unpacked about as fast as a digest of them is made."""

_PIECE = 1 << 16
_MEMORY = 256 << 20
"""What a decoder may take for itself. Linux's windows are 128 MiB at most (zstd -22)."""
_WINDOW_LOG = 27
_LZ4_BLOCK = 8 << 20  # the legacy frame's block size, fixed
_LZ4_MAGIC = 0x184C2102


class MissingLibrary(Exception):
    """No library for this format is installed; the message says which."""


def identify(payload: memoryview) -> str:
    """Name the payload's format by its first bytes, or ``""``."""
    head = bytes(payload[:8])
    return next((name for magic, name in _MAGIC if head.startswith(magic)), "")


def can_unpack(name: str) -> str:
    """Say what keeps this format from being unpacked here, or ``""`` if nothing does."""
    opener = _OPENERS.get(name)
    if opener is None:
        return f"no library here unpacks {name}" if name else "the payload's format is unknown"
    try:
        opener()
    except MissingLibrary as error:
        return str(error)
    return ""


def unpack(payload: memoryview, name: str, size: int) -> memoryview:
    """Unpack ``payload`` of format ``name`` into ``size`` bytes: no more, no fewer.

    What follows the packed stream (the kernel's build appends the size) is ignored. The result lies
    in memory that the host has filled only where it is not zero.

    Raises:
        BootError: corrupt, truncated, or of another size.
        MissingLibrary: see ``can_unpack``.
    """
    stream, errors = _OPENERS[name]()
    target = mmap.mmap(-1, max(size, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    target.madvise(mmap.MADV_HUGEPAGE)
    done = 0
    try:
        for chunk in stream(payload, size):
            if done + len(chunk) > size:
                raise _bad(name, f"{size} bytes when unpacked (its last word)", "more")
            target[done : done + len(chunk)] = chunk
            done += len(chunk)
    except errors as error:
        raise _bad(name, "intact data", f"an error at {done} bytes of output: {error}") from error
    if done != size:
        raise _bad(name, f"{size} bytes when unpacked (its last word)", f"{done}")
    return memoryview(target)[:size]


def _incremental(make: Callable[[], Any]) -> Stream:
    """A stream by a decompressor object as the standard library has them."""

    def stream(payload: memoryview, size: int) -> Iterator[bytes]:
        decoder = make()
        room = size
        for start in range(0, len(payload), _PIECE):
            # One byte more than fits: enough to tell that it is too much.
            chunk = decoder.decompress(payload[start : start + _PIECE], room + 1)
            yield chunk
            room -= len(chunk)
            if decoder.eof:
                return
        raise ValueError("the packed stream is cut off")

    return stream


def _gzip() -> tuple[Stream, Errors]:
    import zlib

    return _incremental(lambda: zlib.decompressobj(16 + zlib.MAX_WBITS)), (zlib.error, ValueError)


def _bzip2() -> tuple[Stream, Errors]:
    try:
        import bz2
    except ImportError as error:  # a Python built without it
        raise MissingLibrary("this Python has no bz2 module") from error
    return _incremental(bz2.BZ2Decompressor), (OSError, ValueError)


def _lzma(container: str) -> Callable[[], tuple[Stream, Errors]]:
    def opener() -> tuple[Stream, Errors]:
        try:
            import lzma
        except ImportError as error:
            raise MissingLibrary("this Python has no lzma module") from error
        kind = getattr(lzma, container)
        return _incremental(lambda: lzma.LZMADecompressor(kind, _MEMORY)), (
            lzma.LZMAError,
            ValueError,
        )

    return opener


def _lz4() -> tuple[Stream, Errors]:
    try:
        import lz4.block
    except ImportError as error:
        raise MissingLibrary("lz4 needs a package: pip install lz4") from error
    decompress = lz4.block.decompress

    def stream(payload: memoryview, size: int) -> Iterator[bytes]:
        """Blocks of 8 MiB, each behind its packed length; the last one may be shorter."""
        at, end = 4, len(payload) - 4  # nothing but the size behind tells where the last one ends
        while at < end:
            length = int.from_bytes(payload[at : at + 4], "little")
            at += 4
            if length == _LZ4_MAGIC:  # another frame
                continue
            if not length or at + length > end:
                raise ValueError(f"a block of {length} bytes in the {end - at} that are left")
            block = decompress(payload[at : at + length], uncompressed_size=_LZ4_BLOCK)
            if not block:
                raise ValueError("an empty block")
            yield block
            at += length

    return stream, (lz4.block.LZ4BlockError, ValueError)


def _zstd() -> tuple[Stream, Errors]:
    try:
        from compression import zstd  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return _zstandard()
    options = {zstd.DecompressionParameter.window_log_max: _WINDOW_LOG}
    return _incremental(lambda: zstd.ZstdDecompressor(options=options)), (
        zstd.ZstdError,
        ValueError,
    )


def _zstandard() -> tuple[Stream, Errors]:
    try:
        import zstandard
    except ImportError as error:
        raise MissingLibrary("zstd needs a package: pip install zstandard") from error

    def stream(payload: memoryview, size: int) -> Iterator[bytes]:
        decoder = zstandard.ZstdDecompressor(max_window_size=1 << _WINDOW_LOG)
        # The reader takes what follows the frame for another one: leave the size off.
        with decoder.stream_reader(payload[:-4]) as reader:
            while chunk := reader.read(1 << 20):
                yield chunk

    return stream, (zstandard.ZstdError,)


def _elf() -> tuple[Stream, Errors]:
    return lambda payload, size: iter((bytes(payload),)), ()


_OPENERS: dict[str, Callable[[], tuple[Stream, Errors]]] = {
    "gzip": _gzip,
    "bzip2": _bzip2,
    "lzma": _lzma("FORMAT_ALONE"),
    "xz": _lzma("FORMAT_XZ"),
    "lz4": _lz4,
    "zstd": _zstd,
    "elf": _elf,
}


def _bad(name: str, expected: str, found: str) -> BootError:
    return BootError(f"bzImage: payload ({name}): expected {expected}, found {found}")
