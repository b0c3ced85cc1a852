"""Where a booting kernel finds what it is handed: every guest-physical address, and why there.

::

    0x00000400  two words of the BIOS data area, for multiboot kernels
    0x00000500  the processor's tables and first stack (``arch.x86_64.layout``), up to 0x8000
    0x00010000  what the loader tells the kernel: Linux's zero page, multiboot's info block
    0x00011000  PVH's hvm_start_info with its lists
    0x00020000  command line, up to 64 KiB
    0x0009fc00  end of conventional memory; the extended BIOS data area of a PC, empty here
    0x000a0000  VGA and option ROMs on a PC: a hole in the memory map
    0x000e0000  ACPI: the RSDP, then the tables; reserved
    0x000f0000  MP tables, for kernels that are told to do without ACPI; reserved
    0x00100000  high memory: kernels. Linux prefers 0x01000000, and says so (pref_address)
        …       initrd and modules, as high as the kernel allows, in whole pages
    0xc0000000  the hole for PCI, MMIO windows, IOAPIC and LAPIC; RAM goes on above it
    0x100000000 the rest of the RAM

The low addresses are conventions: the kernel is told each of them. They keep clear of each other,
of what real mode and the BIOS use on a PC (0-0x4ff), and of the first megabyte's holes. A multiboot
kernel may be linked anywhere, so for it they are a preference only, and the loader looks for other
places if the image wants these.
"""

from __future__ import annotations

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
PAGE = 0x1000

CPU_TABLES = 0
"""What ``cpu.enter(tables=…)`` gets as a rule; the block itself begins 0x500 above."""

BIOS_DATA, BIOS_DATA_SIZE = 0x400, 0x100
"""A PC's BIOS keeps its variables here. Of all of them, multiboot kernels are given two words."""
BDA_EBDA = 0x40E
"""The segment of the EBDA."""
BDA_MEMORY = 0x413
"""KiB of conventional memory. Xen puts its trampoline at the end of that, and has no other word."""

ZERO_PAGE = 0x10000
"""struct boot_params, one page. Linux copies it before it touches anything else."""
MULTIBOOT_INFO = 0x10000
"""Multiboot's info block, its lists and strings behind it; preferred, see above."""
PVH_INFO = 0x11000
"""struct hvm_start_info, then the memory map and the list of modules."""

CMDLINE = 0x20000
"""The command line, NUL-terminated. The boot protocol wants it below 0xa0000."""
CMDLINE_SIZE = 0x10000
"""Room for it with its NUL. Linux itself takes 2047 characters (its header says)."""

EBDA = 0x9FC00
"""End of conventional memory: the last KiB below VGA belongs to the BIOS on a PC. Linux protects
it whether there is one or not (arch/x86/kernel/ebda.c)."""
VGA = 0xA0000
"""The frame buffer, and option ROMs from 0xc0000: nothing is there, and no RAM either."""
RSDP = 0xE0000
"""ACPI's root pointer. Firmware-less guests look for it on 16-byte boundaries in 0xe0000-0xfffff
(ACPI 6.5, 5.2.5.1); others are told. The tables follow it."""
ACPI_END = 0x100000
HIGH_MEMORY = 0x100000
"""Kernels live from here on."""

INITRD_MAX = 0x7FFFFFFF
"""The highest byte an initrd may occupy where no setup header says it: that of x86-64 Linux."""

PCI_HOLE = 3 * GIB
PCI_HOLE_END = 4 * GIB
"""No RAM in between: device windows, the IOAPIC (0xfec00000) and the LAPICs (0xfee00000)."""


def ram_ranges(size: int) -> list[tuple[int, int]]:
    """Lay ``size`` bytes of RAM around the PCI hole: [(gpa, size)], one or two ranges."""
    if size <= PCI_HOLE:
        return [(0, size)]
    return [(0, PCI_HOLE), (PCI_HOLE_END, size - PCI_HOLE)]
