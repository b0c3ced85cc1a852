"""A program under KVM that plays with a PCI bus: configuration, moving BARs, registers, ports."""

from __future__ import annotations

from random import Random

import pykvm
from pykvm import result as reasons
from pykvm.arch.x86_64 import pc
from pykvm.virtio import Console, Rng
from tests.hostile.guest import Lost, Outcome
from tests.hostile.program import CHOOSE, NEXT
from tests.support.vring_driver import WRITE, Driver

CODE, RING, BUFFER = 0x8000, 0x120000, 0x130000
WINDOW = 0x10000
"""Of the addresses from pc.PCI_MEMORY on, so many bytes are played with: all that is there."""

SOURCE = (
    """
        # r15: random numbers. r14: operations left.
    loop:
        dec     r14
        js      finish
        call    next
        mov     r8, rax
"""
    + CHOOSE
    + """
        .long put - table, put - table, put - table, get - table
        .long get - table, start - table, register - table, register - table
        .long register - table, register - table, look - table, look - table
        .long any - table, port - table, port - table, restore - table

    # A register of configuration space, of one of four devices, at 0xcf8 and, from DX on, its data.
    select:
        mov     eax, r8d
        and     eax, 0x18fc
        test    r8d, 0x10000            # the beginning is more interesting
        jnz     1f
        and     eax, 0x183c
    1:
        or      eax, 0x80000000
        mov     dx, 0xcf8
        out     dx, eax
        mov     edx, r8d
        shr     edx, 20
        and     edx, 3
        add     edx, 0xcfc
        ret
    put:
        call    select
        call    next
        test    eax, 0x100000           # small numbers are more interesting
        jz      1f
        and     eax, 0xff07
    1:
        bt      r8d, 24
        jc      1f
        out     dx, eax
        jmp     loop
    1:
        bt      r8d, 25
        jc      1f
        out     dx, ax
        jmp     loop
    1:
        out     dx, al
        jmp     loop
    get:
        call    select
        bt      r8d, 24
        jc      1f
        in      eax, dx
        jmp     loop
    1:
        in      al, dx
        jmp     loop

    # A driver's start, at the registers of the BAR where it was at first: whoever is there now.
    start:
        mov     edi, r8d
        and     edi, 0x4000
        add     edi, PCI_MEMORY
        mov     byte ptr [rdi + 20], 0
        mov     byte ptr [rdi + 20], 3
        mov     dword ptr [rdi + 8], 1
        mov     dword ptr [rdi + 12], 1
        mov     byte ptr [rdi + 20], 11
        mov     word ptr [rdi + 22], 0
        mov     word ptr [rdi + 24], 8
        mov     dword ptr [rdi + 32], RING
        mov     dword ptr [rdi + 36], 0
        mov     dword ptr [rdi + 40], RING + 0x1000
        mov     dword ptr [rdi + 48], RING + 0x2000
        mov     word ptr [rdi + 28], 1
        mov     dword ptr [RING], BUFFER
        mov     dword ptr [RING + 8], 16
        mov     word ptr [RING + 12], 2
        mov     dword ptr [RING + 0x1000], 0
        mov     byte ptr [rdi + 20], 15
        jmp     loop

    # A field of the common configuration, of its own width or another.
    register:
        mov     edi, r8d
        and     edi, 0x403f
        add     edi, PCI_MEMORY
        call    next
        bts     eax, 31                 # no ring is to be where this program is
        bt      r8d, 20
        jc      1f
        and     eax, 15
    1:
        bt      r8d, 21
        jc      1f
        mov     [rdi], eax
        jmp     loop
    1:
        bt      r8d, 22
        jc      1f
        mov     [rdi], ax
        jmp     loop
    1:
        mov     [rdi], al
        jmp     loop

    look:
        mov     edi, r8d
        and     edi, 0xfff8
        add     edi, PCI_MEMORY
        bt      r8d, 20
        jc      1f
        mov     eax, [rdi]
        jmp     loop
    1:
        mov     rax, [rdi]
        jmp     loop
    any:
        mov     edi, r8d
        and     edi, 0xfff8
        add     edi, PCI_MEMORY
        call    next
        mov     [rdi], rax
        jmp     loop
    port:
        mov     edx, r8d
        and     edx, 0x1f
        add     edx, PCI_PORTS
        inc     word ptr [RING + 0x1002]
        mov     eax, r8d
        shr     eax, 16
        out     dx, ax
        jmp     loop

    # Both devices are where they were at first, and switched on.
    restore:
        xor     r9d, r9d
    1:
        mov     r10d, r9d
        shl     r10d, 11
        add     r10d, 0x80000800
        mov     esi, 0x10
        mov     eax, r9d
        shl     eax, 14
        add     eax, PCI_MEMORY
        call    config
        mov     esi, 0x14
        mov     eax, r9d
        shl     eax, 3
        add     eax, PCI_PORTS
        call    config
        mov     esi, 0x04
        mov     eax, 7
        call    config
        inc     r9d
        cmp     r9d, 2
        jb      1b
        jmp     loop
    config:                             # EAX into register ESI of the device in R10D
        mov     r11d, eax
        lea     eax, [r10 + rsi]
        mov     dx, 0xcf8
        out     dx, eax
        mov     eax, r11d
        mov     dx, 0xcfc
        out     dx, eax
        ret

    finish:
        mov     al, 0
        out     0xf4, al

"""
    + NEXT
)


