"""The UART on a real KVM: a guest that polls, and one that lives by its interrupts."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

import pykvm
from pykvm import kvm
from pykvm import result as reasons
from pykvm.arch.x86_64 import pc
from pykvm.arch.x86_64.pic import bios_state
from pykvm.devices.serial import Serial

GENEROUS = 60.0
"""Seconds; a run that needs them hangs."""

ECHO = """
    # IRQ 4 is vector 0x0c of a PIC as a BIOS leaves it; 0x20 ends the interrupt.
        mov ax, offset handler
        mov [0x0c * 4], ax
        mov word ptr [0x0c * 4 + 2], 0
        mov dx, 0x3fa
        mov al, 0x01            # FIFOs, an interrupt for every byte
        out dx, al
        mov dx, 0x3fc
        mov al, 0x0b            # DTR, RTS, OUT2
        out dx, al
        mov dx, 0x3f9
        mov al, 0x01            # interrupts of the receiver
        out dx, al
    idle:
        sti
        hlt
        jmp idle

    handler:                    # all there is, for an edge comes only once
        mov dx, 0x3fa
        in al, dx
        test al, 1
        jnz done
        mov dx, 0x3f8
        in al, dx
        cmp al, '.'
        je leave
        xor al, 0x20            # upper case for lower case
        out dx, al
        jmp handler
    leave:
        out 0xf4, al
    done:
        mov al, 0x20
        out 0x20, al
        iret
"""

PRINT = """
    # Sends a byte on each "transmitter empty", and looks at nothing else.
        mov ax, offset handler
        mov [0x0c * 4], ax
        mov word ptr [0x0c * 4 + 2], 0
        mov bl, 'a'
        mov dx, 0x3f9
        mov al, 0x02
        out dx, al
    idle:
        sti
        hlt
        jmp idle

    handler:
        mov dx, 0x3f8
        mov al, bl
        out dx, al
        inc bl
        cmp bl, 'z' + 1
        jne done
        out 0xf4, al
    done:
        mov al, 0x20
        out 0x20, al
        iret
"""

POLL = """
        mov esi, offset text
        mov ecx, 13
    next:
        mov dx, 0x3fd
    wait:
        in al, dx
        test al, 0x20
        jz wait
        mov dx, 0x3f8
        lodsb
        out dx, al
        loop next
        mov dx, 0x3fd
    listen:
        in al, dx
        test al, 1
        jz listen
        mov dx, 0x3f8
        in al, dx
        out 0xf4, al
        hlt
    text: .ascii "hello, polled"
"""


class Port:
    """A machine with PICs as a BIOS leaves them, and COM1 on GSI 4 through an irqfd."""

    def __init__(self) -> None:
        self.m = pykvm.Machine(memory="2M", irqchip=True)
        self.irq = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.m.vm.irqfd(self.irq, pc.COM1_GSI)
        for chip_id, name in (
            (kvm.KVM_IRQCHIP_PIC_MASTER, "master"),
            (kvm.KVM_IRQCHIP_PIC_SLAVE, "slave"),
        ):
            chip = self.m.vm.get_irqchip(chip_id)
            for member, value in bios_state(name, open_irqs=(pc.COM1_GSI,)).items():
                setattr(chip.chip.pic, member, value)
            self.m.vm.set_irqchip(chip)
        self.serial = Serial(irq=self.irq, flow_control=True)
        self.serial.attach(self.m.pio, pc.COM1)
        self.m.debug_exit()

    def run(self, text: str) -> pykvm.RunResult:
        self.m.load(pykvm.asm(text, mode="real16", at=0x8000))
        self.m.cpu.enter("real16", entry=0x8000)
        return self.m.run(timeout=GENEROUS)

    def close(self) -> None:
        self.m.close()
        self.serial.close()
        os.close(self.irq)


@pytest.fixture
def port(no_leak: None) -> Iterator[Port]:
    port = Port()
    yield port
    port.close()


pytestmark = [pytest.mark.cap("KVM_CAP_IRQCHIP"), pytest.mark.cap("KVM_CAP_IRQFD")]


def test_input_that_waits_for_the_guest_comes_back_by_interrupt(port: Port) -> None:
    port.serial.write(b"hello.")
    result = port.run(ECHO)
    assert (result.reason, result.code) == (reasons.DEBUG_EXIT, ord("."))
    assert port.serial.read() == b"HELLO"


def test_every_byte_typed_while_the_guest_sleeps_wakes_it(port: Port) -> None:
    text = b"each byte wakes a processor in hlt" * 4

    def type_slowly() -> None:
        for byte in text:
            port.serial.write(bytes([byte]))
            os.eventfd_read(consumed)
        port.serial.write(b".")

    consumed = port.serial.input_fileno()
    os.set_blocking(consumed, True)
    thread = threading.Thread(target=type_slowly)
    thread.start()
    assert port.run(ECHO).reason == reasons.DEBUG_EXIT
    thread.join(60)
    assert port.serial.read() == bytes(byte ^ 0x20 for byte in text)


def test_a_byte_is_sent_on_every_interrupt_of_the_transmitter(port: Port) -> None:
    result = port.run(PRINT)
    assert result.reason == reasons.DEBUG_EXIT
    assert port.serial.read() == b"abcdefghijklmnopqrstuvwxyz"


def test_a_guest_that_polls_needs_no_interrupt_controller() -> None:
    with pykvm.Machine(memory="2M") as m:
        serial = Serial()
        serial.attach(m.pio, pc.COM1)
        m.debug_exit()
        serial.write(b"!")
        m.load(pykvm.asm(POLL, at=0x8000))
        m.cpu.enter("long64", entry=0x8000)
        result = m.run(timeout=GENEROUS)
        assert (result.reason, result.code) == (reasons.DEBUG_EXIT, ord("!"))
        assert serial.read() == b"hello, polled"


@pytest.mark.parametrize("size", [1, 2, 4])
def test_unclaimed_ports_and_addresses_are_an_empty_bus_if_told_so(size: int) -> None:
    register = {1: "al", 2: "ax", 4: "eax"}[size]
    with pykvm.Machine(memory="2M") as m:
        ports, addresses = m.pio.unclaimed("ignore"), m.mmio.unclaimed("ignore")
        assert ports is not None and addresses is not None
        m.load(
            pykvm.asm(
                f"xor eax,eax; xor ebx,ebx; mov dx,0x1234; in {register},dx; out dx,{register};"
                f" mov edi,0x80000000; mov [rdi],{register}; mov rbx,[rdi]; hlt",
                at=0x8000,
            )
        )
        m.cpu.enter("long64", entry=0x8000)
        assert m.run(timeout=GENEROUS).reason == reasons.HALTED
        assert m.cpu.rax == (1 << 8 * size) - 1
        assert m.cpu.rbx == (1 << 64) - 1
        assert (ports.hits, addresses.hits) == (2, 2)
