# smp-sipi: one processor starts the others, as firmware and kernels do.
#
# A processor with a local APIC (the host asks KVM for an in-kernel interrupt controller) sends
# interrupts to others by writing to its interrupt command register, ICR. INIT resets a processor,
# which then waits; the start-up interrupt, SIPI, carries a page number: the processor wakes up in
# real mode at CS = page * 0x100, IP = 0 (SDM volume 3, "Multiple-Processor Initialization"; APM
# volume 2, "Initialization and Reset").
#
# EDI is the number of this processor, 0, and ESI how many there are: the only word from the host.

        .intel_syntax noprefix
        .code32

        .equ    APIC, 0xfee00000        # where every local APIC is seen by its own processor
        .equ    APIC_ICR, 0x300         # a write to its lower half sends
        .equ    APIC_SVR, 0xf0          # spurious vector; bit 8 switches the APIC on
        .equ    ALL_BUT_ME, 3 << 18     # destination shorthand
        .equ    ASSERT, 1 << 14
        .equ    INIT, 5 << 8
        .equ    SIPI, 6 << 8
        .equ    SENDING, 1 << 12        # reads as 1 until the interrupt is under way
        .equ    PAGE, 0x9               # the others start at 0x9000
        .equ    ROUNDS, 1000

start:
        mov     ebx, esi
        mov     esp, 0x8000
        mov     ebp, APIC
        mov     eax, [ebp + APIC_SVR]
        or      eax, 0x100
        mov     [ebp + APIC_SVR], eax

        mov     esi, offset says_first
        call    puts
        mov     eax, ALL_BUT_ME + ASSERT + INIT
        call    send
        mov     eax, ALL_BUT_ME + ASSERT + SIPI + PAGE  # twice on real hardware, 200 us apart
        call    send

# Wait until the others have finished, then look at what they did. We do not count ourselves.
        dec     ebx
wait_for_others:
        pause
        cmp     [finished], ebx
        jne     wait_for_others
        imul    eax, ebx, ROUNDS
        cmp     [counter], eax
        jne     bad
        mov     esi, offset says_done
        call    puts

# With an in-kernel APIC, HLT waits for an interrupt inside KVM and never comes back to the host.
# Exit code 0 ends the run instead, while the others sleep.
        xor     eax, eax
        out     0xf4, al

bad:
        mov     al, 1
        out     0xf4, al

send:
        mov     [ebp + APIC_ICR], eax
1:
        pause
        test    dword ptr [ebp + APIC_ICR], SENDING
        jnz     1b
        ret

puts:
        lodsb
        test    al, al
        jz      1f
        out     0xe9, al
        jmp     puts
1:      ret

says_first: .asciz "one processor runs, the others wait for their start-up interrupt\n"
says_done:  .asciz "they came up in real mode and counted together\n"

        .balign 64
counter:  .skip 64
finished: .skip 64

# The other processors, all at once, each with CS = 0x900 and IP = 0. A stack they do not need.
        .org    0x1000                  # loaded at 0x8000, so this is page 9
        .code16
other:
        cli
        xor     ax, ax
        mov     ds, ax
        mov     cx, ROUNDS
1:
        lock inc dword ptr counter
        loop    1b
        lock inc dword ptr finished
2:
        hlt
        jmp     2b
