# hello: the smallest guest that says something.
#
# It runs in real mode, the state every x86 processor wakes up in: 16-bit registers, no paging, and
# a segment that starts where its register says, times 16. The host sets all segments to 0, so an
# offset is a physical address.

        .intel_syntax noprefix
        .code16

start:
        mov     si, offset message      # DS:SI walks through the text
next:
        lodsb                           # AL = byte at DS:SI, SI += 1
        test    al, al
        jz      done
        out     0xe9, al                # leaves the guest: KVM_EXIT_IO, port 0xe9, one byte
        jmp     next
done:
        hlt                             # leaves the guest for good: KVM_EXIT_HLT

message:
        .asciz  "Hello, KVM!\n"
