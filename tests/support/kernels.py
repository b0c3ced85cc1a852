"""Kernels made by hand: small ones, with every field where a test can reach it."""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct
from collections.abc import Callable, Sequence
from typing import Any

PREF = 0x200000
INIT_SIZE = 0x80000
MAGIC32 = struct.Struct("<I")


# -- ELF -----------------------------------------------------------------------------------------

_EHDR = {32: "<16sHHIIIIIHHHHHH", 64: "<16sHHIQQQIHHHHHH"}
_PHDR = {32: "<IIIIIIII", 64: "<IIQQQQQQ"}


def elf(
    segments: Sequence[tuple[int, bytes, int]],
    *,
    entry: int | None = None,
    bits: int = 64,
    notes: bytes = b"",
    align: int = 4,
    front: bytes = b"",
) -> bytes:
    """An executable. Segments are (p_paddr, bytes, p_memsz); ``front`` follows the headers."""
    count = len(segments) + bool(notes)
    at = struct.calcsize(_EHDR[bits]) + count * struct.calcsize(_PHDR[bits])
    body, table = bytearray(front), bytearray()  # bytes would be copied at every segment
    pieces = [(1, gpa, data, size) for gpa, data, size in segments]
    if notes:
        pieces.append((4, 0, notes, len(notes)))
    for kind, gpa, data, size in pieces:
        offset = at + len(body)
        if bits == 64:
            fields = (kind, 5, offset, gpa, gpa, len(data), size, align)
        else:
            fields = (kind, offset, gpa, gpa, len(data), size, 5, align)
        table += struct.pack(_PHDR[bits], *fields)
        body += data
    ident = b"\x7fELF" + bytes([bits // 32, 1, 1]) + bytes(9)
    start = segments[0][0] if entry is None else entry
    header = struct.pack(
        _EHDR[bits], ident, 2, {32: 3, 64: 62}[bits], 1, start, struct.calcsize(_EHDR[bits]), 0, 0,
        struct.calcsize(_EHDR[bits]), struct.calcsize(_PHDR[bits]), count, 0, 0, 0,
    )  # fmt: skip
    return header + table + body


def note(name: bytes, kind: int, value: bytes, align: int = 4) -> bytes:
    """One ELF note."""
    name += b"\0"
    made = struct.pack("<III", len(name), len(value), kind) + name
    made += bytes(-len(made) % align) + value
    return made + bytes(-len(made) % align)


def pvh_note(entry: int, size: int = 8) -> bytes:
    """The note that names the PVH entry."""
    return note(b"Xen", 18, entry.to_bytes(size, "little"))


# -- bzImage -------------------------------------------------------------------------------------

CODE = bytes(range(256)) * 16
DATA = b"\xd5" * 5000


def vmlinux(pvh: bool = True) -> bytes:
    """A kernel in two segments, with .bss, and zeros in the middle of its data."""
    data = DATA + bytes(0x28000) + b"end"
    segments = [(PREF, CODE, len(CODE)), (PREF + 0x10000, data, len(data) + 0x10000)]
    notes = note(b"Linux", 0x100, b"\0\0\0\0") + (pvh_note(PREF + 0x40) if pvh else b"")
    return elf(segments, notes=notes)


def lz4_legacy(data: bytes) -> bytes:
    """As ``lz4 -l`` packs: blocks of 8 MiB, each behind its length."""
    import lz4.block

    made = b"\x02\x21\x4c\x18"
    for at in range(0, len(data), 8 << 20):
        block = lz4.block.compress(data[at : at + (8 << 20)], store_size=False)
        made += MAGIC32.pack(len(block)) + block
    return made


def zstd(data: bytes) -> bytes:
    """As ``zstd`` packs a stream: the frame does not say how long its contents are."""
    import zstandard

    packer = zstandard.ZstdCompressor().compressobj()
    packed: bytes = packer.compress(data) + packer.flush()
    return packed


# Linux's build appends the size to all but gzip, which ends in it (scripts/Makefile.lib).
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda data: gzip.compress(data, mtime=0),
    "bzip2": lambda data: bz2.compress(data) + MAGIC32.pack(len(data)),
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE) + MAGIC32.pack(len(data)),
    "xz": lambda data: lzma.compress(data, check=lzma.CHECK_CRC32) + MAGIC32.pack(len(data)),
    "lz4": lambda data: lz4_legacy(data) + MAGIC32.pack(len(data)),
    "zstd": lambda data: zstd(data) + MAGIC32.pack(len(data)),
    "elf": lambda data: data,
}

