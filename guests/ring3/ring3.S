# ring3: a kernel and a user program in one file, with SYSCALL and SYSRET between them.
#
# The kernel prepares everything that ring 3 needs to exist: page tables that say which pages the
# user may touch, a GDT in the order SYSRET wants, four MSRs, a TSS with the stack for exceptions
# that come from ring 3. Then it leaves for the user program, which asks for services, computes,
# and twice tries what it must not.
#
# The host enters in long mode with RAM identity-mapped.

        .intel_syntax noprefix
        .code64

# Selectors. SYSCALL loads CS from STAR[47:32] and SS from the next descriptor. SYSRET to 64-bit
# code loads SS from STAR[63:48] + 8 and CS from STAR[63:48] + 16: hence the order.
        .equ    KERNEL_CODE, 0x08
        .equ    KERNEL_DATA, 0x10
        .equ    USER_BASE, 0x18         # 32-bit user code would be here
        .equ    USER_DATA, 0x20 + 3
        .equ    USER_CODE, 0x28 + 3
        .equ    TSS, 0x30

        .equ    MSR_EFER, 0xc0000080    # bit 0, SCE, switches SYSCALL on
        .equ    MSR_STAR, 0xc0000081    # selectors
        .equ    MSR_LSTAR, 0xc0000082   # where SYSCALL goes
        .equ    MSR_SFMASK, 0xc0000084  # RFLAGS bits that SYSCALL clears

        .equ    PML4, 0x10000           # page tables: four pages
        .equ    PDPT, 0x11000
        .equ    PD, 0x12000
        .equ    PT, 0x13000
        .equ    KERNEL_STACK, 0x15000   # the page below
        .equ    USER_STACK, 0x17000     # the page below

        .equ    PRESENT, 1
        .equ    WRITE, 2
        .equ    USER, 4

        .equ    SYS_PUTS, 1             # RSI: text
        .equ    SYS_EXIT, 2             # RDI: code

        .equ    SIZEOF_TSS, 104

# ---------------------------------------------------------------------------------------- kernel
kernel:
        mov     esp, KERNEL_STACK

# Page tables: 512 pages of 4 KiB, so that pages can differ. USER must be set on every level for
# the page to be the user's; on the last level it is set only for the user's pages.
        mov     dword ptr [PML4], PDPT + PRESENT + WRITE + USER
        mov     dword ptr [PDPT], PD + PRESENT + WRITE + USER
        mov     dword ptr [PD], PT + PRESENT + WRITE + USER
        mov     edi, PT
        mov     eax, PRESENT + WRITE
map:
        mov     [rdi], eax              # the upper halves are zero already
        add     eax, 0x1000
        add     edi, 8
        cmp     edi, PT + 0x1000
        jb      map
        mov     eax, offset user
        shr     eax, 12
        or      dword ptr [PT + rax * 8], USER
        xor     dword ptr [PT + rax * 8 + 8], USER + WRITE      # syscall_entry: not for writing
        or      dword ptr [PT + (USER_STACK - 0x1000) / 0x1000 * 8], USER
        mov     eax, PML4
        mov     cr3, rax

# GDT, TSS and IDT. The TSS descriptor needs the address of the TSS in pieces.
        lea     rax, [rip + tss]
        mov     [gdt_tss + 2], ax       # bits 15:0; bits 63:16 are 0
        lgdt    gdt_pointer
        mov     eax, KERNEL_DATA
        mov     ss, eax
        push    KERNEL_CODE
        lea     rax, [rip + 1f]
        push    rax
        retfq
1:
        mov     eax, TSS
        ltr     ax
        lea     rax, [rip + general_protection]
        lea     rdi, [rip + idt + 13 * 16]
        call    set_gate
        lea     rax, [rip + page_fault]
        lea     rdi, [rip + idt + 14 * 16]
        call    set_gate
        lea     rax, [rip + invalid_opcode]
        lea     rdi, [rip + idt + 6 * 16]
        call    set_gate
        lidt    idt_pointer

# The MSRs of SYSCALL. WRMSR writes EDX:EAX.
        mov     ecx, MSR_EFER
        rdmsr
        or      eax, 1
        wrmsr
        mov     ecx, MSR_STAR
        xor     eax, eax
        mov     edx, ((USER_BASE + 3) << 16) + KERNEL_CODE
        wrmsr
        mov     ecx, MSR_LSTAR
        lea     rax, [rip + syscall_entry]
        xor     edx, edx
        wrmsr
        mov     ecx, MSR_SFMASK
        mov     eax, 0x700              # IF, TF and DF are off in the kernel
        wrmsr

        lea     rsi, [rip + says_off]
        call    puts

# To ring 3: SYSRET takes RIP from RCX and RFLAGS from R11. It does not touch RSP.
        mov     ecx, offset user
        mov     r11d, 2                 # the bit that is always set
        mov     esp, USER_STACK
        sysretq

# enter_kernel: reached with CPL 0, from the page of syscall_entry below. RCX is the user's RIP, R11
# its RFLAGS, EAX the number. RSP is still the user's, and not to be trusted. (Several processors
# would use SWAPGS here, each to find its own memory.)
enter_kernel:
        mov     [user_rsp], rsp
        mov     esp, KERNEL_STACK
        push    rcx
        push    r11
        cmp     eax, SYS_PUTS
        jne     1f
        call    puts                    # a real kernel would check that RSI is the user's
        pop     r11
        pop     rcx
        mov     rsp, [user_rsp]
        sysretq
1:
        lea     rsi, [rip + says_cpl0]  # SYS_EXIT. How did SYSCALL bring us here?
        cmp     byte ptr [by_exception], 0
        je      1f
        lea     rsi, [rip + says_ud]
1:
        call    puts
        mov     al, dil
        out     0xf4, al

# invalid_opcode: the second way in, see syscall_entry. The processor has pushed SS, RSP, RFLAGS, CS
# and RIP on the stack from the TSS; take the user's RSP from there, and all is as SYSCALL leaves it.
invalid_opcode:
        cmp     qword ptr [rsp], offset second_way
        jne     bad
        mov     byte ptr [by_exception], 1
        mov     rsp, [rsp + 24]
        jmp     enter_kernel

# The two exceptions. Coming from ring 3, the processor has loaded RSP from the TSS and pushed SS,
# RSP, RFLAGS, CS, RIP and the error code there. Both go back to where RBX points.
general_protection:
        lea     rsi, [rip + says_gp]
        jmp     back
page_fault:
        mov     rax, cr2
        cmp     rax, offset kernel
        jne     bad
        cmp     dword ptr [rsp], 5      # bit 0: the page is present; bit 2: the access was the user's
        jne     bad
        lea     rsi, [rip + says_pf]
back:
        cmp     dword ptr [rsp + 16], USER_CODE
        jne     bad
        call    puts
        add     rsp, 8                  # the error code
        mov     [rsp], rbx              # a gift of the user: ring 3 again in any case
        iretq

bad:
        lea     rsi, [rip + says_bad]
        call    puts
        mov     al, 1
        out     0xf4, al

# set_gate: make the IDT entry at RDI lead to RAX (below 64 KiB).
set_gate:
        mov     [rdi], ax
        mov     word ptr [rdi + 2], KERNEL_CODE
        mov     word ptr [rdi + 4], 0x8e00
        ret

puts:
        lodsb
        test    al, al
        jz      1f
        out     0xe9, al
        jmp     puts
1:      ret

says_off:  .asciz "kernel: off to ring 3\n"
says_cpl0: .asciz "kernel: SYSCALL came with CPL 0\n"
says_ud:   .asciz "kernel: SYSCALL came with CPL 3 still, an exception did the rest\n"
says_gp:   .asciz "kernel: #GP, HLT is not for ring 3\n"
says_pf:   .asciz "kernel: #PF error code 5, that page is not the user's\n"
says_bad:  .asciz "kernel: this is not what was expected\n"

        .balign 8
gdt:
        .quad   0
        .quad   0x00209a0000000000      # 0x08 kernel code, 64 bit
        .quad   0x0000920000000000      # 0x10 kernel data
        .quad   0                       # 0x18 32-bit user code, if there were any
        .quad   0x0000f20000000000      # 0x20 user data, DPL 3
        .quad   0x0020fa0000000000      # 0x28 user code, 64 bit, DPL 3
gdt_tss:
        .quad   0x0000890000000000 + SIZEOF_TSS - 1     # 0x30 TSS, 16 bytes long
        .quad   0
gdt_end:
gdt_pointer:
        .word   gdt_end - gdt - 1
        .quad   gdt
idt_pointer:
        .word   idt_end - idt - 1
        .quad   idt

        .balign 8
tss:
        .long   0
        .quad   KERNEL_STACK            # RSP0: the stack for exceptions that come from ring 3
        .fill   SIZEOF_TSS - 12 - 2, 1, 0
        .word   SIZEOF_TSS              # where the I/O permission bitmap would start: there is none

        .balign 16
idt:    .skip   15 * 16
idt_end:
user_rsp:
        .quad   0
by_exception:
        .byte   0

# ------------------------------------------------------------------------------------------ user
        .balign 4096                    # a page of its own
user:
        mov     eax, cs
        and     eax, 3
        add     [digit], al             # '0' + CPL
        lea     rsi, [rip + says_cpl]
        call    print

# Work: native speed on every back end. Twenty million additions need no exit at all.
        mov     ecx, 10000000
        xor     eax, eax
1:
        add     rax, rcx
        dec     ecx
        jnz     1b
        mov     rcx, 50000005000000     # n * (n + 1) / 2
        cmp     rax, rcx
        jne     2f
        lea     rsi, [rip + says_sum]
        call    print
2:
        lea     rbx, [rip + 1f]
        mov     al, [kernel]            # the kernel's page: #PF
1:
        lea     rbx, [rip + 1f]
        hlt                             # a privileged instruction: #GP
1:
        mov     eax, SYS_EXIT
        mov     edi, 42
        syscall

print:
        mov     eax, SYS_PUTS
        syscall                         # RCX and R11 are lost
        ret

says_cpl: .ascii "user: my CPL is "
digit:    .asciz "0\n"
says_sum: .asciz "user: 1 + 2 + ... + 10000000 = 50000005000000\n"

# ----------------------------------------------------------------------------------- LSTAR's page
# What SYSCALL does: RCX = RIP, R11 = RFLAGS, RFLAGS &= ~SFMASK, CS and SS from STAR with CPL 0,
# RIP = LSTAR. This page would belong to the kernel alone. The user may execute it for one reason:
# some KVM back ends that emulate ring 0 do all of the above except raising the privilege
# (docs/backends.md). Then an exception on purpose does it; everything else stays the same.
        .balign 4096
syscall_entry:
        mov     edx, cs                 # so RDX is lost to the caller
        test    dl, 3
        jz      enter_kernel
second_way:
        ud2
