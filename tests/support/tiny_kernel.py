"""Kernels of a few instructions for ``pykvm boot``, which run where stock kernels do not."""

from __future__ import annotations

import pykvm
from pykvm.arch.x86_64 import pc
from pykvm.devices import pm
from tests.support import kernels

_OFF = pm.SLEEP_ENABLE | pc.SLEEP_TYPE_OFF << pm.SLEEP_TYPE_SHIFT
POWER_OFF = f"mov dx,{pc.PM_BASE + pm.CONTROL}; mov ax,{_OFF}; out dx,ax; hlt"

#: What a guest does to end, by the reason that it gives.
ENDS = {
    "power-off": POWER_OFF,
    "reboot": "mov dx,0xcf9; mov al,2; out dx,al; mov al,6; out dx,al; hlt",
    "panic": "mov dx,0x505; mov al,1; out dx,al; spin: jmp spin",
    "shutdown": "lidt [none]; ud2; none: .quad 0, 0",
    "internal-error": "mov eax,0xd0000000; jmp rax",  # no RAM there: no KVM can fetch it
    "timeout": "spin: jmp spin",
}

PRINT = """
        mov esi, offset text
        mov dx, 0x3f8
more:   lodsb
        test al, al
        jz printed
        out dx, al
        jmp more
text:   .asciz "{}"
printed:
"""

_READY = PRINT.format("ready\\n")
ECHO = f"""
        mov dx, 0x3fc
        mov al, 3               # DTR and RTS: input may come
        out dx, al
        {_READY}
listen: mov dx, 0x3fd
        in al, dx
        test al, 1
        jz listen
        mov dx, 0x3f8
        in al, dx
        cmp al, '.'
        je leave
        out dx, al
        jmp listen
leave:  {POWER_OFF}
"""
"""Prints "ready", then every byte that it is typed, and powers off at a full stop."""


def elf(text: str) -> bytes:
    """A 64-bit ELF kernel; Intel syntax, entered at its first instruction."""
    code = bytes(pykvm.asm(text, at=kernels.PREF))
    return kernels.elf([(kernels.PREF, code, len(code))])


def bzimage(text: str) -> bytes:
    """The same, packed as a bzImage: what ``pykvm boot`` takes for a stock Linux kernel."""
    return kernels.bzimage(kernels.PACKERS["gzip"](elf(text)))
