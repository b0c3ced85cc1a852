"""The programs that a hostile guest runs, and what they share: dice, and a jump by them."""

from __future__ import annotations

CHOOSE = """
        call    next
        mov     ecx, eax
        and     ecx, 15
        lea     rdx, [rip + table]
        mov     ecx, [rdx + rcx * 4]
        add     rcx, rdx
        jmp     rcx

        .balign 4
    table:
"""
"""Goes to one of the sixteen places whose offsets from ``table`` follow it."""

NEXT = """
    next:                               # xorshift64
        mov     rax, r15
        shl     rax, 13
        xor     r15, rax
        mov     rax, r15
        shr     rax, 7
        xor     r15, rax
        mov     rax, r15
        shl     rax, 17
        xor     r15, rax
        mov     rax, r15
        ret
"""
"""A random number in RAX, and in R15 for the next one."""

SOURCE = (
    """
        .equ    WINDOWS, 0xd0000000
        .equ    SIZE, 8
        # r15: random numbers. r14: operations left. r13: played windows. rbx: the playground.
        # rdi: the window. r12: the index of what was made available last.
    start:
        movabs  rbx, PLAY
        mov     edi, WINDOWS
        call    init
    loop:
        dec     r14
        js      finish
        mov     rax, r14
        and     eax, 0x7ff
        jz      proof
    after_proof:
"""
    + CHOOSE
    + """
        .long descriptor - table, descriptor - table, descriptor - table, descriptor - table
        .long offer - table, offer - table, offer - table, scribble - table
        .long load - table, load - table, store - table, store - table
        .long again - table, ring - table, acknowledge - table, anywhere - table

    # A descriptor: the address in the playground, mostly; a short length; any flags.
    descriptor:
        call    next
        mov     r8, rax
        and     r8d, 7
        shl     r8d, 4
        shr     rax, 8
        mov     ecx, eax
        and     ecx, 0x7ffff
        lea     rsi, [rbx + rcx]
        mov     [rbx + r8], rsi
        call    next
        mov     ecx, eax
        and     ecx, 0x3ff
        mov     [rbx + r8 + 8], ecx
        shr     rax, 16
        mov     ecx, eax
        and     ecx, 3
        test    eax, 0x1f00
        jnz     1f
        or      ecx, 4
    1:
        mov     [rbx + r8 + 12], cx
        shr     rax, 16
        and     eax, 7
        mov     [rbx + r8 + 14], ax
        jmp     loop

    # One more is made available, and the doorbell rung.
    offer:
        call    next
        and     eax, 7
        mov     ecx, r12d
        and     ecx, SIZE - 1
        mov     [rbx + 0x1004 + rcx * 2], ax
        inc     r12d
        mov     [rbx + 0x1002], r12w
        mov     [rdi + 0x50], r13d
        jmp     loop

    # Any bytes, anywhere in the ring or the first buffers.
    scribble:
        call    next
        mov     ecx, eax
        and     ecx, 0x3fff
        shr     rax, 20
        test    eax, 1
        jz      1f
        mov     [rbx + rcx], ax
        jmp     loop
    1:
        test    eax, 2
        jz      1f
        mov     [rbx + rcx], eax
        jmp     loop
    1:
        mov     [rbx + rcx], rax
        jmp     loop

    # A load of any width from anywhere in the window.
    load:
        call    next
        mov     ecx, eax
        and     ecx, 0xff8
        test    eax, 0x10000
        jz      1f
        and     ecx, 0x178
    1:
        mov     edx, eax
        shr     edx, 20
        and     edx, 7
        add     ecx, edx
        bt      eax, 28
        jc      1f
        mov     eax, [rdi + rcx]
        jmp     loop
    1:
        bt      eax, 29
        jc      1f
        movzx   eax, byte ptr [rdi + rcx]
        jmp     loop
    1:
        bt      eax, 30
        jc      1f
        movzx   eax, word ptr [rdi + rcx]
        jmp     loop
    1:
        mov     rax, [rdi + rcx]
        jmp     loop

    # A store to a register, of a small number or of any.
    store:
        call    next
        mov     ecx, eax
        and     ecx, 0x1fc
        shr     rax, 16
        test    eax, 0x1000
        jnz     1f
        and     eax, 15
    1:
        mov     [rdi + rcx], eax
        jmp     loop

    # Any width, any place, any value.
    anywhere:
        call    next
        mov     ecx, eax
        and     ecx, 0xff7
        shr     rax, 16
        test    eax, 1
        jz      1f
        mov     [rdi + rcx], al
        jmp     loop
    1:
        test    eax, 2
        jz      1f
        mov     [rdi + rcx], ax
        jmp     loop
    1:
        mov     [rdi + rcx], rax
        jmp     loop

    ring:
        call    next
        shr     eax, 30
        mov     [rdi + 0x50], eax
        jmp     loop

    acknowledge:
        mov     eax, [rdi + 0x60]
        mov     [rdi + 0x64], eax
        mov     eax, [rdi + 0x70]
        test    eax, 64                 # it asks for a reset: now and then it gets one
        jz      loop
        call    init
        jmp     loop

    # Another device, and a fresh start of it.
    again:
        call    next
        shr     eax, 8
        and     eax, 0x3000
        cmp     eax, 0x3000             # there are three
        jne     1f
        xor     eax, eax
    1:
        lea     edi, [rax + WINDOWS]
        call    init
        jmp     loop

    # init: reset the device at RDI and start its queue R13D, with event indices and indirect
    # tables if RAX says so. Its queue is 0, or 1 of the console.
    init:
        mov     r13d, edi
        shr     r13d, 12
        and     r13d, 1
        mov     dword ptr [rdi + 0x70], 0
        mov     dword ptr [rdi + 0x70], 1
        mov     dword ptr [rdi + 0x70], 3
        mov     dword ptr [rdi + 0x24], 0
        call    next
        and     eax, 0x30000000
        mov     [rdi + 0x20], eax
        mov     dword ptr [rdi + 0x24], 1
        mov     dword ptr [rdi + 0x20], 1
        mov     dword ptr [rdi + 0x70], 11
        mov     [rdi + 0x30], r13d
        mov     dword ptr [rdi + 0x38], SIZE
        lea     rax, [rbx]
        mov     [rdi + 0x80], eax
        lea     rax, [rbx + 0x1000]
        mov     [rdi + 0x90], eax
        lea     rax, [rbx + 0x2000]
        mov     [rdi + 0xa0], eax
        shr     rax, 32
        mov     [rdi + 0x84], eax
        mov     [rdi + 0x94], eax
        mov     [rdi + 0xa4], eax
        mov     dword ptr [rbx + 0x1000], 0
        mov     dword ptr [rbx + 0x1014], 0
        mov     dword ptr [rbx + 0x2000], 0
        xor     r12d, r12d
        mov     dword ptr [rdi + 0x44], 1
        mov     dword ptr [rdi + 0x70], 15
        ret

    # Whatever came before, a driver that does it right is served.
    proof:
        call    prove
        jmp     after_proof
    finish:
        call    prove
        xor     eax, eax
        out     0xf4, al
    prove:
        mov     edi, WINDOWS + 0x2000   # the disk takes more than one buffer: only that it starts
        call    init
        mov     eax, [rdi + 0x70]
        cmp     eax, 15
        je      1f
        mov     al, 2
        out     0xf4, al
    1:
        mov     edi, WINDOWS
        call    prove_one
        mov     edi, WINDOWS + 0x1000
    prove_one:
        call    init
        lea     rax, [rbx + 0x3000]
        mov     [rbx], rax
        mov     dword ptr [rbx + 8], 16
        mov     eax, r13d
        xor     eax, 1
        shl     eax, 1                  # the first device writes, the second reads
        mov     [rbx + 12], eax
        mov     word ptr [rbx + 0x1004], 0
        mov     word ptr [rbx + 0x1002], 1
        mov     r12d, 1
        mov     [rdi + 0x50], r13d
        mov     ecx, PATIENCE           # a device that another thread serves takes a while
    1:
        cmp     word ptr [rbx + 0x2002], 1
        je      1f
        pause
        dec     ecx
        jnz     1b
        mov     al, 1
        out     0xf4, al
    1:
        mov     eax, [rdi + 0x70]
        cmp     eax, 15
        je      1f
        mov     al, 2
        out     0xf4, al
    1:
        ret

"""
    + NEXT
)

FLOOD = """
        # r14: doorbells left. The console's first queue is started; its emergency write shows that
        # somebody is still there.
        mov     edi, 0xd0000000
        mov     esi, 0xd0001108
        mov     al, '.'
    again:
        mov     ecx, 1000
    1:
        mov     dword ptr [rdi + 0x50], 0
        dec     ecx
        jnz     1b
        mov     [rsi], al
        sub     r14, 1000
        ja      again
        mov     al, 0
        out     0xf4, al
    forever:
        jmp     forever
"""
