# virtio: a driver in its smallest form. It starts two devices, reads 16 random bytes from the one
# and writes a line to the other, with every step of a split virtqueue by hand.
#
# Numbers in brackets are clauses of the specification, virtio 1.2.
#
# The host enters in long mode with RAM identity-mapped, and has two virtio-mmio windows. There are
# no interrupts here: the guest looks at the used ring until its buffer is back.

        .intel_syntax noprefix
        .code64

        .equ    RNG, 0xd0000000         # windows: one page each
        .equ    CONSOLE, 0xd0001000

# Registers of a window (4.2.2), all 32 bits wide.
        .equ    MAGIC, 0x000            # "virt"
        .equ    VERSION, 0x004          # 2
        .equ    DEVICE_ID, 0x008
        .equ    DEVICE_FEATURES, 0x010
        .equ    DEVICE_FEATURES_SEL, 0x014
        .equ    DRIVER_FEATURES, 0x020
        .equ    DRIVER_FEATURES_SEL, 0x024
        .equ    QUEUE_SEL, 0x030
        .equ    QUEUE_SIZE_MAX, 0x034
        .equ    QUEUE_SIZE, 0x038
        .equ    QUEUE_READY, 0x044
        .equ    QUEUE_NOTIFY, 0x050
        .equ    INTERRUPT_STATUS, 0x060
        .equ    INTERRUPT_ACK, 0x064
        .equ    STATUS, 0x070
        .equ    QUEUE_DESC, 0x080       # 64 bits each, in two halves
        .equ    QUEUE_DRIVER, 0x090
        .equ    QUEUE_DEVICE, 0x0a0

# Bits of the status (2.1).
        .equ    ACKNOWLEDGE, 1
        .equ    DRIVER, 2
        .equ    DRIVER_OK, 4
        .equ    FEATURES_OK, 8

        .equ    ENTROPY, 4              # device types (5)
        .equ    CONSOLE_ID, 3
        .equ    TRANSMIT, 1             # the console's queue for output (5.3.2)

# The ring: three tables of ours (2.7). Each queue has a page for them.
        .equ    SIZE, 4                 # entries; a power of two
        .equ    DESC, 0x000             # 16 bytes each: address, length, flags, next
        .equ    AVAIL, 0x400            # flags, index, then SIZE numbers of descriptors
        .equ    USED, 0x800             # flags, index, then SIZE pairs of number and length
        .equ    WRITE, 2                # descriptor flag: the device writes into the buffer

        .equ    RNG_RING, 0x20000
        .equ    CONSOLE_RING, 0x21000
        .equ    RANDOM, 0x22000         # 16 bytes
        .equ    STACK, 0x30000

main:
        mov     esp, STACK

# Sixteen random bytes: one buffer that the device writes.
        mov     edi, RNG
        mov     ebp, RNG_RING
        mov     ecx, ENTROPY
        xor     edx, edx                # its only queue
        call    start
        mov     eax, RANDOM
        mov     ecx, 16
        mov     esi, WRITE
        call    request
        cmp     eax, 16                 # it may give fewer (5.4.6.2); ours does not
        jne     failed
        mov     rax, [RANDOM]
        or      rax, [RANDOM + 8]
        jz      failed                  # once in 2**128 runs this is wrong

# A line: one buffer that the device reads; a second line in the same ring.
        mov     edi, CONSOLE
        mov     ebp, CONSOLE_RING
        mov     ecx, CONSOLE_ID
        mov     edx, TRANSMIT
        call    start
        lea     rax, [rip + hello]
        mov     ecx, hello_end - hello
        xor     esi, esi
        call    request
        lea     rax, [rip + random]
        mov     ecx, random_end - random
        xor     esi, esi
        call    request
        mov     al, 0
        out     0xf4, al

failed:
        mov     al, 1
        out     0xf4, al

# start: bring up the device in the window RDI and its queue EDX, as 3.1.1 has it.
#   ECX: the device type it must have. RBP: where its ring is, a page of zeros.
start:
# 0. Is it there? A window without a device has type 0.
        cmp     dword ptr [rdi + MAGIC], 0x74726976
        jne     failed
        cmp     dword ptr [rdi + VERSION], 2
        jne     failed
        cmp     [rdi + DEVICE_ID], ecx
        jne     failed

