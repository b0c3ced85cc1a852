"""Virtio over PCI on a real KVM: found and driven by hand from long mode."""

from __future__ import annotations

import os
import re

import pytest

import pykvm
from pykvm import result as reasons
from pykvm.virtio import Console, Rng
from tests.kvm.test_virtio import GENEROUS
from tests.support import interrupts
from tests.support.vring_driver import WRITE, Driver

VECTOR = 0x51

FIND = """
    # Look for an entropy source on bus 0; then EBX is its configuration address, EDI and R12 are
    # its registers and doorbells.
        mov     ebx, 0x80000000
    look:
        mov     eax, ebx
        mov     edx, 0xcf8
        out     dx, eax
        mov     dl, 0xfc
        in      eax, dx
        cmp     eax, 0x10441af4
        je      found
        add     ebx, 0x800
        cmp     ebx, 0x80010000
        jb      look
        mov     al, 1
        out     0xf4, al
    found:
        lea     eax, [rbx + 4]
        mov     dl, 0xf8
        out     dx, eax
        mov     ax, 7                       # ports, memory, bus master
        mov     dl, 0xfc
        out     dx, ax
        lea     eax, [rbx + 0x10]
        mov     dl, 0xf8
        out     dx, eax
        mov     dl, 0xfc
        in      eax, dx
        mov     edi, eax
        lea     eax, [rbx + 0x14]
        mov     dl, 0xf8
        out     dx, eax
        mov     dl, 0xfc
        in      eax, dx
        mov     r12d, eax
        dec     r12d                        # the bit that says ports
"""

START = """
        mov     byte ptr [rdi + 20], 1      # ACKNOWLEDGE, DRIVER
        mov     byte ptr [rdi + 20], 3
        mov     dword ptr [rdi + 8], 1      # VERSION_1
        mov     dword ptr [rdi + 12], 1
        mov     byte ptr [rdi + 20], 11     # FEATURES_OK
        mov     word ptr [rdi + 22], 0      # the queue
        mov     word ptr [rdi + 24], 8
        mov     word ptr [rdi + 26], 1      # its vector
        mov     dword ptr [rdi + 32], 0x20000
        mov     dword ptr [rdi + 40], 0x21000
        mov     dword ptr [rdi + 48], 0x22000
        mov     word ptr [rdi + 28], 1
        mov     byte ptr [rdi + 20], 15     # DRIVER_OK
"""

RING = """
        mov     edx, r12d
        xor     eax, eax
        out     dx, ax
"""

POLL = """
    wait:
        movzx   eax, byte ptr [rdi + 0x800] # the ISR, which comes after the used index
        test    eax, eax
        jz      wait
        mov     [0x1f000], eax
        movzx   eax, byte ptr [rdi + 20]
        mov     [0x1f004], eax
        hlt
"""

MSIX = f"""
        mov     dword ptr [rdi + 0x3010], 0xfee00000
        mov     dword ptr [rdi + 0x3014], 0
        mov     dword ptr [rdi + 0x3018], {VECTOR}
        mov     dword ptr [rdi + 0x301c], 0
        lea     eax, [rbx + 0x40]           # the first capability: MSI-X, enable
        mov     edx, 0xcf8
        out     dx, eax
        mov     edx, 0xcfe
        mov     ax, 0x8000
        out     dx, ax
"""


def random_bytes(count: int) -> bytes:
    return (b"random" * count)[:count]


