"""A multiboot guest that starts up as those do that test KVM, written from scratch.

It does what such a test's start-up code asks of its machine, and no more: it is loaded by
multiboot 1, prints its command line's words through a polled COM1, goes to long mode, resets and
enables its local APIC, masks the PICs, asks fw_cfg for the number of processors, starts the others
by INIT and SIPI at page 0 and waits until all of them are in long mode, switches to x2APIC where
there is one, checks pc-testdev, and leaves by a write of 32 bits to isa-debug-exit.
"""

from __future__ import annotations

import struct

from pykvm.assembler import Code, asm

AT = 0x400000
"""Where kvm-unit-tests' images are linked, too."""
STACK = 0x1000
MAX_CPUS = 16

SOURCE = r"""
        .equ    TABLES, 0x410000        # PML4, PDPT, four PDs; in .bss, so they are zero
        .equ    STACKS, 0x420000        # one page each
        .equ    BSS_END, 0x440000
        .equ    APIC, 0xfee00000
        .equ    FLAGS, 0x10000          # addresses are in the header
        .equ    CODE64, 0x08
        .equ    DATA, 0x10
        .equ    CODE32, 0x18

        jmp     start
        .balign 4
header: .long   0x1badb002, FLAGS, -(0x1badb002 + FLAGS)
        .long   header, load, 0, BSS_END, start

start:
        cmp     eax, 0x2badb002
        jne     fail32
        mov     [info], ebx
        mov     esp, STACKS + 0x1000

        mov     edi, TABLES + 0x2000    # 4 GiB in pages of 2 MiB
        mov     eax, 0x83
next:
        mov     [edi], eax
        add     edi, 8
        add     eax, 0x200000
        jnc     next
        mov     edi, TABLES + 0x1000
        mov     eax, TABLES + 0x2003
        mov     ecx, 4
1:      mov     [edi], eax
        add     edi, 8
        add     eax, 0x1000
        loop    1b
        mov     dword ptr [TABLES], TABLES + 0x1003
        lgdt    gdt_pointer
        call    paging
        jmp     CODE64:start64

fail32: mov     eax, 0x21
        out     0xf4, eax

# Paging and long mode, for the first processor and all others.
paging:
        mov     eax, cr4
        or      eax, 0x20
        mov     cr4, eax
        mov     eax, TABLES
        mov     cr3, eax
        mov     ecx, 0xc0000080
        rdmsr
        or      eax, 0x100
        wrmsr
        mov     eax, cr0
        or      eax, 0x80000001
        mov     cr0, eax
        ret

# What a SIPI starts: copied to address 0, so its own addresses are offsets.
        .code16
sipi_entry:
        mov     eax, cr0
        or      eax, 1
        mov     cr0, eax
        lgdt    cs:[pointer - sipi_entry]
        .byte   0x66, 0xea              # a far jump with an offset of 32 bits
        .long   ap32
        .word   CODE32
pointer:
        .word   gdt_end - gdt - 1
        .long   gdt
sipi_end:

        .code32
ap32:
        mov     ax, DATA
        mov     ds, ax
        mov     es, ax
        mov     ss, ax
        mov     esp, 0x1000
        lock xadd [next_stack], esp     # the top of mine; the next has the page above
        call    paging
        jmp     CODE64:ap64

        .code64
ap64:
        mov     ebp, APIC
        mov     dword ptr [rbp + 0xf0], 0x1ff
        mov     eax, [rbp + 0x20]
        shr     eax, 24
        lock bts [online], eax
        call    x2apic
        lock inc dword ptr [count]
1:      hlt
        jmp     1b

start64:
        mov     ax, DATA
        mov     ds, ax
        mov     es, ax
        mov     ss, ax
        mov     ebp, APIC
        mov     dword ptr [rbp + 0xf0], 0xff    # reset: software-disabled
        mov     al, 0xff
        out     0x21, al
        out     0xa1, al
        mov     dword ptr [rbp + 0xf0], 0x1ff
        call    serial
        mov     ebx, [info]
        mov     esi, [rbx + 16]                 # the command line
        call    puts
        lea     rsi, [rip + newline]
        call    puts

# RAM size, item 3, has 8 bytes; the number of processors, item 5, has 2.
        mov     dx, 0x510
        mov     ax, 3
        out     dx, ax
        inc     dx
        xor     ebx, ebx
        mov     ecx, 4
1:      in      al, dx
        shl     ebx, 8
        mov     bl, al
        loop    1b
        bswap   ebx
        mov     [ram], ebx
        dec     dx
        mov     ax, 5
        out     dx, ax
        inc     dx
        in      al, dx
        mov     bl, al
        in      al, dx
        mov     bh, al
        movzx   ebx, bx                         # EBX: how many

# The others.
        cld
        lea     rsi, [rip + sipi_entry]
        xor     edi, edi
        mov     ecx, offset sipi_end - sipi_entry
        rep movsb
        mov     dword ptr [rbp + 0x300], 0xc4500
        mov     dword ptr [rbp + 0x300], 0xc4600
1:      pause
        cmp     [count], ebx
        jne     1b
        call    x2apic
        mov     eax, 1
        mov     ecx, ebx
        shl     eax, cl
        dec     eax
        or      dword ptr [online], 1
        cmp     [online], eax
        mov     edi, 1
        jne     fail

# pc-testdev: ports of every width, memory, the page flush.
        mov     dx, 0xe0
        mov     eax, 0x12345678
        out     dx, eax
        in      ax, dx
        cmp     eax, 0x12345678
        mov     edi, 2
        jne     fail
        mov     al, 0x99
        out     0xe1, al
        in      eax, dx
        cmp     eax, 0x12349978
        mov     edi, 3
        jne     fail
        mov     edi, 0xff000000
        mov     rax, 0x1122334455667788
        mov     [rdi + 8], rax
        cmp     dword ptr [rdi + 12], 0x11223344
        mov     edi, 4
        jne     fail
        mov     eax, offset ram
        out     0xe4, eax                       # and what was there is there still
        mov     eax, [ram]
        shr     eax, 20
        jz      fail

        lea     rsi, [rip + passed]
        call    puts
        xor     edi, edi
fail:
        mov     eax, edi
        out     0xf4, eax
1:      jmp     1b

# Into x2APIC mode, where CPUID has it.
x2apic:
        push    rbx
        mov     eax, 1
        cpuid
        pop     rbx
        bt      ecx, 21
        jnc     1f
        mov     ecx, 0x1b
        rdmsr
        or      eax, 0x400
        wrmsr
        mov     ecx, 0x802                      # and it answers there
        rdmsr
1:      ret

# COM1 at 115200, 8N1, no interrupts.
serial:
        mov     dx, 0x3fb
        in      al, dx
        or      al, 0x80
        out     dx, al
        mov     dx, 0x3f8
        mov     al, 1
        out     dx, al
        inc     dx
        xor     eax, eax
        out     dx, al
        mov     dx, 0x3fb
        mov     al, 3
        out     dx, al
        mov     dx, 0x3f9
        xor     eax, eax
        out     dx, al
        inc     dx
        out     dx, al
        mov     dx, 0x3fc
        mov     al, 3
        out     dx, al
        ret

puts:
1:      mov     dx, 0x3fd
2:      in      al, dx
        test    al, 0x20
        jz      2b
        lodsb
        test    al, al
        jz      3f
        mov     dx, 0x3f8
        out     dx, al
        jmp     1b
3:      ret

passed: .ascii  "all processors are there"
newline: .asciz "\r\n"

        .balign 8
gdt:
        .quad   0
        .quad   0x00af9b000000ffff      # 0x08: 64-bit code
        .quad   0x00cf93000000ffff      # 0x10: data
        .quad   0x00cf9b000000ffff      # 0x18: 32-bit code
gdt_end:
gdt_pointer:
        .word   gdt_end - gdt - 1
        .long   gdt
        .balign 4
info:   .long   0
ram:    .long   0
online: .long   0
count:  .long   1
next_stack: .long STACKS + 0x2000
"""


def image() -> Code:
    """The guest, with its addresses in the multiboot header."""
    return asm("load:\n" + SOURCE, mode="prot32", at=AT)


def elf32() -> bytes:
    """The same as an ELF32 file, as such guests are, with no addresses in the header."""
    from tests.support.kernels import elf

    code = image()
    header = code.symbols["header"] - AT
    flags = struct.pack("<III", 0x1BADB002, 0, -0x1BADB002 & 0xFFFF_FFFF)
    data = code[:header] + flags + code[header + 12 :]
    return elf([(AT, data, 0x40000)], bits=32, entry=code.symbols["start"], align=4)
