# exits: what makes a guest leave guest mode, and what does not.
#
# The host keeps a counter for each of the three kinds of exit used here (see README.md):
#
#       port 0x510, 32 bits     reads as the number of accesses to port 0x51c so far
#       port 0x514, 32 bits     reads as the number of accesses to 0xd0000000..0xd0000fff
#       port 0x518, 32 bits     reads as the number of times the guest halted
#       port 0x51c              is there to be accessed
#
# Protected mode with flat segments and paging off: every address is a physical address, and one
# that is not RAM is memory-mapped I/O.

        .intel_syntax noprefix
        .code32

        .equ    PIO_COUNT, 0x510
        .equ    MMIO_COUNT, 0x514
        .equ    HLT_COUNT, 0x518
        .equ    SCRATCH, 0x51c
        .equ    WINDOW, 0xd0000000      # far above the RAM of this guest

start:
        mov     esp, offset stack_top

# 1. Work that never leaves the guest: registers and RAM. A billion of these would cost no exit.
        mov     ecx, 1000
work:
        add     dword ptr [scratch], ecx
        loop    work
        mov     esi, offset after_work
        call    report

# 2. Port I/O: every IN and OUT leaves, whatever its width.
        mov     dx, SCRATCH
        mov     eax, 0x12345678
        out     dx, al                  # 1 byte
        out     dx, ax                  # 2 bytes
        out     dx, eax                 # 4 bytes
        in      al, dx
        in      eax, dx
        mov     esi, offset after_pio
        call    report

# 3. Memory-mapped I/O: an ordinary MOV that leaves because nothing backs the address. KVM decodes
#    the instruction and tells the host address, width and data.
        mov     [WINDOW], al
        mov     [WINDOW + 0x10], ax
        mov     [WINDOW + 0x20], eax
        mov     eax, [WINDOW + 0x30]
        mov     esi, offset after_mmio
        call    report

# 4. HLT: the host may enter the guest again, which then goes on behind the HLT.
        hlt
        hlt
        hlt
        mov     esi, offset after_hlt
        call    report

# End with exit code 0. HLT would not do: this host wakes us up.
        xor     eax, eax
        out     0xf4, al

# report: print the text at ESI, then the three counters as the host sees them now.
report:
        call    puts
        mov     edx, PIO_COUNT
        call    put_counter
        mov     edx, MMIO_COUNT
        call    put_counter
        mov     edx, HLT_COUNT
        call    put_counter
        mov     al, '\n'
        out     0xe9, al
        ret

# put_counter: a space and the decimal number (below 100) read from port DX.
put_counter:
        mov     al, ' '
        out     0xe9, al
        in      eax, dx
        mov     bl, 10
        div     bl                      # AL = tens, AH = units
        add     ax, 0x3030              # both to ASCII
        out     0xe9, al
        mov     al, ah
        out     0xe9, al
        ret

# puts: print the text at ESI up to its NUL.
puts:
        lodsb
        test    al, al
        jz      1f
        out     0xe9, al
        jmp     puts
1:      ret

after_work: .asciz "          pio mmio hlt\nregisters"
after_pio:  .asciz "pio      "
after_mmio: .asciz "mmio     "
after_hlt:  .asciz "hlt      "

        .bss
scratch: .skip  4
        .skip   256
stack_top:
