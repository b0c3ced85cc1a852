"""Multiboot 1: a kernel in 32-bit protected mode, with modules and a memory map.

An image says in a header within its first 8 KiB what it wants. It is an ELF file, ELF32 as a rule
(an ELF64 whose addresses fit is taken too: its first instructions are 32-bit code then), or
anything at all if the header itself has the addresses. The specification is the Multiboot
Specification, version 0.6.96.
"""

from __future__ import annotations

import struct

from pykvm.boot import elf, layout
from pykvm.boot.image import Image, from_elf, nonzero
from pykvm.errors import BootError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.boot.job import Job

_MAGIC = 0x1BADB002
BOOTLOADER_MAGIC = 0x2BADB002
"""In EAX: the kernel was loaded by multiboot."""
_SEARCH = 8192
_HEADER = struct.Struct("<III")  # magic, flags, checksum
_ADDRESSES = struct.Struct("<IIIII")  # header, load, load_end, bss_end, entry
_ADDRESSES_AT = 12

# Header flags: 0-15 must be understood, 16-31 need not.
_PAGE_ALIGN, _MEMORY_INFO, _HAS_ADDRESSES = 1, 2, 1 << 16
_KNOWN = _PAGE_ALIGN | _MEMORY_INFO

# Info flags: which of the fields are there.
_MEM, _CMDLINE, _MODS, _MMAP, _NAME = 1, 1 << 2, 1 << 3, 1 << 6, 1 << 9
_INFO_SIZE = 120  # all of it, the frame buffer's fields too: some kernels copy it whole
# flags, mem_lower, mem_upper, boot_device, cmdline, mods_count, mods_addr
_INFO_HEAD = struct.Struct("<IIIIIII")
_MMAP_AT = 44  # mmap_length, mmap_addr
_NAME_AT = 64  # boot_loader_name
_MODULE = struct.Struct("<IIII")  # start, end, string, reserved
_MMAP_ENTRY = struct.Struct("<IQQI")  # bytes that follow, base, length, type
_LOADER = b"pykvm\0"

_4GIB = 1 << 32
_KIB = 1024


def find_header(data: memoryview) -> int | None:
    """Offset of the header, or None: magic, flags and a checksum that makes their sum 0."""
    head = bytes(data[:_SEARCH])
    at = -1
    while (at := head.find(_MAGIC.to_bytes(4, "little"), at + 1)) >= 0:
        whole = at % 4 == 0 and at + _HEADER.size <= len(head)
        if whole and sum(_HEADER.unpack_from(head, at)) % _4GIB == 0:
            return at
    return None


def read(data: memoryview, at: int) -> tuple[Image, elf.ElfImage | None]:
    """The image as its header at ``at`` describes it, and the ELF file if it is one.

    Raises:
        BootError: it asks for what there is not, or its addresses or the ELF file are wrong.
    """
    _, flags, _ = _HEADER.unpack_from(data, at)
    unknown = flags & 0xFFFF & ~_KNOWN
    if unknown:
        wants = " (bit 2: a video mode)" if unknown & 4 else ""
        expected = "none of bits 2 to 15, which ask for what there is not"
        raise _bad("flags", expected, f"{flags:#x}{wants}")
    if flags & _HAS_ADDRESSES:
        return _by_addresses(data, at), None
    if not elf.is_elf(data):
        expected = "bit 16 (addresses in the header) in a file that is not ELF"
        raise _bad("flags", expected, f"{flags:#x}")
    parsed = elf.parse(data)
    if parsed.segments[-1].end > _4GIB:
        raise _bad("p_paddr", "segments below 4 GiB", f"an end at {parsed.segments[-1].end:#x}")
    return from_elf(parsed), parsed


def _by_addresses(data: memoryview, at: int) -> Image:
    """One piece of the file to one address, zeros behind it."""
    if len(data) < at + _ADDRESSES_AT + _ADDRESSES.size:
        raise _bad("the header", "32 bytes with its addresses", f"{len(data) - at}")
    fields = _ADDRESSES.unpack_from(data, at + _ADDRESSES_AT)
    header, load, load_end, bss_end, entry = fields
    offset = at - (header - load)
    if header < load or offset < 0:
        expected = f"load_addr ({load:#x}) to load_addr + {at:#x}, the header's own offset"
        raise _bad("header_addr", expected, f"{header:#x}")
    load_end = load_end or load + len(data) - offset
    if not load < load_end <= load + len(data) - offset:
        expected = f"an end within the file, {load + 1:#x}..{load + len(data) - offset:#x}"
        raise _bad("load_end_addr", expected, f"{load_end:#x}")
    bss_end = bss_end or load_end
    if not load_end <= bss_end <= _4GIB:
        raise _bad("bss_end_addr", f"at least load_end_addr ({load_end:#x})", f"{bss_end:#x}")
    if not load <= entry < bss_end:
        raise _bad("entry_addr", f"{load:#x}..{bss_end - 1:#x}", f"{entry:#x}")
    runs = nonzero(load, data[offset : offset + load_end - load])
    return Image(entry, None, [(load, bss_end - load)], list(runs))


def start(job: Job, kernel: Image) -> None:
    """Place a kernel where it says, and what it is told where there is room.

    Raises:
        BootError: something does not fit.
    """
    from pykvm.arch.x86_64 import layout as cpu

    plan, placement = job.plan, job.placement
    kernel.claim(placement, "the kernel")
    plan.tables = layout.CPU_TABLES
    if placement.is_free(cpu.GDT, cpu.END - cpu.GDT):
        placement.claim(cpu.GDT, cpu.END - cpu.GDT, "the processor's tables")
    else:
        plan.tables = placement.lowest(cpu.END, "the processor's tables", layout.PAGE)
    _put_bios_data(job)
    for module in job.modules:
        size = max(len(module.data), 1)
        gpa = placement.highest(size, "a module", start=layout.HIGH_MEMORY)
        placement.put(gpa, module.data)
        plan.modules.append((gpa, len(module.data)))
    plan.initrd = plan.modules[0] if plan.modules else None

    line = job.name.encode("utf-8", "surrogateescape") + b" " + plan.cmdline
    plan.cmdline = line.rstrip(b" ")
    job.check_cmdline(layout.CMDLINE_SIZE - 1)
    gpa = layout.MULTIBOOT_INFO
    size = len(_info(job, 0))
    if placement.is_free(gpa, size):
        placement.claim(gpa, size, "multiboot's info block")
    else:
        gpa = placement.lowest(size, "multiboot's info block", layout.PAGE)
    placement.put(gpa, _info(job, gpa))

    plan.protocol, plan.mode, plan.entry = "multiboot", "prot32", kernel.entry
    plan.info_gpa = gpa
    plan.registers = {"rax": BOOTLOADER_MAGIC, "rbx": gpa}
    plan.kernel = kernel.start, kernel.end - kernel.start


def _put_bios_data(job: Job) -> None:
    """Say where conventional memory ends, to kernels that ask the BIOS data area (see layout)."""
    from pykvm.boot.e820 import ram_below

    whole = ram_below(job.plan.e820, 0) >= layout.EBDA
    if whole and job.placement.is_free(layout.BIOS_DATA, layout.BIOS_DATA_SIZE):
        job.placement.claim(layout.BIOS_DATA, layout.BIOS_DATA_SIZE, "the BIOS data area")
        job.placement.put(layout.BDA_EBDA, (layout.EBDA >> 4).to_bytes(2, "little"))
        job.placement.put(layout.BDA_MEMORY, (layout.EBDA // _KIB).to_bytes(2, "little"))


def _info(job: Job, gpa: int) -> bytes:
    """The info block as it lies at ``gpa``, with all it points to; and note where the parts are."""
    from pykvm.boot.e820 import ram_below

    plan = job.plan
    mmap = b"".join(
        _MMAP_ENTRY.pack(_MMAP_ENTRY.size - 4, entry.base, entry.size, entry.type)
        for entry in plan.e820
    )
    mods_at = gpa + _INFO_SIZE
    mmap_at = mods_at + _MODULE.size * len(plan.modules)
    plan.cmdline_gpa = mmap_at + len(mmap)
    strings = plan.cmdline + b"\0"
    mods = b""
    for (start, length), module in zip(plan.modules, job.modules, strict=True):
        at = plan.cmdline_gpa + len(strings)
        mods += _MODULE.pack(start, start + length, at, 0)
        strings += module.path.encode("utf-8", "surrogateescape") + b"\0"
    name_at = plan.cmdline_gpa + len(strings)

    info = bytearray(_INFO_SIZE)
    lower = min(ram_below(plan.e820, 0), layout.VGA)
    upper = min(ram_below(plan.e820, layout.HIGH_MEMORY), _4GIB - layout.HIGH_MEMORY)
    flags = _MEM | _CMDLINE | _MMAP | _NAME | (_MODS if mods else 0)
    _INFO_HEAD.pack_into(
        info, 0, flags, lower // _KIB, upper // _KIB, 0, plan.cmdline_gpa,
        len(plan.modules), mods_at if mods else 0,
    )  # fmt: skip
    struct.pack_into("<II", info, _MMAP_AT, len(mmap), mmap_at)
    struct.pack_into("<I", info, _NAME_AT, name_at)
    return bytes(info) + mods + mmap + strings + _LOADER


def _bad(field: str, expected: str, found: str) -> BootError:
    return BootError(f"multiboot: {field}: expected {expected}, found {found}")
