# exceptions: what the processor pushes when something goes wrong, down to a triple fault.
#
# Some exceptions push an error code, some do not, and one (#PF) leaves an address in CR2. A handler
# has to know which. The stubs below push a zero where the processor pushes nothing, so that the
# common handler finds the same picture for all of them:
#
#       rsp + 48    SS          ┐
#       rsp + 40    RSP         │
#       rsp + 32    RFLAGS      │ by the processor; in 64-bit mode always all five
#       rsp + 24    CS          │
#       rsp + 16    RIP         ┘
#       rsp +  8    error code    by the processor, or a zero by the stub
#       rsp         vector        by the stub
#
# The host enters in long mode with RAM identity-mapped. GDT and IDT are this guest's own.

        .intel_syntax noprefix
        .code64

        .equ    CODE, 0x08
        .equ    DATA, 0x10
        .equ    ABSENT, 0x18            # a data segment that is marked as not present
        .equ    BEYOND, 0x28            # a selector behind the end of the GDT

        .equ    HAS_CODE, 0x7d00        # bit n: vector n pushes an error code (8, 10..14)
        .equ    STUB_SIZE, 16           # bytes from one stub to the next

start:
        mov     esp, offset stack_top
        lgdt    gdt_pointer
        mov     eax, DATA
        mov     ds, eax
        mov     es, eax
        mov     ss, eax
        push    CODE                    # CS can only be loaded by a far transfer: a far return
        lea     rax, [rip + reloaded]
        push    rax
        retfq
reloaded:

# Build the IDT for vectors 0..14. A gate has 16 bytes: offset 15:0, selector, IST, type, offset
# 31:16, offset 63:32, reserved. All stubs lie below 64 KiB, so that only the lowest part is set.
        lea     rdi, [rip + idt]
        lea     rax, [rip + stubs]
gate:
        mov     [rdi], ax
        mov     word ptr [rdi + 2], CODE
        mov     word ptr [rdi + 4], 0x8e00      # present, DPL 0, 64-bit interrupt gate
        add     eax, STUB_SIZE
        add     edi, 16
        cmp     eax, offset stubs_end
        jb      gate
        lidt    idt_pointer

# RBX tells the handler where to go on after each fault.
        lea     rbx, [rip + 1f]
        xor     ecx, ecx
        xor     edx, edx
        mov     eax, 1
        div     ecx                     # #DE, no error code
1:
        lea     rbx, [rip + 1f]
        ud2                             # #UD, no error code
1:
        lea     rbx, [rip + 1f]
        mov     eax, ABSENT
        mov     ds, eax                 # #NP, the error code is the selector
1:
        lea     rbx, [rip + 1f]
        mov     eax, BEYOND
        mov     ds, eax                 # #GP, the error code is the selector
1:
        lea     rbx, [rip + 1f]
        mov     rax, 0x8000000000000000 # not canonical: bits 63..47 differ
        mov     al, [rax]               # #GP, error code 0
1:
        lea     rbx, [rip + 1f]
        mov     rax, 0x00006ead00000123
        mov     al, [rax]               # #PF: nobody has mapped that; error code 0 is a read
1:
        lea     rbx, [rip + 1f]
        mov     rax, 0x00006ead00000456
        mov     [rax], al               # #PF: bit 1 of the error code is a write
1:

# A triple fault: with an IDT that has no gates, #UD cannot be delivered (#GP), neither can that
# (#DF), and neither can that. The processor shuts down; a PC would reset.
        lea     rsi, [rip + says_triple]
        call    puts
        lidt    no_idt
        ud2

# One stub a vector, all of the same size. A real system would write one for each of 256 vectors.
        .balign STUB_SIZE
stubs:
        .set    vector, 0
        .rept   15
        .balign STUB_SIZE
        .if     ((HAS_CODE >> vector) & 1) == 0
        push    0
        .endif
        push    vector
        jmp     common
        .set    vector, vector + 1
        .endr
        .balign STUB_SIZE
stubs_end:

common:
        mov     rax, [rsp]              # vector -> its name, 4 bytes each
        lea     rsi, [rip + names]
        lea     rsi, [rsi + rax * 4]
        call    puts
        lea     rsi, [rip + says_code]
        call    puts
        mov     rax, [rsp + 8]
        mov     ecx, 4
        call    put_hex
        cmp     dword ptr [rsp], 14
        jne     1f
        lea     rsi, [rip + says_cr2]
        call    puts
        mov     rax, cr2                # the address whose translation failed
        mov     ecx, 16
        call    put_hex
1:
        mov     al, '\n'
        out     0xe9, al
        mov     eax, DATA               # the #NP and #GP above may have left DS as it was; be sure
        mov     ds, eax
        add     rsp, 16                 # vector and error code
        mov     [rsp], rbx              # do not try again: go on behind the fault
        iretq

# put_hex: print the lowest ECX hexadecimal digits of RAX.
put_hex:
        mov     rdx, rax
1:
        dec     ecx
        js      2f
        mov     rax, rdx
        push    rcx
        shl     ecx, 2
        shr     rax, cl
        pop     rcx
        and     eax, 15
        mov     al, [rax + digits]
        out     0xe9, al
        jmp     1b
2:
        ret

puts:
        lodsb
        test    al, al
        jz      1f
        out     0xe9, al
        jmp     puts
1:      ret

digits:      .ascii "0123456789abcdef"
names:       .asciz "#DE", "#DB", "NMI", "#BP", "#OF", "#BR", "#UD", "#NM"
             .asciz "#DF", "cop", "#TS", "#NP", "#SS", "#GP", "#PF"
says_code:   .asciz " error code "
says_cr2:    .asciz " cr2 "
says_triple: .asciz "now a triple fault\n"

        .balign 8
gdt:
        .quad   0
        .quad   0x00209a0000000000      # code, 64 bit
        .quad   0x0000920000000000      # data
        .quad   0x0000120000000000      # data, not present
gdt_end:
gdt_pointer:
        .word   gdt_end - gdt - 1
        .quad   gdt
idt_pointer:
        .word   idt_end - idt - 1
        .quad   idt
no_idt:
        .word   0
        .quad   0

        .bss
        .balign 16
idt:    .skip   15 * 16
idt_end:
        .skip   1024
stack_top:
