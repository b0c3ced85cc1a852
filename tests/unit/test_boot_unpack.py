"""Unpacking payloads: every format whole, and none beyond its bounds."""

from __future__ import annotations

import builtins
import bz2
import functools
import gzip
import lzma
import random
import shutil
import struct
import subprocess
import sys
import time
from typing import Any

import pytest

from pykvm.boot import unpack
from pykvm.errors import BootError
from tests.support.kernels import PACKERS, lz4_legacy, zstd

PACKED = [name for name in PACKERS if name != "elf"]
# Not one block only in any format, and with much that can be packed.
DATA = random.Random(1).randbytes(300_000) + bytes(9 << 20) + random.Random(2).randbytes(70_000)


@functools.cache
def packed(name: str) -> bytes:
    """DATA in a format, packed once."""
    return PACKERS[name](DATA)


def unpacked(payload: bytes, size: int) -> bytes:
    view = memoryview(payload)
    return bytes(unpack.unpack(view, unpack.identify(view), size))


@pytest.mark.parametrize("name", PACKED)
def test_every_format_comes_out_as_it_went_in(name: str) -> None:
    payload = packed(name)
    assert unpack.identify(memoryview(payload)) == name
    assert unpack.can_unpack(name) == ""
    assert unpacked(payload, len(DATA)) == DATA


