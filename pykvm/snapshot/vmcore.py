"""Memory and registers as an ELF core file, for gdb and drgn; and the way back.

A segment (PT_LOAD) for each region, with its guest-physical address as ``p_paddr``; ``p_vaddr`` is
the same, which is right for tiny guests; tools for kernels do not look at it. Notes: NT_PRSTATUS
("CORE") for each vCPU, from which gdb has general registers; QEMU's ("QEMU", type 0), which has
control registers as well, and is what the way back needs; of a Linux kernel its VMCOREINFO, without
which drgn refuses the file. Pages of zeros are holes.
"""

from __future__ import annotations

import os
import struct
from itertools import pairwise

from pykvm.errors import SnapshotError
from pykvm.memory.units import PAGE_SIZE
from pykvm.snapshot import atomic

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pykvm.snapshot.image import Image
    from pykvm.snapshot.vcpu import VcpuState

_EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
_PHDR = struct.Struct("<IIQQQQQQ")
_SEGMENT = struct.Struct("<IIIIQ")
_ET_CORE, _EM_X86_64, _PT_LOAD, _PT_NOTE = 4, 62, 1, 4
_NT_PRSTATUS, _NT_QEMU = 1, 0
_MOST_SEGMENTS = 4096
_MOST_NOTES = 16 << 20

PRSTATUS = (
    "r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi",
    "rdi", "orig_rax", "rip", "cs", "rflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs",
    "gs",
)  # fmt: skip
"""``user_regs_struct`` of x86-64 (sys/user.h), at offset 112 of ``struct elf_prstatus``."""
_BEFORE, _PRSTATUS_SIZE = 112, 336

QEMU_REGS = (
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8", "r9", "r10", "r11", "r12", "r13",
    "r14", "r15", "rip", "rflags",
)  # fmt: skip
QEMU_SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "ldt", "tr", "gdt", "idt")
"""QEMUCPUState, version 1 (target/i386/arch_dump.c), as tools read it."""
_CONTROL = ("cr0", "cr1", "cr2", "cr3", "cr4")


