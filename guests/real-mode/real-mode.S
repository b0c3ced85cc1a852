# real-mode: segments and the interrupt vector table.
#
# In real mode a segment register holds a paragraph number: linear address = segment * 16 + offset.
# The first 1024 bytes of memory are the interrupt vector table (IVT): 256 far pointers, each
# offset first, then segment. INT n pushes FLAGS, CS and IP and jumps through entry n; IRET goes
# back. All of that without a single descriptor.

        .intel_syntax noprefix
        .code16

start:
        xor     ax, ax
        mov     ds, ax
        mov     es, ax
        mov     ss, ax
        mov     sp, 0x7c00              # the stack grows down from below our code

# 1. Two names for one byte: 1000:0234 and 1023:0004 are both 0x10234.
        mov     ax, 0x1000
        mov     es, ax
        mov     byte ptr es:[0x0234], 'A'
        mov     ax, 0x1023
        mov     es, ax
        mov     al, es:[0x0004]
        cmp     al, 'A'
        mov     si, offset says_alias
        call    check

# 2. The highest segment reaches beyond 1 MiB: ffff:0010 is 0x100000. The 8086 had 20 address lines
#    and came out at 0; the "A20 gate" of later PCs could keep it that way. KVM has no such gate.
        xor     ax, ax
        mov     es, ax
        mov     byte ptr es:[0x0600], 0 # 0000:0600 is where a wrapped ffff:0610 would land
        mov     ax, 0xffff
        mov     es, ax
        mov     byte ptr es:[0x0610], 1 # linear 0x100600
        cmp     byte ptr ds:[0x0600], 0
        mov     si, offset says_a20
        call    check

# 3. A software interrupt: entry 0x21 of the IVT lies at 0x21 * 4.
        mov     word ptr ds:[0x21 * 4], offset int21
        mov     word ptr ds:[0x21 * 4 + 2], cs
        mov     al, '*'
        int     0x21
returned:
        mov     si, offset says_int
        call    puts

# 4. A fault: #DE is vector 0. Since the 80286 the pushed IP is that of the faulting instruction,
#    not of the next one, so the handler has to step over the DIV or it would fault forever.
        mov     word ptr ds:[0], offset divide_error
        mov     word ptr ds:[2], cs
        mov     ax, 1
        xor     bl, bl
divides:
        div     bl                      # 2 bytes long
        mov     si, offset says_back
        call    puts
        hlt

# int21: print AL, then check that the three pushed words are what the manual says.
int21:
        out     0xe9, al
        push    bp
        mov     bp, sp
        cmp     word ptr [bp + 2], offset returned   # IP behind the INT
        jne     bad
        mov     ax, cs
        cmp     word ptr [bp + 4], ax                # CS
        jne     bad
        pop     bp
        iret                            # pops IP, CS, FLAGS

divide_error:
        push    bp
        mov     bp, sp
        cmp     word ptr [bp + 2], offset divides    # the DIV itself
        jne     bad
        add     word ptr [bp + 2], 2
        mov     si, offset says_de
        call    puts
        pop     bp
        iret

# check: print the text at SI if ZF is set, give up otherwise.
check:
        jne     bad
puts:
        lodsb
        test    al, al
        jz      1f
        out     0xe9, al
        jmp     puts
1:      ret

bad:
        mov     si, offset says_bad
        call    puts
        mov     al, 1
        out     0xf4, al                # ends the run with exit code 1

says_alias: .asciz "1000:0234 and 1023:0004 are the same byte\n"
says_a20:   .asciz "ffff:0610 is above 1 MiB, not at 0000:0600\n"
says_int:   .asciz " printed by INT 21h through the IVT\n"
says_de:    .asciz "#DE arrived through vector 0\n"
says_back:  .asciz "and execution went on behind the DIV\n"
says_bad:   .asciz "this is not how real mode works\n"