def run(operations: int, seed: int, io: str = "sync", timeout: float | None = None) -> Outcome:
    """Run the program, and see that a driver finds both devices well afterwards; raises Lost.

    The machine has no interrupt controller: a guest may have itself interrupted to death by MSIs,
    and is welcome to it.
    """
    names = {"RING": RING, "BUFFER": BUFFER, "PCI_MEMORY": pc.PCI_MEMORY, "PCI_PORTS": pc.PCI_PORTS}
    constants = "".join(f".equ {name}, {value:#x}\n" for name, value in names.items())
    with pykvm.Machine("2M") as m:
        devices = [m.virtio(Rng(rate=None), io=io, transport="pci")]
        devices.append(m.virtio(Console(keep=1 << 16), io=io, transport="pci"))  # type: ignore[arg-type]
        m.debug_exit()
        m.mmio.unclaimed("ignore")
        m.pio.unclaimed("ignore")
        m.load(pykvm.asm(constants + SOURCE, mode="long64", at=CODE), at=CODE)
        m.cpu.enter("long64", entry=CODE)
        m.cpu.r14 = operations
        m.cpu.r15 = Random(seed).getrandbits(64) | 1
        result = m.run(timeout=timeout)
        if result.reason != reasons.DEBUG_EXIT or result.code != 0:
            raise Lost(f"the run ended: {result}, {m.cpu.r14} operations left, {m.devices}")
        states = {device.status for device in devices}
        for index, device in enumerate(devices):
            _prove(m, device, index)
        return Outcome(operations, len(states), result)


def _prove(m: pykvm.Machine, device: pykvm.virtio.VirtioDevice, index: int) -> None:
    """Drive the device from here as a driver that does it right."""
    driver = Driver(m.memory, 8, desc=RING, driver=RING + 0x1000, device=RING + 0x2000)
    m.memory.fill(RING, 0x3000)
    device.write_status(0)
    device.write_status(3)
    device.write_features(1, 1)
    device.write_status(11)
    for part, gpa in (("desc", RING), ("driver", RING + 0x1000), ("device", RING + 0x2000)):
        device.queue_set(index, f"{part}_low", gpa)
        device.queue_set(index, f"{part}_high", 0)
    device.queue_set(index, "size", 8)
    device.queue_set(index, "ready", 1)
    device.write_status(15)
    driver.send((BUFFER, 16, 0 if index else WRITE))
    device.notify(index)
    if not driver.used():
        raise Lost(f"a fresh driver was not served: {device!r}")