#: name: (offset, format, what a good image has)
FIELDS: dict[str, tuple[int, str, int]] = {
    "setup_sects": (0x1F1, "<B", 3),
    "root_flags": (0x1F2, "<H", 1),
    "syssize": (0x1F4, "<I", 0),  # filled in
    "vid_mode": (0x1FA, "<H", 7),
    "boot_flag": (0x1FE, "<H", 0xAA55),
    "jump": (0x200, "<H", 0x6AEB),
    "header": (0x202, "<I", 0x53726448),
    "version": (0x206, "<H", 0x20F),
    "kernel_version": (0x20E, "<H", 0x300),
    "type_of_loader": (0x210, "<B", 0),
    "loadflags": (0x211, "<B", 0x83),
    "code32_start": (0x214, "<I", 0x100000),
    "heap_end_ptr": (0x224, "<H", 0x5555),
    "initrd_addr_max": (0x22C, "<I", 0x7FFFFFFF),
    "kernel_alignment": (0x230, "<I", 0x200000),
    "relocatable_kernel": (0x234, "<B", 1),
    "min_alignment": (0x235, "<B", 21),
    "xloadflags": (0x236, "<H", 0x7F),
    "cmdline_size": (0x238, "<I", 2047),
    "payload_offset": (0x248, "<I", 0x400),
    "payload_length": (0x24C, "<I", 0),  # filled in
    "setup_data": (0x250, "<Q", 0x1234),
    "pref_address": (0x258, "<Q", PREF),
    "init_size": (0x260, "<I", INIT_SIZE),
    "handover_offset": (0x264, "<I", 0x190),
    "kernel_info_offset": (0x268, "<I", 0x380),
}


def bzimage(
    payload: bytes | None = None, *, packed: str = "gzip", trailer: bytes = b"", **fields: Any
) -> bytes:
    """A bzImage around ``payload``, which by default is ``vmlinux()``, ``packed``."""
    if payload is None:
        payload = PACKERS[packed](vmlinux())
    code = b"\xcc" * 0x400 + payload
    code += bytes(-len(code) % 16)
    said = {name: value for name, (_, _, value) in FIELDS.items()}
    said |= {"syssize": len(code) // 16, "payload_length": len(payload), **fields}
    setup = bytearray(0x200 + 512 * (FIELDS["setup_sects"][2]))
    setup[0x1EF] = 0xFF  # the sentinel: who copies it copies too much
    for name, value in said.items():
        at, form, _ = FIELDS[name]
        struct.pack_into(form, setup, at, value)
    setup[0x500:0x520] = b"6.1.0-test (a@b) #1 SMP\0".ljust(32, b"x")
    return bytes(setup) + code + trailer


# -- multiboot -----------------------------------------------------------------------------------


def multiboot_header(flags: int = 0, *addresses: int) -> bytes:
    """magic, flags, checksum, and the addresses of bit 16."""
    total = 0x1BADB002 + flags
    return struct.pack("<III", 0x1BADB002, flags, -total & 0xFFFFFFFF) + struct.pack(
        f"<{len(addresses)}I", *addresses
    )


# -- memory --------------------------------------------------------------------------------------


class FakeRegion:
    """A region without memory behind it."""

    def __init__(self, gpa: int, size: int, readonly: bool = False) -> None:
        self.guest_phys_addr, self.memory_size, self.readonly = gpa, size, readonly


class FakeMemory:
    """Guest memory of any size, which keeps what is written and allows no write outside RAM.

    Attributes:
        writes: {gpa: bytes} in the order written.
        cleared: (gpa, length) that was filled with zeros.
    """

    def __init__(self, *regions: tuple[int, int]) -> None:
        self.regions = [FakeRegion(*region) for region in regions]
        self.writes: dict[int, bytes] = {}
        self.cleared: list[tuple[int, int]] = []

    def _check(self, gpa: int, length: int) -> None:
        end = gpa
        for region in self.regions:
            start = region.guest_phys_addr
            if not region.readonly and start <= end < start + region.memory_size:
                end = start + region.memory_size
        assert gpa + length <= end, f"a write outside RAM: {gpa:#x}+{length:#x}"

    def load(self, gpa: int, data: Any) -> None:
        self._check(gpa, len(data))
        self.writes[gpa] = bytes(data)

    def fill(self, gpa: int, length: int) -> None:
        self._check(gpa, length)
        self.cleared.append((gpa, length))

    @property
    def untouched(self) -> bool:
        return not self.writes and not self.cleared
