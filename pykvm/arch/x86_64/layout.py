"""Where ``modes.enter()`` puts what a processor needs, and under which selectors.

Everything fits below the conventional entry at 0x8000, so that the smallest guest (64 KiB) has
room for it. All addresses are guest-physical and count from the ``tables`` argument of ``enter``::

    0x0000  real-mode interrupt vectors and BIOS data: left alone
    0x0500  GDT, 80 bytes
    0x0600  TSS, 104 bytes; for ring 3 with I/O privilege its port permissions, 513 bytes more
    0x0870  stack of IST 1, down from 0x0c00
    0x0c00  stack of ring 0 when ring 3 is interrupted (RSP0), down from 0x1000
    0x1000  page tables: PML4, PDPT, and four page directories if 1 GiB pages are not to be had
    0x7000  first stack of the guest, down from 0x8000
    0x8000  the guest's code, by convention
"""

from __future__ import annotations

GDT = 0x500
"""The first byte that real mode's IVT (0-0x3ff) and BIOS data area (0x400-0x4ff) leave free."""
TSS = 0x600
IO_PORTS = 0x1000
"""Ports 0-0xfff are those that ring 3 with iopl=3 may use on every back end (see ``modes``)."""
IST1_TOP = 0xC00
RSP0_TOP = 0x1000
PAGE_TABLES = 0x1000
PAGE_TABLES_END = 0x7000
"""Six pages: a PML4, a PDPT and four page directories map 4 GiB in 2 MiB pages."""
STACK_TOP = 0x8000
END = 0x8000
ENTRY = 0x8000
"""Where a guest is loaded unless it says otherwise."""

# The selectors are those of Linux. SYSCALL and SYSRET want kernel code and data side by side
# (0x10, 0x18) and 32-bit code, data, 64-bit code of ring 3 in this order (0x20, 0x28, 0x30). KVM
# without hardware support (kvm-pvm) runs ring 3 natively under its host's own segments, which are
# these too.
KERNEL_CS32 = 0x08
KERNEL_CS = 0x10
KERNEL_DS = 0x18
USER_CS32 = 0x20
USER_DS = 0x28
USER_CS = 0x30
TSS_SELECTOR = 0x40

STAR = KERNEL_CS << 32 | (USER_CS32 | 3) << 48
"""The value of MSR_STAR under which SYSCALL and SYSRET use this GDT."""

GIB = 1 << 30
MAP_SIZE = 4 * GIB
"""Identity-mapped by ``long64``: RAM, and every MMIO window a small guest uses."""