# As Linux's build calls them (scripts/Makefile.lib, scripts/xz_wrap.sh).
COMMANDS = {
    "gzip": ["gzip", "-n", "-9"],
    "bzip2": ["bzip2", "-9"],
    "lzma": ["xz", "--format=lzma", "-9"],
    "xz": ["xz", "--check=crc32", "--x86", "--lzma2=dict=32MiB"],
    "lz4": ["lz4", "-l", "-9", "-", "-"],
    "zstd": ["zstd", "-22", "--ultra"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_what_linux_is_packed_with_can_be_unpacked(name: str) -> None:
    command = COMMANDS[name]
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run(command, input=DATA, capture_output=True, check=True, timeout=100)
    packed = done.stdout
    if name != "gzip":
        packed += struct.pack("<I", len(DATA))
    assert unpack.identify(memoryview(packed)) == name
    assert unpacked(packed, len(DATA)) == DATA


def test_an_unknown_format_is_none() -> None:
    assert unpack.identify(memoryview(b"")) == ""
    assert unpack.identify(memoryview(b"\x1f")) == ""
    assert unpack.identify(memoryview(b"MZ\x90\0")) == ""
    assert unpack.can_unpack("") == "the payload's format is unknown"
    assert unpack.can_unpack("lzo") == "no library here unpacks lzo"


@pytest.mark.parametrize(
    ("name", "module", "message"),
    [
        ("lz4", "lz4.block", "lz4 needs a package: pip install lz4"),
        ("zstd", "zstandard", "zstd needs a package: pip install zstandard"),
        ("xz", "lzma", "this Python has no lzma module"),
        ("lzma", "lzma", "this Python has no lzma module"),
        ("bzip2", "bz2", "this Python has no bz2 module"),
    ],
)
def test_a_missing_library_is_said_beforehand(
    monkeypatch: pytest.MonkeyPatch, name: str, module: str, message: str
) -> None:
    real = builtins.__import__

    def without(wanted: str, *rest: Any) -> Any:
        if wanted in (module, "compression"):
            raise ImportError(wanted)
        return real(wanted, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert unpack.can_unpack(name) == message


@pytest.mark.parametrize("name", PACKED)
def test_more_than_announced_is_refused(name: str) -> None:
    size = len(DATA) - 1
    with pytest.raises(
        BootError, match=rf"payload \({name}\): expected {size} bytes .* found more"
    ):
        unpacked(packed(name), size)


@pytest.mark.parametrize("name", PACKED)
def test_less_than_announced_is_refused(name: str) -> None:
    size = len(DATA) + 1
    with pytest.raises(BootError, match=rf"\({name}\): expected {size} bytes .* found {size - 1}"):
        unpacked(packed(name), size)


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("part", [0.1, 0.5, 0.999])
def test_a_payload_that_is_cut_off_is_refused(name: str, part: float) -> None:
    payload = packed(name)
    with pytest.raises(BootError, match=rf"payload \({name}\): expected"):
        unpacked(payload[: int(len(payload) * part)], len(DATA))


@pytest.mark.parametrize("name", PACKED)
def test_damage_in_the_middle_never_goes_unnoticed_where_the_format_has_a_checksum(
    name: str,
) -> None:
    payload = bytearray(packed(name))
    payload[len(payload) // 3] ^= 0x10
    try:
        found = unpacked(bytes(payload), len(DATA))
    except BootError as error:
        assert f"payload ({name}): expected" in str(error)
    else:
        assert name in ("lz4", "lzma", "zstd") and found != DATA, "formats without a checksum"


@pytest.mark.parametrize(
    "payload",
    [
        b"\x02\x21\x4c\x18",
        b"\x02\x21\x4c\x18" + struct.pack("<I", 0) + bytes(100),
        b"\x02\x21\x4c\x18" + struct.pack("<I", 1 << 31) + bytes(100),
        b"\x02\x21\x4c\x18" * 50_000,
        b"\x02\x21\x4c\x18" + (struct.pack("<I", 1) + b"\0") * 1000,
        lz4_legacy(b"x" * 1000)[:-1],
    ],
)
def test_lz4_blocks_that_make_no_sense_are_refused(payload: bytes) -> None:
    with pytest.raises(BootError, match=r"payload \(lz4\): expected"):
        unpacked(payload + bytes(4), 1000)


def test_lz4_frames_may_follow_each_other() -> None:
    frames = lz4_legacy(b"a" * 100) + lz4_legacy(b"b" * 100) + bytes(4)
    assert unpacked(frames, 200) == b"a" * 100 + b"b" * 100


# What packs best in each format: the largest claims from the fewest bytes.
BOMBS = {
    "gzip": lambda: gzip.compress(bytes(64 << 20), 9),
    "bzip2": lambda: bz2.compress(bytes(64 << 20)),
    "xz": lambda: lzma.compress(bytes(64 << 20), preset=0),
    "lzma": lambda: lzma.compress(bytes(64 << 20), lzma.FORMAT_ALONE, preset=0),
    "lz4": lambda: lz4_legacy(bytes(64 << 20)),
    "zstd": lambda: zstd(bytes(64 << 20)),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_given_up_as_soon_as_it_is_too_large(name: str) -> None:
    payload = BOMBS[name]() + bytes(4)
    script = (
        "import sys, resource\n"
        "from pykvm.boot import unpack\n"
        "from pykvm.errors import BootError\n"
        "payload = memoryview(sys.stdin.buffer.read())\n"
        f"unpack.can_unpack({name!r})\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n"
        f"    unpack.unpack(payload, {name!r}, 1 << 20)\n"
        "except BootError as error:\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, error)\n"
    )
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=payload,
        capture_output=True,
        check=True,
        timeout=100,
    )
    kib, _, message = done.stdout.decode().partition(" ")
    assert message.strip().endswith("found more")
    assert int(kib) < 32 << 10, "KiB more than before"
    assert time.monotonic() - started < 20


def test_a_window_that_would_take_gigabytes_is_refused() -> None:
    # .lzma: properties, dictionary size, unpacked size (unknown)
    huge = b"\x5d" + struct.pack("<I", 0xC0000000) + b"\xff" * 8 + bytes(100)
    assert unpack.identify(memoryview(b"\x5d\0\0" + huge[3:])) == "lzma"
    with pytest.raises(BootError, match=r"payload \(lzma\): expected intact data, found .*limit"):
        unpack.unpack(memoryview(huge), "lzma", 1000)
    # zstd: a frame with a window of 1 GiB, then a raw block
    frame = b"\x28\xb5\x2f\xfd" + bytes([0, 20 << 3, 1 | 4 << 3, 0, 0]) + b"data" + bytes(4)
    with pytest.raises(BootError, match=r"payload \(zstd\): expected intact data, found"):
        unpacked(frame, 4)


def test_nothing_packed_is_nothing() -> None:
    assert unpacked(PACKERS["gzip"](b""), 0) == b""
