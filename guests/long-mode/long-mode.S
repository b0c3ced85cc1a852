# long-mode: from real mode to 64-bit long mode, page tables included.
#
# Long mode has no "flat without paging": page tables come first. The order the manuals ask for
# (SDM volume 3, "Initializing IA-32e Mode"; APM volume 2, "Enabling and Activating Long Mode"):
#
#       1. build page tables            4. EFER.LME = 1
#       2. CR4.PAE = 1                  5. CR0.PE and CR0.PG = 1: the processor sets EFER.LMA
#       3. CR3 = PML4                   6. far jump to a code segment with L = 1
#
# Usually 32-bit protected mode is a stop on the way. It need not be: CR0.PE and CR0.PG may be set
# together, and the far jump leads from 16-bit code straight into 64-bit code.

        .intel_syntax noprefix
        .code16

        .equ    CODE, 0x08
        .equ    DATA, 0x10

# Page tables: six pages from 0x10000 on, which are zero at first (README.md has the picture).
        .equ    PML4, 0x10000
        .equ    PDPT_LOW, 0x11000
        .equ    PD_LOW, 0x12000
        .equ    PDPT_HIGH, 0x13000
        .equ    PD_HIGH, 0x14000
        .equ    PT_HIGH, 0x15000

        .equ    PRESENT, 1
        .equ    WRITE, 2
        .equ    LARGE, 0x80             # in a PD entry: maps 2 MiB, there is no PT below
        .equ    TABLE, PRESENT + WRITE

        .equ    MSR_EFER, 0xc0000080
        .equ    EFER_LME, 1 << 8
        .equ    EFER_LMA, 1 << 10
        .equ    CR4_PAE, 1 << 5
        .equ    CR0_PE_PG, 0x80000001

start:
        cli
        xor     ax, ax
        mov     ds, ax
        mov     es, ax
        mov     si, offset says_real
next:
        lodsb
        test    al, al
        jz      build
        out     0xe9, al
        jmp     next

# 1. Page tables. An entry is 8 bytes; here the upper four stay 0. With 64 KiB segments the tables
#    need a segment of their own: ES = 0x1000 makes offset 0 mean 0x10000, the PML4.
build:
        mov     ax, PML4 >> 4
        mov     es, ax
        #       entry                         value
        mov     dword ptr es:[0x0000],        PDPT_LOW + TABLE          # PML4[0]
        mov     dword ptr es:[0x0ff8],        PDPT_HIGH + TABLE         # PML4[511]
        mov     dword ptr es:[0x1000],        PD_LOW + TABLE            # PDPT_LOW[0]
        mov     dword ptr es:[0x2000],        0 + LARGE + TABLE         # PD_LOW[0]: 0..2 MiB
        mov     dword ptr es:[0x3ff0],        PD_HIGH + TABLE           # PDPT_HIGH[510]
        mov     dword ptr es:[0x4000],        PT_HIGH + TABLE           # PD_HIGH[0]
        mov     dword ptr es:[0x5000],        0x180000 + TABLE          # PT_HIGH[0]: 4 KiB

# 2. to 5.
        lgdt    gdt_pointer
        mov     eax, cr4
        or      eax, CR4_PAE
        mov     cr4, eax
        mov     eax, PML4
        mov     cr3, eax
        mov     ecx, MSR_EFER
        rdmsr
        or      eax, EFER_LME
        wrmsr
        mov     eax, cr0
        or      eax, CR0_PE_PG
        mov     cr0, eax                # paging is on: this very fetch is translated already

# 6. Without this jump the processor would go on in compatibility mode, as 16-bit code.
        jmp     CODE:long_mode

        .code64
long_mode:
        mov     ax, DATA                # bases of DS, ES and SS are ignored now; a valid SS is not
        mov     ds, ax
        mov     es, ax
        mov     ss, ax
        mov     esp, 0x7c00             # a 32-bit move clears the upper half of RSP
        lea     rsi, [rip + says_long]
        call    puts

# EFER.LMA was set by the processor, not by us.
        mov     ecx, MSR_EFER
        rdmsr
        test    eax, EFER_LMA
        jz      bad
        lea     rsi, [rip + says_lma]
        call    puts

# Registers have 64 bits.
        mov     rax, 0x123456789abcdef0
        shr     rax, 60
        cmp     rax, 1
        jne     bad
        lea     rsi, [rip + says_64]
        call    puts

# Two virtual addresses, one physical page: written through the upper half, read through the lower.
        mov     rbx, 0xffffffff80000000
        mov     rax, 0x6d766b7970       # "pykvm"
        mov     [rbx], rax
        cmp     [0x180000], rax
        jne     bad
        lea     rsi, [rip + says_alias]
        call    puts

# The walk left its mark: bit 5 (accessed) in each entry it passed, bit 6 (dirty) in the last.
        mov     eax, [PT_HIGH]
        and     eax, 0x60
        cmp     eax, 0x60
        jne     bad
        lea     rsi, [rip + says_dirty]
        call    puts
        hlt

puts:
        lodsb
        test    al, al
        jz      1f
        out     0xe9, al
        jmp     puts
1:      ret

bad:
        mov     al, 1
        out     0xf4, al

says_real:  .asciz "real mode\n"
says_long:  .asciz "long mode, straight from real mode\n"
says_lma:   .asciz "the processor has set EFER.LMA\n"
says_64:    .asciz "registers have 64 bits\n"
says_alias: .asciz "ffffffff80000000 and 0000000000180000 are the same page\n"
says_dirty: .asciz "its page table entry is accessed and dirty\n"

        .balign 8
gdt:
        .quad   0
        .quad   0x00209a0000000000      # code: L = 1, 64 bit; base and limit do not matter
        .quad   0x0000920000000000      # data: present, writable
gdt_end:

gdt_pointer:
        .word   gdt_end - gdt - 1
        .long   gdt
