# magic: a program that reads a message and has a bug, for a fuzzer to find.
#
# The message is at 0x20000 and its length, 8 bytes, at 0x1fff8. Every block counts in a cell of its
# own, at 0x30000: that is all a fuzzer needs to see that it got further.
#
# The host enters in long mode with RAM identity-mapped.

        .intel_syntax noprefix
        .code64

        .equ    LENGTH, 0x1fff8
        .equ    MESSAGE, 0x20000
        .equ    CELLS, 0x30000

        .macro  block number
        inc     byte ptr [CELLS + \number]
        .endm

start:
        block   0
        cmp     qword ptr [LENGTH], 0
        jne     1f
        lea     rsi, [rip + says_nothing]
        call    puts
        xor     eax, eax
        jmp     done
1:
        block   1
        mov     al, 1                   # too short
        cmp     qword ptr [LENGTH], 8
        jb      done

# The chain: a fuzzer that sees no more than "accepted" or "refused" would have to guess all of it
# at once, one try in 2^48.
        block   2
        mov     al, 2
        cmp     byte ptr [MESSAGE], 'K'
        jne     done
        block   3
        cmp     byte ptr [MESSAGE + 1], 'V'
        jne     done
        block   4
        cmp     byte ptr [MESSAGE + 2], 'M'
        jne     done
        block   5
        mov     cl, [MESSAGE + 3]       # a version that must be 7 with bit 5 flipped
        xor     cl, 0x20
        cmp     cl, 7
        jne     done
        block   6
        mov     cl, [MESSAGE + 4]       # and a check byte
        add     cl, [MESSAGE + 5]
        cmp     cl, 0xa5
        jne     done
        block   7
        mov     al, 0
        cmp     byte ptr [MESSAGE + 6], '!'
        jne     done

# The bug: nobody thought of this message. There is no IDT, so it ends in a triple fault.
        block   8
        ud2

done:
        out     0xf4, al
        hlt

puts:
        lodsb
        test    al, al
        jz      1f
        out     0xe9, al
        jmp     puts
1:      ret

says_nothing: .asciz "magic: there is no message\n"
