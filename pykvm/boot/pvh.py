"""PVH: the entry that a Xen note names, in 32-bit protected mode, with a ``struct hvm_start_info``.

Any kernel may have one: Linux (CONFIG_PVH), FreeBSD, unikernels. The interface is Xen's
(xen/include/public/arch-x86/hvm/start_info.h, docs/misc/pvh.pandoc); nothing of Xen is needed.
"""

from __future__ import annotations

import struct

from pykvm.boot import elf, layout
from pykvm.errors import BootError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.boot.image import Image
    from pykvm.boot.job import Job

_NOTE_NAME, _PHYS32_ENTRY = b"Xen", 18
_MAGIC = 0x336EC578  # "xEn3", bit 7 of the E set
_VERSION = 1  # the first with a memory map
# magic, version, flags, nr_modules, modlist, cmdline, rsdp, memmap, memmap_entries, reserved
_START_INFO = struct.Struct("<IIIIQQQQII")
_MODULE = struct.Struct("<QQQQ")  # paddr, size, cmdline_paddr, reserved
_MEMMAP = struct.Struct("<QQII")  # addr, size, type, reserved
_CMDLINE_SIZE = 2047  # Linux's; the interface sets none
_E820_MAX = 127  # Linux adds one, and has room for 128


def find_entry(image: elf.ElfImage) -> int | None:
    """The entry that the note names, or None without one.

    Raises:
        BootError: a malformed note, or an entry outside the image.
    """
    for name, kind, value in image.notes():
        if (name, kind) != (_NOTE_NAME, _PHYS32_ENTRY):
            continue
        if len(value) not in (4, 8):
            raise _bad("XEN_ELFNOTE_PHYS32_ENTRY", "4 or 8 bytes", str(len(value)))
        entry = int.from_bytes(value, "little")
        if not any(segment.gpa <= entry < segment.end for segment in image.segments):
            expected = "an address in a PT_LOAD segment"
            raise _bad("XEN_ELFNOTE_PHYS32_ENTRY", expected, f"{entry:#x}")
        return entry
    return None


def start(job: Job, kernel: Image, span: tuple[int, int], initrd_limit: int) -> None:
    """Place a kernel, and what it is told.

    Raises:
        BootError: no note, or something does not fit.
    """
    plan, placement = job.plan, job.placement
    if kernel.pvh_entry is None:
        raise _bad("notes", "XEN_ELFNOTE_PHYS32_ENTRY (18), the PVH entry", "none")
    if span[1] > 1 << 32:
        raise _bad("p_paddr", "segments below 4 GiB", f"an end at {span[1]:#x}")
    if len(plan.e820) > _E820_MAX:
        raise BootError(
            f"PVH memory map: expected at most {_E820_MAX} entries, found {len(plan.e820)}"
        )
    job.reserve_low_memory()
    placement.claim(span[0], span[1] - span[0], "the kernel")
    kernel.place(placement)
    job.put_cmdline(_CMDLINE_SIZE)
    job.put_initrd(initrd_limit)

    info = layout.PVH_INFO
    memmap = b"".join(_MEMMAP.pack(*entry, 0) for entry in plan.e820)
    modules = _MODULE.pack(*plan.initrd, 0, 0) if plan.initrd else b""
    at = info + _START_INFO.size
    block = _START_INFO.pack(
        _MAGIC,
        _VERSION,
        0,
        1 if modules else 0,
        at if modules else 0,
        plan.cmdline_gpa,
        plan.rsdp_gpa,
        at + len(modules),
        len(plan.e820),
        0,
    )
    block += modules + memmap
    placement.put(placement.claim(info, len(block), "PVH's start info"), block)

    plan.protocol, plan.mode, plan.entry = "pvh", "prot32", kernel.pvh_entry
    plan.info_gpa = info
    plan.registers = {"rbx": info}
    plan.tables = layout.CPU_TABLES
    plan.kernel = span[0], span[1] - span[0]


def _bad(field: str, expected: str, found: str) -> BootError:
    return BootError(f"ELF image: {field}: expected {expected}, found {found}")