@pytest.mark.parametrize("io", ["sync", "thread"])
@pytest.mark.parametrize("doorbell", ["port", "memory"])
def test_a_guest_finds_the_device_and_reads_random_bytes(io: str, doorbell: str) -> None:
    ring = RING if doorbell == "port" else "mov word ptr [rdi + 0x2000], 0"
    with pykvm.Machine("2M") as m:
        rng = m.virtio(Rng(source=random_bytes), io=io, transport="pci")
        m.load(pykvm.asm(FIND + START + ring + POLL, mode="long64"), at=0x8000)
        m.cpu.enter("long64", entry=0x8000)
        driver = Driver(m.memory, 8, desc=0x20000, driver=0x21000, device=0x22000)
        driver.send((0x30000, 16, WRITE))
        result = m.run(timeout=GENEROUS).check()
        assert result.reason == reasons.HALTED and result.devices["rng"]["requests"] == 1
        assert m.mem.read(0x30000, 17) == b"randomrandomrand\0"
        assert driver.used() == [(0, 16)]
        assert (m.mem.u32[0x1F000], m.mem.u32[0x1F004]) == (1, 15)
        assert m.devices == {"rng": rng} and m.pci is not None


@pytest.mark.parametrize("irqchip", ["kernel", "split"])
def test_an_interrupt_comes_as_a_message(irqchip: str) -> None:
    set_up = FIND + START + MSIX + "mov ebx, 0xfee00000" + RING
    handler = """
        movzx   eax, byte ptr [0x22002]     # how many were used
        add     al, 0x40
        out     0xf4, al
    """
    with pykvm.Machine("2M", irqchip=irqchip) as m:
        if irqchip == "split":
            m.vm.need("KVM_CAP_SPLIT_IRQCHIP")
            for port in (0x21, 0xA1):
                m.pio.ignore(port)
        m.debug_exit()
        m.virtio(Rng(source=random_bytes))
        code = interrupts.guest(VECTOR, set_up, handler)
        m.load(pykvm.asm(code, mode="long64", at=0x8000))
        m.cpu.enter("long64", entry=0x8000)
        Driver(m.memory, 8, desc=0x20000, driver=0x21000, device=0x22000).send((0x30000, 16, WRITE))
        result = m.run(timeout=GENEROUS)
        assert (result.reason, result.code) == (reasons.DEBUG_EXIT, 0x41), result
        assert result.devices["rng"]["interrupts"] == 1


def test_lines_of_the_pic_still_work_beside_messages() -> None:
    """The table of routes is replaced as a whole."""
    with pykvm.Machine("2M", irqchip="kernel") as m:
        m.virtio(Rng())
        assert m.irqchip is not None
        lines = m.irqchip.messages(2)
        lines.route({0: (0xFEE0_0000, 0x51), 1: None})
        m.irqchip.line(5, 1)
        pic = m.vm.get_irqchip(pykvm.kvm.KVM_IRQCHIP_PIC_MASTER).chip.pic
        assert pic.irr >> 5 & 1
        m.irqchip.line(5, 0)
        lines.close()
        lines.close()


def test_who_gets_which_transport() -> None:
    with pykvm.Machine("2M") as m:
        m.virtio(Rng())
        assert m.pci is None
        m.virtio(Rng(), transport="pci")
        assert m.pci is not None and list(m.pci.functions) == [0, 1]
        assert m.virtio_windows == []  # without an irqchip there are no lines
    with pykvm.Machine("2M", irqchip=True) as m:
        m.virtio(Rng())
        m.virtio(Console(), transport="mmio")
        m.virtio(Rng(), gsi=5)
        assert m.pci is not None and list(m.pci.functions) == [0, 1]
        assert list(m.devices) == ["rng", "console", "rng1"]
        assert [gsi for _, _, gsi in m.virtio_windows] == [16, 5]
        with pytest.raises(ValueError, match="carrier pigeon"):
            m.virtio(Rng(), transport="carrier pigeon")
        with pytest.raises(ValueError, match="virtio-mmio"):
            m.virtio(Rng(), transport="pci", gsi=5)


def test_nothing_is_left_behind() -> None:
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(2):
        with pykvm.Machine("2M", irqchip=True) as m:
            m.virtio(Rng())
            m.virtio(Console())
            assert re.search("2 queues|Pci", repr(m._virtio.functions))  # type: ignore[union-attr]
    assert set(os.listdir("/proc/self/fd")) == before
