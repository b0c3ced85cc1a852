# protected-mode: from real mode into 32-bit protected mode.
#
# Four things make the step: a GDT in memory, LGDT, CR0.PE = 1, and a far jump that loads CS with a
# selector. Until that jump the processor still uses the base, limit and size that real mode left
# in CS's hidden part.

        .intel_syntax noprefix
        .code16

        .equ    CODE, 0x08              # selectors: the offsets of the descriptors in the GDT below
        .equ    DATA, 0x10
        .equ    WINDOW, 0x18
        .equ    BEYOND, 0x20            # there is no such descriptor

start:
        cli                             # no IDT yet: an interrupt now would be the end
        xor     ax, ax
        mov     ds, ax
        mov     si, offset says_real
next:
        lodsb
        test    al, al
        jz      switch
        out     0xe9, al
        jmp     next

switch:
        lgdt    gdt_pointer
        mov     eax, cr0
        or      al, 1                   # CR0.PE
        mov     cr0, eax
        jmp     CODE:protected          # CS = CODE: its descriptor is read only here

        .code32
protected:
        mov     ax, DATA                # the others still hold real-mode bases: replace them all
        mov     ds, ax
        mov     es, ax
        mov     ss, ax
        mov     esp, 0x7c00
        mov     esi, offset says_protected
        call    puts

# Offsets have 32 bits now: reach RAM above 1 MiB.
        mov     dword ptr [0x180000], 0xcafe
        mov     esi, offset says_reach
        call    puts

# A segment may start anywhere: WINDOW has base 0x180000 and is 16 bytes long.
        mov     ax, WINDOW
        mov     gs, ax
        cmp     word ptr gs:[0], 0xcafe
        jne     bad
        mov     esi, offset says_base
        call    puts

# The processor itself notes in a descriptor that it was loaded: bit 0 of the type, "accessed".
        test    byte ptr [gdt_window + 5], 1
        jz      bad
        mov     esi, offset says_accessed
        call    puts

# A selector has to lie within the table: loading one behind its end is #GP, vector 13. This exception
# comes with an error code, which here is the selector.
        lidt    idt_pointer
        mov     ax, BEYOND
faults:
        mov     gs, ax
        jmp     bad                     # not reached
after_fault:
        mov     esi, offset says_beyond
        call    puts
        hlt

# general_protection: the stack holds, from the top, error code, EIP, CS, EFLAGS. A handler that wants
# to go back drops the error code and executes IRET. This one gives the interrupted work up instead,
# as longjmp would: it throws the stack away and goes on elsewhere. (IRET in protected mode is one of
# the instructions that KVM's emulator does not know; see docs/backends.md.)
general_protection:
        cmp     dword ptr [esp], BEYOND # the error code
        jne     bad
        cmp     dword ptr [esp + 4], offset faults
        jne     bad
        mov     esp, 0x7c00
        jmp     after_fault

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

says_real:      .asciz "real mode: 16 bits, segment * 16\n"
says_protected: .asciz "protected mode: CS came from the GDT\n"
says_reach:     .asciz "a store above 1 MiB\n"
says_base:      .asciz "a segment with base 0x180000 sees it at offset 0\n"
says_beyond:    .asciz "selector 0x20 is behind the end of the GDT: #GP(0x20)\n"
says_accessed:  .asciz "its descriptor is marked as accessed\n"

# One descriptor is 8 bytes:
#
#    63      56 55   52 51   48 47      40 39      32 31              16 15               0
#   ┌──────────┬───────┬───────┬──────────┬──────────┬──────────────────┬──────────────────┐
#   │base 31:24│G D L A│limit  │P DPL S   │base 23:16│base 15:0         │limit 15:0        │
#   │          │       │19:16  │type      │          │                  │                  │
#   └──────────┴───────┴───────┴──────────┴──────────┴──────────────────┴──────────────────┘
        .balign 8
gdt:
        .quad   0                       # selector 0 must not be used
gdt_code:
        .quad   0x00cf9a000000ffff      # base 0, limit 4 GiB, execute and read, 32 bit
gdt_data:
        .quad   0x00cf92000000ffff      # base 0, limit 4 GiB, read and write
gdt_window:
        .quad   0x004092180000000f      # base 0x180000, limit 15 bytes
gdt_end:

gdt_pointer:
        .word   gdt_end - gdt - 1       # size - 1
        .long   gdt

# The interrupt descriptor table: one gate of 8 bytes a vector, and only number 13 is present. Its
# parts: offset 15:0, selector, type 0x8e (present, 32-bit interrupt gate), offset 31:16, which is 0
# here because this code lies below 64 KiB.
        .balign 8
idt:
        .fill   13, 8, 0
        .word   general_protection, CODE, 0x8e00, 0
idt_end:

idt_pointer:
        .word   idt_end - idt - 1
        .long   idt
