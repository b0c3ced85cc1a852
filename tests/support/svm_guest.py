"""A hypervisor of a few instructions, and its guest: nested virtualization by AMD's SVM.

AMD APM Vol. 2 (24593): 15.5 VMRUN, appendix B the layout of the VMCB, appendix C the exit codes.
L1 is entered in long mode and runs L2 with its own page tables; the VMCB is written from here.
"""

from __future__ import annotations

import struct

import pykvm
from pykvm.arch.x86_64 import layout

ENTRY = 0x8000
VMCB = 0x20000
SAVED = 0x21000
"""Where VMRUN keeps the host's state (VM_HSAVE_PA)."""
L2 = 0x30000
L2_STACK = 0x38000
EXIT_CODE = 0x40000
"""L1 writes here why L2 exited."""
COUNT = 0x41000
"""L2 counts here."""
GO = 0x42000
"""L2 ends once this is not 0."""
SAID = 0x50
"""The port that L2 writes to; L1 does not intercept it."""
DONE = 0x10
"""The port that L1 ends by."""

VMEXIT_HLT = 0x78
"""Appendix C."""
_INTERCEPT_HLT = 1 << 24  # of the vector at 0x00c
_INTERCEPT_SHUTDOWN = 1 << 31
_INTERCEPT_VMRUN = 1 << 0  # of the vector at 0x010; VMRUN insists on it

# EFER.SVME, VM_HSAVE_PA, VMRUN RAX; and what comes after the #VMEXIT.
L1_CODE = f"""
        mov     ecx, 0xC0000080
        rdmsr
        or      eax, 0x1000
        wrmsr
        mov     ecx, 0xC0010117
        mov     eax, {SAVED}
        xor     edx, edx
        wrmsr
        mov     eax, {VMCB}
        .byte   0x0F, 0x01, 0xD8
        mov     rbx, [{VMCB + 0x70}]
        mov     [{EXIT_CODE}], rbx
        mov     rcx, [{COUNT}]
        out     {DONE}, al
        hlt
"""

SPEAKS = f"l: inc qword ptr [{COUNT}]; out {SAID}, al; cmp qword ptr [{GO}], 0; je l; hlt"
"""An L2 that leaves to user space on every turn."""
SPINS = f"l: inc qword ptr [{COUNT}]; cmp qword ptr [{GO}], 0; je l; hlt"
"""An L2 that only spins, until it is told to end."""


def _segment(selector: int, attributes: int, limit: int, base: int = 0) -> bytes:
    return struct.pack("<HHIQ", selector, attributes, limit, base)


def vmcb(cr3: int) -> bytes:
    """A VMCB for L2: long mode, ring 0, L1's tables; HLT and a shutdown come back to L1."""
    made = bytearray(4096)
    struct.pack_into("<II", made, 0x00C, _INTERCEPT_HLT | _INTERCEPT_SHUTDOWN, _INTERCEPT_VMRUN)
    struct.pack_into("<I", made, 0x058, 1)  # ASID: not 0
    data = _segment(layout.KERNEL_DS, 0xC93, 0xFFFFFFFF)
    for offset in (0x400, 0x420, 0x430, 0x440, 0x450):  # ES, SS, DS, FS, GS
        made[offset : offset + 16] = data
    made[0x410:0x420] = _segment(layout.KERNEL_CS, 0xA9B, 0xFFFFFFFF)  # CS
    made[0x460:0x470] = _segment(0, 0, 0x4F, layout.GDT)  # GDTR
    made[0x490:0x4A0] = _segment(layout.TSS_SELECTOR, 0x8B, 0x67, layout.TSS)  # TR
    struct.pack_into("<Q", made, 0x4D0, 0x1500)  # EFER: SVME, LMA, LME
    struct.pack_into("<QQQQQQQ", made, 0x548, 0x620, cr3, 0x80010033, 0x400, 0xFFFF0FF0, 2, L2)
    struct.pack_into("<Q", made, 0x5D8, L2_STACK)  # RSP
    struct.pack_into("<Q", made, 0x668, 0x0007040600070406)  # PAT
    return bytes(made)


def enter(m: pykvm.Machine, guest: str) -> None:
    """Get a machine of at least 512 KiB ready to run L1, which runs ``guest`` as L2."""
    m.load(pykvm.asm(L1_CODE, mode="long64"), at=ENTRY)
    m.load(pykvm.asm(guest, mode="long64"), at=L2)
    m.cpu.enter("long64", entry=ENTRY)
    m.load(vmcb(m.cpu.cr3), at=VMCB)
    m.pio.stop(DONE)