def dump(image: Image, vcpus: list[VcpuState], path: str) -> None:
    """Write a core file; it is there whole or not at all."""
    notes = b"".join(
        _note(b"CORE", _NT_PRSTATUS, _prstatus(number, state))
        + _note(b"QEMU", _NT_QEMU, _qemu(state))
        for number, state in enumerate(vcpus)
    )
    notes += _of_linux(image)
    headers = len(image.parts) + 1
    at = _EHDR.size + headers * _PHDR.size
    start = -(-(at + len(notes)) // PAGE_SIZE) * PAGE_SIZE
    table = [_PHDR.pack(_PT_NOTE, 0, at, 0, 0, len(notes), 0, 4)]
    places, offset = [], start
    for part in image.parts:
        flags = 4 | 1 | (0 if part.readonly else 2)
        table.append(
            _PHDR.pack(_PT_LOAD, flags, offset, part.gpa, part.gpa, part.size, part.size, PAGE_SIZE)
        )
        places.append(offset)
        offset += part.size
    ident = b"\x7fELF\2\1\1" + bytes(9)
    header = _EHDR.pack(
        ident, _ET_CORE, _EM_X86_64, 1, 0, _EHDR.size, 0, 0,
        _EHDR.size, _PHDR.size, headers, 0, 0, 0,
    )  # fmt: skip
    with atomic.Replacing(path) as fd:
        os.ftruncate(fd, offset)
        atomic.write_all(fd, header + b"".join(table) + notes, 0)
        for part, place in zip(image.parts, places, strict=True):
            for first, count in part.runs():
                for page in range(first, first + count, 256):
                    size = min(256, first + count - page) * PAGE_SIZE
                    data = image.read(part.gpa + page * PAGE_SIZE, size)
                    atomic.write_all(fd, data, place + page * PAGE_SIZE)


def _of_linux(image: Image) -> bytes:
    """The note VMCOREINFO that a Linux kernel keeps at the beginning of a page; b"" without one.

    Whoever opens the core file has from it where the kernel is and how its structures are laid out
    (admin-guide/kdump/vmcoreinfo.rst). It is the guest's word, and bounded here.
    """
    name = b"VMCOREINFO\0"
    for part in image.parts:
        for first, count in part.runs():
            for page in range(first, first + count, 256):
                size = min(256, first + count - page) * PAGE_SIZE
                data = image.read(part.gpa + page * PAGE_SIZE, size)
                at = data.find(name)
                while at >= 0:
                    start = page * PAGE_SIZE + at - 12
                    length, kind = struct.unpack_from("<II", data, at - 8) if at >= 12 else (0, 1)
                    fits = 0 < length <= PAGE_SIZE and start + 24 + length <= part.size
                    if at % PAGE_SIZE == 12 and not kind and fits:
                        found = image.read(part.gpa + start + 24, length)
                        if found.startswith(b"OSRELEASE="):
                            return _note(b"VMCOREINFO", 0, found)
                    at = data.find(name, at + 1)
    return b""


def _note(name: bytes, kind: int, value: bytes) -> bytes:
    name += b"\0"
    made = struct.pack("<III", len(name), len(value), kind) + name.ljust(
        -(-len(name) // 4) * 4, b"\0"
    )
    return made + value.ljust(-(-len(value) // 4) * 4, b"\0")


def _prstatus(number: int, state: VcpuState) -> bytes:
    regs, sregs = state.struct("regs"), state.struct("sregs")
    values = []
    for name in PRSTATUS:
        if name.endswith("_base"):
            values.append(getattr(sregs, name[:2]).base)
        elif name in ("cs", "ss", "ds", "es", "fs", "gs"):
            values.append(getattr(sregs, name).selector)
        else:
            values.append(0 if name == "orig_rax" else getattr(regs, name))
    made = bytearray(_PRSTATUS_SIZE)
    struct.pack_into("<I", made, 32, number + 1)  # pr_pid: threads are numbered from 1
    struct.pack_into(f"<{len(values)}Q", made, _BEFORE, *values)
    return bytes(made)


def _qemu(state: VcpuState) -> bytes:
    regs, sregs = state.struct("regs"), state.struct("sregs")
    body = struct.pack(f"<{len(QEMU_REGS)}Q", *(getattr(regs, name) for name in QEMU_REGS))
    for name in QEMU_SEGMENTS:
        segment = getattr(sregs, name)
        if name in ("gdt", "idt"):
            body += _SEGMENT.pack(0, segment.limit, 0, 0, segment.base)
        else:
            body += _SEGMENT.pack(segment.selector, segment.limit, _flags(segment), 0, segment.base)
    body += struct.pack("<5Q", sregs.cr0, 0, sregs.cr2, sregs.cr3, sregs.cr4)
    body += struct.pack("<Q", state.msrs.get(0xC0000102, 0))  # KERNEL_GS_BASE
    return struct.pack("<II", 1, 8 + len(body)) + body


def _flags(segment: Any) -> int:
    """Bits 8 to 23 of the descriptor's upper half, where QEMU keeps them."""
    return int(
        segment.type << 8
        | segment.s << 12
        | segment.dpl << 13
        | segment.present << 15
        | segment.avl << 20
        | segment.l << 21
        | segment.db << 22
        | segment.g << 23
    )


# ---- the way in --------------------------------------------------------------------------------


class Core:
    """What a core file has.

    Attributes:
        segments: of each part of memory (gpa, bytes in memory, offset in the file, bytes there).
        cpus: of each processor, registers by name; segments as (selector, limit, flags, base).
    """

    def __init__(
        self, segments: list[tuple[int, int, int, int]], cpus: list[dict[str, Any]]
    ) -> None:
        self.segments = segments
        self.cpus = cpus


def read(fd: int, path: str) -> Core:
    """Read the headers and notes of a core file.

    Raises:
        SnapshotError: it is none, or damaged: which field.
    """
    size = os.fstat(fd).st_size
    head = os.pread(fd, _EHDR.size, 0)
    if len(head) < _EHDR.size or head[:6] != b"\x7fELF\2\1":
        raise SnapshotError(f"{path}: is no 64-bit little-endian ELF file")
    _, kind, machine, _, _, phoff, _, _, _, phentsize, phnum, *_ = _EHDR.unpack(head)
    if (kind, machine) != (_ET_CORE, _EM_X86_64):
        raise SnapshotError(f"{path}: is no core file of x86-64 (type {kind}, machine {machine})")
    if phentsize != _PHDR.size or not 0 < phnum <= _MOST_SEGMENTS:
        raise SnapshotError(f"{path}: e_phnum is {phnum}, e_phentsize {phentsize}")
    table = os.pread(fd, phnum * _PHDR.size, phoff) if phoff < size else b""
    if len(table) != phnum * _PHDR.size:
        raise SnapshotError(f"{path}: its program headers are beyond its end")
    segments, cpus = [], []
    for kind, _, offset, _, paddr, filesz, memsz, _ in _PHDR.iter_unpack(table):
        if kind == _PT_LOAD and memsz:
            if filesz > memsz or offset + filesz > size or paddr + memsz > 1 << 52:
                raise SnapshotError(f"{path}: the segment at {paddr:#x} is not all in the file")
            segments.append((paddr, memsz, offset, filesz))
        elif kind == _PT_NOTE:
            if filesz > _MOST_NOTES or offset + filesz > size:
                raise SnapshotError(f"{path}: its notes are beyond its end")
            cpus += _notes(os.pread(fd, filesz, offset), path)
    segments.sort()
    for one, two in pairwise(segments):
        if one[0] + one[1] > two[0]:
            raise SnapshotError(f"{path}: the segments at {one[0]:#x} and {two[0]:#x} overlap")
    return Core(segments, cpus)


def _notes(data: bytes, path: str) -> list[dict[str, Any]]:
    """The registers of each processor: QEMU's notes if there are any, else NT_PRSTATUS."""
    found: dict[bytes, list[dict[str, Any]]] = {b"CORE": [], b"QEMU": []}
    at = 0
    while at + 12 <= len(data):
        namesz, descsz, kind = struct.unpack_from("<III", data, at)
        body = at + 12 + -(-namesz // 4) * 4
        if body + descsz > len(data):
            raise SnapshotError(f"{path}: a note is longer than its segment")
        name, value = data[at + 12 : at + 12 + namesz].rstrip(b"\0"), data[body : body + descsz]
        if name == b"CORE" and kind == _NT_PRSTATUS and len(value) >= _BEFORE + 8 * len(PRSTATUS):
            values = struct.unpack_from(f"<{len(PRSTATUS)}Q", value, _BEFORE)
            found[name].append(dict(zip(PRSTATUS, values, strict=True)))
        elif name == b"QEMU" and kind == _NT_QEMU and len(value) >= 8 + _QEMU_LEAST:
            found[name].append(_of_qemu(value))
        at = body + -(-descsz // 4) * 4
    return found[b"QEMU"] or found[b"CORE"]


_QEMU_LEAST = 8 * len(QEMU_REGS) + _SEGMENT.size * len(QEMU_SEGMENTS) + 8 * len(_CONTROL)


def _of_qemu(value: bytes) -> dict[str, Any]:
    registers: dict[str, Any] = dict(
        zip(QEMU_REGS, struct.unpack_from(f"<{len(QEMU_REGS)}Q", value, 8), strict=True)
    )
    at = 8 + 8 * len(QEMU_REGS)
    for name in QEMU_SEGMENTS:
        selector, limit, flags, _, base = _SEGMENT.unpack_from(value, at)
        registers[name] = selector, limit, flags, base
        at += _SEGMENT.size
    registers |= zip(_CONTROL, struct.unpack_from("<5Q", value, at), strict=True)
    return registers
