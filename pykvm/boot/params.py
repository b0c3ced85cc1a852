"""struct boot_params, "the zero page": what Linux's boot protocol hands to the kernel.

Offsets are those of Documentation/arch/x86/zero-page.rst and boot.rst. All that is not named stays
zero: no VGA (screen_info: Linux then has no text console), no EFI, no disks.
"""

from __future__ import annotations

import struct

from pykvm.errors import BootError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from pykvm.boot.e820 import E820

SIZE = 0x1000
HEADER = 0x1F1  # the setup header is at the same offset in the image
HEADER_END = 0x290  # room for it in the page

_ACPI_RSDP_ADDR = 0x070
_EXT_RAMDISK_IMAGE = 0x0C0
_EXT_RAMDISK_SIZE = 0x0C4
_EXT_CMD_LINE_PTR = 0x0C8
_E820_ENTRIES = 0x1E8
_VID_MODE = 0x1FA
_BOOT_FLAG = 0x1FE
_MAGIC = 0x202
_VERSION = 0x206
_TYPE_OF_LOADER = 0x210
_LOADFLAGS = 0x211
_CODE32_START = 0x214
_RAMDISK_IMAGE = 0x218
_RAMDISK_SIZE = 0x21C
_CMD_LINE_PTR = 0x228
_SETUP_DATA = 0x250
_E820_TABLE = 0x2D0
_E820_MAX = 128

_UNDEFINED_LOADER = 0xFF
_NORMAL_MODE = 0xFFFF
LOADED_HIGH, _KASLR_FLAG, _CAN_USE_HEAP = 1, 2, 0x80
_CURRENT = 0x20F  # 2.15, the last version there is


def boot_params(
    header: bytes,
    *,
    e820: Sequence[E820],
    cmdline_gpa: int,
    kernel_gpa: int,
    initrd: tuple[int, int] | None = None,
    rsdp_gpa: int = 0,
) -> bytes:
    """Build the page.

    Args:
        header: the image's setup header from 0x1f1 on, or b"" for a kernel without: then one that
            says as much as a kernel past its decompressor looks at.
        e820: the memory map.
        cmdline_gpa: where the command line is.
        kernel_gpa: where the kernel, or its decompressor, was loaded.
        initrd: (gpa, length).
        rsdp_gpa: ACPI's root pointer; 0 lets the kernel search.

    Raises:
        BootError: more entries in the memory map than fit.
    """
    page = bytearray(SIZE)

    def put(offset: int, layout: str, value: int) -> None:
        struct.pack_into(layout, page, offset, value)

    page[HEADER : HEADER + len(header)] = header
    if not header:
        put(_BOOT_FLAG, "<H", 0xAA55)
        page[_MAGIC : _MAGIC + 4] = b"HdrS"
        put(_VERSION, "<H", _CURRENT)
        put(_LOADFLAGS, "<B", LOADED_HIGH)
    put(_VID_MODE, "<H", _NORMAL_MODE)
    put(_TYPE_OF_LOADER, "<B", _UNDEFINED_LOADER)
    # The first is the decompressor's own to set; the heap is that of the real-mode code.
    put(_LOADFLAGS, "<B", page[_LOADFLAGS] & ~(_KASLR_FLAG | _CAN_USE_HEAP))
    put(_CODE32_START, "<I", kernel_gpa)
    put(_SETUP_DATA, "<Q", 0)
    put(_CMD_LINE_PTR, "<I", cmdline_gpa & 0xFFFFFFFF)
    put(_EXT_CMD_LINE_PTR, "<I", cmdline_gpa >> 32)
    gpa, length = initrd or (0, 0)
    put(_RAMDISK_IMAGE, "<I", gpa & 0xFFFFFFFF)
    put(_EXT_RAMDISK_IMAGE, "<I", gpa >> 32)
    put(_RAMDISK_SIZE, "<I", length & 0xFFFFFFFF)
    put(_EXT_RAMDISK_SIZE, "<I", length >> 32)
    put(_ACPI_RSDP_ADDR, "<Q", rsdp_gpa)
    if len(e820) > _E820_MAX:
        raise BootError(
            f"boot_params e820_table: expected at most {_E820_MAX} entries, found {len(e820)}"
        )
    put(_E820_ENTRIES, "<B", len(e820))
    for index, entry in enumerate(e820):
        struct.pack_into("<QQI", page, _E820_TABLE + 20 * index, *entry)
    return bytes(page)
