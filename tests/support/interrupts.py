"""Long-mode guests that live by interrupts: the parts that they share, in assembler."""

from __future__ import annotations

LAPIC = 0xFEE00000
IOAPIC = 0xFEC00000

PROLOGUE = """
    # An interrupt table at 0x9000, with the gate of one vector: {vector}. RBX is the local APIC.
        .equ    EOI, 0xb0
        mov     ebx, 0xfee00000
        mov     esp, 0x8000
        mov     eax, offset handler
        mov     edi, 0x9000 + {vector} * 16
        mov     [rdi], ax
        mov     [rdi + 6], eax
        mov     ax, cs
        mov     [rdi + 2], ax
        mov     word ptr [rdi + 4], 0x8e00      # present, interrupt gate; the upper half of
        mov     eax, [rdi + 6]                  # the offset is 0
        shr     eax, 16
        mov     [rdi + 6], ax
        mov     dword ptr [rdi + 8], 0
        lidt    [idt]
        mov     dword ptr [rbx + 0xf0], 0x1ff   # the local APIC is on
        mov     al, 0xff                        # the PICs, if there are any, have the same lines
        out     0x21, al
        out     0xa1, al
"""

IDLE = """
    idle:
        sti
        {idle}
        jmp     idle
    idt:
        .word   0xfff
        .quad   0x9000
        .balign 4
    count:
        .long   0
"""


def guest(vector: int, set_up: str, handler: str, idle: str = "hlt") -> str:
    """The source of a guest that takes one vector.

    Args:
        vector: 32..255.
        set_up: what makes it interrupt; RBX is the local APIC. Ports 0x21 and 0xa1 have to answer.
        handler: ends with EOI and IRETQ, or by port 0xf4. Any register is its own but RSP, RBX.
        idle: what it does between interrupts.
    """
    begin, end = PROLOGUE.format(vector=vector), IDLE.format(idle=idle)
    return f"{begin}\n{set_up}\n{end}\nhandler:\n{handler}\n"


def ioapic_entry(pin: int, entry: int) -> str:
    """Instructions that write a redirection entry, for processor 0; RAX and RDX are lost."""
    return f"""
        mov     edx, {IOAPIC:#x}
        mov     dword ptr [rdx], {0x11 + 2 * pin}
        mov     dword ptr [rdx + 0x10], 0
        mov     dword ptr [rdx], {0x10 + 2 * pin}
        mov     dword ptr [rdx + 0x10], {entry:#x}
    """
