# crt0: the first instructions of a guest in C.
#
# The loader has zeroed .bss. What is left: a stack, and somebody to call main and to pass on what
# it returns.

        .file   "crt0.S"
        .intel_syntax noprefix
        .code64

        .section .text.start, "ax"      # guest.ld puts it first
        .globl  _start
        .type   _start, @function
_start:
        lea     rsp, [rip + stack_top]  # 16-byte aligned before a CALL, as the ABI wants
        xor     ebp, ebp                # where a backtrace ends
        cld
        call    main
1:
        out     0xf4, al                # the exit code
        jmp     1b
        .size   _start, . - _start

        .section .bss.stack, "aw", @nobits
        .balign 16
        .skip   65536
stack_top:

        .section .note.GNU-stack, "", @progbits