# 1. Reset it. 2., 3. We have seen it, and know how to drive it.
        mov     dword ptr [rdi + STATUS], 0
        mov     dword ptr [rdi + STATUS], ACKNOWLEDGE
        mov     dword ptr [rdi + STATUS], ACKNOWLEDGE + DRIVER

# 4. Features: of all that it offers take one, bit 32, VERSION_1: without it there is no modern
# device. Features come 32 at a time; which ones, the selector says.
        mov     dword ptr [rdi + DEVICE_FEATURES_SEL], 1
        mov     eax, [rdi + DEVICE_FEATURES]
        test    eax, 1
        jz      failed
        mov     dword ptr [rdi + DRIVER_FEATURES_SEL], 0
        mov     dword ptr [rdi + DRIVER_FEATURES], 0
        mov     dword ptr [rdi + DRIVER_FEATURES_SEL], 1
        mov     dword ptr [rdi + DRIVER_FEATURES], 1

# 5., 6. Does it work with these? If not, the bit does not stay.
        mov     dword ptr [rdi + STATUS], ACKNOWLEDGE + DRIVER + FEATURES_OK
        mov     eax, [rdi + STATUS]
        test    eax, FEATURES_OK
        jz      failed

# 7. The queue: how large, and where its three tables are (4.2.3.2).
        mov     [rdi + QUEUE_SEL], edx
        cmp     dword ptr [rdi + QUEUE_SIZE_MAX], SIZE
        jb      failed
        mov     dword ptr [rdi + QUEUE_SIZE], SIZE
        lea     eax, [rbp + DESC]
        mov     [rdi + QUEUE_DESC], eax
        mov     dword ptr [rdi + QUEUE_DESC + 4], 0
        lea     eax, [rbp + AVAIL]
        mov     [rdi + QUEUE_DRIVER], eax
        mov     dword ptr [rdi + QUEUE_DRIVER + 4], 0
        lea     eax, [rbp + USED]
        mov     [rdi + QUEUE_DEVICE], eax
        mov     dword ptr [rdi + QUEUE_DEVICE + 4], 0
        mov     dword ptr [rdi + QUEUE_READY], 1

# 8. It is alive.
        mov     dword ptr [rdi + STATUS], ACKNOWLEDGE + DRIVER + FEATURES_OK + DRIVER_OK
        ret

# request: hand the device a buffer, and wait until it is back.
#   RDI: window. RBP: ring. EDX: queue. RAX: the buffer. ECX: its length. ESI: 0 or WRITE.
#   Returns in EAX how many bytes the device wrote.
request:
        movzx   ebx, word ptr [rbp + AVAIL + 2] # how many we have ever made available
        mov     r8d, ebx
        and     r8d, SIZE - 1           # the entry that comes next, and the descriptor we take

# a. Describe the buffer. One descriptor, no chain: flags without NEXT (2.7.5).
        mov     r9d, r8d
        shl     r9d, 4
        mov     [rbp + DESC + r9], rax
        mov     [rbp + DESC + r9 + 8], ecx
        mov     [rbp + DESC + r9 + 12], si
        mov     word ptr [rbp + DESC + r9 + 14], 0

# b. Put the descriptor's number into the available ring, and then, not before, count the index up:
# the device may look at any time. A PC shows stores to others in their order; other processors need
# a barrier here (2.7.13).
        mov     [rbp + AVAIL + 4 + r8 * 2], r8w
        lea     eax, [rbx + 1]
        mov     [rbp + AVAIL + 2], ax

# c. Ring the doorbell: the number of the queue (4.2.3.3).
        mov     [rdi + QUEUE_NOTIFY], edx

# d. Wait. The device puts number and length into the used ring, then counts its index up (2.7.8).
wait:
        cmp     [rbp + USED + 2], ax
        jne     wait
        cmp     [rbp + USED + 4 + r8 * 8], r8d          # is it our buffer?
        jne     failed
        mov     ecx, [rbp + USED + 4 + r8 * 8 + 4]

# e. It has raised an interrupt, too; take it back, as a handler would (4.2.2).
        mov     eax, [rdi + INTERRUPT_STATUS]
        test    eax, 1
        jz      failed
        mov     [rdi + INTERRUPT_ACK], eax
        mov     eax, ecx
        ret

hello:  .ascii  "Hello through a queue!\n"
hello_end:
random: .ascii  "Sixteen random bytes came through another.\n"
random_end:
