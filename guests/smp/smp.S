# smp: several processors, one counter.
#
# The host starts every processor itself, all at the same address, and tells them apart by what it
# leaves in their registers:
#
#       EDI     the number of this processor, from 0 on
#       ESI     how many there are
#
# They call out in turn, add to one counter all at once, and the first one reports. (smp-sipi shows
# how a processor starts the others by itself.)

        .intel_syntax noprefix
        .code64

        .equ    ROUNDS, 1000
        .equ    STACK_SIZE, 256

start:
# A stack for each: stacks + (number + 1) * STACK_SIZE.
        lea     eax, [rdi + 1]
        imul    eax, STACK_SIZE
        lea     rsp, [rip + stacks]
        add     rsp, rax
        mov     r12d, edi               # keep both: puts uses RSI
        mov     r13d, esi

# One after the other: wait until [turn] is my number, then pass it on. PAUSE tells the processor,
# and a hypervisor, that this is a loop that waits.
        jmp     2f
1:
        pause
2:
        cmp     [turn], r12d
        jne     1b
        lea     rsi, [rip + says_here]
        call    puts
        mov     al, '0'
        add     al, r12b
        out     0xe9, al
        mov     al, '\n'
        out     0xe9, al
        inc     dword ptr [turn]        # only the processor whose turn it is writes here

# A barrier: nobody counts before all have called out.
1:
        pause
        cmp     [turn], r13d
        jne     1b

# All at once. Without LOCK two processors may read the same value and one addition is lost.
        mov     ecx, ROUNDS
1:
        mov     eax, 1
        lock xadd [counter], eax        # EAX = the old value, which nobody else got
        dec     ecx
        jnz     1b
        lock inc dword ptr [finished]

        test    r12d, r12d
        jz      first
        hlt                             # this processor is done; the run goes on

# The first processor waits for the others and reports. The last HLT ends the run.
first:
        pause
        cmp     [finished], r13d
        jne     first
        imul    r13d, r13d, ROUNDS
        cmp     [counter], r13d
        lea     rsi, [rip + says_right]
        je      1f
        lea     rsi, [rip + says_wrong]
1:
        call    puts
        hlt

puts:
        lodsb
        test    al, al
        jz      1f
        out     0xe9, al
        jmp     puts
1:      ret

says_here:  .asciz "here is processor "
says_right: .asciz "every addition counts: 1000 from each of them\n"
says_wrong: .asciz "additions were lost\n"

        .bss
        .balign 64
turn:     .skip 64                      # a cache line each: they are written by different processors
counter:  .skip 64
finished: .skip 64
stacks:
