"""The interrupt hardware of a PC, in the kernel and split, as tiny guests meet it."""

from __future__ import annotations

import os
import threading
from functools import cache

import pytest

import pykvm
from pykvm import guestlib, kvm
from pykvm import result as reasons
from pykvm.arch.x86_64 import pc
from pykvm.devices.ioapic import LEVEL, MASKED
from pykvm.devices.serial import Serial
from pykvm.irqchip import SplitIrqchip
from tests.support.interrupts import guest, ioapic_entry

GENEROUS = 60.0
"""Seconds; a run that needs them hangs."""

VECTOR = 0x31

in_kernel = pytest.mark.cap("KVM_CAP_IRQCHIP")
split = pytest.mark.cap("KVM_CAP_SPLIT_IRQCHIP")
both = pytest.mark.parametrize(
    "irqchip", [pytest.param("kernel", marks=in_kernel), pytest.param("split", marks=split)]
)


@cache
def interrupts_end_when_delivered() -> bool:
    """Whether this KVM ends an interrupt by itself, which the guest's EOI should do."""
    with pykvm.Machine("2M", irqchip="kernel") as m:
        m.debug_exit()
        start(m, guest(VECTOR, f"mov dword ptr [rbx + 0x300], 0x40000 | {VECTOR}", "out 0xf4, al"))
        assert m.run(timeout=GENEROUS).reason == reasons.DEBUG_EXIT
        in_service = b"".join(
            m.cpu.vcpu.get_lapic().regs[0x100 + 16 * (VECTOR // 32) + i] for i in range(4)
        )
        return not int.from_bytes(in_service, "little") >> VECTOR % 32 & 1


END = "mov dword ptr [rbx + EOI], 0; iretq"


def start(m: pykvm.Machine, text: str) -> None:
    m.pio.unclaimed("ignore")
    m.load(pykvm.asm(text, at=0x8000))
    m.cpu.enter("long64", entry=0x8000, map_size=1 << 32)


def counted(times: int, before: str = "") -> str:
    """A handler that ends the run, with the count as the code, at the so-manieth interrupt."""
    return f"""
        inc     dword ptr [count]
        {before}
        mov     eax, [count]
        cmp     eax, {times}
        jb      1f
        out     0xf4, al
    1:  {END}
    """


# ---- the PIC as a BIOS leaves it ---------------------------------------------------------------

PIT_IN_REAL_MODE = """
    # Every vector has a stub of its own that ends the run with the vector's number.
        xor     di, di
        mov     ax, offset stubs
    next:
        stosw
        mov     word ptr [di], 0
        add     di, 2
        add     ax, 4
        cmp     di, 0x400
        jb      next
        mov     al, 0x34        # timer 0: rate generator, low byte then high
        out     0x43, al
        mov     al, 0xff
        out     0x40, al
        out     0x40, al
    idle:
        sti
        hlt
        jmp     idle
        .balign 4
    stubs:
        .set    vector, 0
        .rept   256
        mov     al, vector
        out     0xf4, al
        .set    vector, vector + 1
        .endr
"""


@in_kernel
def test_a_timer_interrupts_at_vector_8_without_programming_the_pic() -> None:
    with pykvm.Machine("2M", irqchip="kernel", pit=True, pic="bios") as m:
        m.debug_exit()
        m.load(pykvm.asm(PIT_IN_REAL_MODE, mode="real16", at=0x7C00))
        m.cpu.enter("real16", entry=0x7C00)
        result = m.run(timeout=GENEROUS)
        assert (result.reason, result.code) == (reasons.DEBUG_EXIT, 8), result


@in_kernel
@pytest.mark.parametrize(("irq", "vector"), [(1, 0x09), (4, None), (9, None)])
def test_a_bios_leaves_the_keyboard_open_and_the_rest_masked(irq: int, vector: int | None) -> None:
    with pykvm.Machine("2M", irqchip="kernel", pic="bios") as m:
        m.pio.unclaimed("ignore")
        m.debug_exit()
        m.load(pykvm.asm(PIT_IN_REAL_MODE, mode="real16", at=0x7C00))
        m.cpu.enter("real16", entry=0x7C00)
        assert m.irqchip is not None
        m.irqchip.line(irq, 1)
        result = m.run(timeout=0.3 if vector is None else GENEROUS)
        assert result.code == vector, result
        assert result.reason == (reasons.TIMEOUT if vector is None else reasons.DEBUG_EXIT)


@pytest.mark.parametrize(
    "wanted",
    [
        {"irqchip": "split", "pit": True},
        {"irqchip": "split", "pic": "bios"},
        {"pic": "bios"},
        {"pit": True},
        {"irqchip": "user"},
        {"irqchip": "kernel", "pic": "efi"},
    ],
)
def test_what_does_not_go_together_is_said_at_once(wanted: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"irqchip|pic is"):
        pykvm.Machine("2M", **wanted)  # type: ignore[arg-type]


# ---- timers ------------------------------------------------------------------------------------


@in_kernel
def test_the_pit_interrupts_through_the_ioapic_in_long_mode() -> None:
    set_up = f"""
        {ioapic_entry(pc.TIMER_PIN, VECTOR)}
        mov     al, 0x34
        out     0x43, al
        mov     al, 0xff
        out     0x40, al
        mov     al, 0x0f        # 3.4 ms
        out     0x40, al
    """
    with pykvm.Machine("2M", irqchip="kernel", pit=True) as m:
        m.debug_exit()
        assert m.irqchip is not None
        m.irqchip.wire_as_pc()
        start(m, guest(VECTOR, set_up, counted(3)))
        result = m.run(timeout=GENEROUS)
        assert (result.reason, result.code) == (reasons.DEBUG_EXIT, 3), result


@both
def test_the_local_apics_timer_interrupts_in_long_mode(irqchip: str) -> None:
    set_up = f"""
        mov     dword ptr [rbx + 0x3e0], 0xb                # divide by 1
        mov     dword ptr [rbx + 0x320], 1 << 17 | {VECTOR} # periodic
        mov     dword ptr [rbx + 0x380], 2000000            # KVM's bus has 1 GHz: 2 ms
    """
    with pykvm.Machine("2M", irqchip=irqchip) as m:
        m.debug_exit()
        start(m, guest(VECTOR, set_up, counted(3)))
        result = m.run(timeout=GENEROUS)
        assert (result.reason, result.code) == (reasons.DEBUG_EXIT, 3), result


@both
@pytest.mark.cap("KVM_CAP_TSC_DEADLINE_TIMER")
def test_the_tsc_deadline_interrupts_in_long_mode(irqchip: str) -> None:
    arm = """
        rdtsc
        add     eax, 1000000
        adc     edx, 0
        mov     ecx, 0x6e0
        wrmsr
    """
    set_up = f"mov dword ptr [rbx + 0x320], 2 << 17 | {VECTOR}; {arm}"
    with pykvm.Machine("2M", irqchip=irqchip) as m:
        m.debug_exit()
        start(m, guest(VECTOR, set_up, counted(3, arm)))
        result = m.run(timeout=GENEROUS)
        assert (result.reason, result.code) == (reasons.DEBUG_EXIT, 3), result


# ---- the IOAPIC, in the kernel and here --------------------------------------------------------


@both
def test_processors_start_each_other_with_init_and_sipi(irqchip: str) -> None:
    found = guestlib.find("smp-sipi")
    found.irqchip = irqchip
    printed, result = guestlib.run_guest(found)
    assert (printed, result.code) == (found.expected_output, 0), result


@both
def test_an_eventfd_interrupts_through_the_ioapic(irqchip: str) -> None:
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        with pykvm.Machine("2M", irqchip=irqchip) as m:
            m.debug_exit()
            assert m.irqchip is not None
            m.irqchip.connect(fd, 5)
            # The guest asks for each by a write to port 0x10: by then its entry is there.
            m.pio.eventfd(0x10, fd)
            set_up = f"{ioapic_entry(5, VECTOR)}\n out 0x10, al"
            start(m, guest(VECTOR, set_up, counted(3, "out 0x10, al")))
            result = m.run(timeout=GENEROUS)
            assert (result.reason, result.code) == (reasons.DEBUG_EXIT, 3), result
    finally:
        os.close(fd)


@both
def test_com1_interrupts_for_what_it_received_and_when_it_is_empty(irqchip: str) -> None:
    """The echo of each byte is sent by the interrupt of the empty transmitter."""
    handler = f"""
        mov     dx, 0x3fa               # all there is, for an edge comes only once
        in      al, dx
        and     al, 0x0f
        mov     dx, 0x3f8
        cmp     al, 0x02                # the transmitter is empty
        je      1f
        cmp     al, 0x04                # something was received
        jne     3f
        in      al, dx
        cmp     al, '.'
        je      4f
        xor     al, 0x20
        mov     [count], al
        mov     al, 0x02                # send it before the next is received
        jmp     2f
    1:  mov     al, [count]
        out     dx, al
        mov     al, 0x01
    2:  mov     dx, 0x3f9
        out     dx, al
        jmp     handler
    3:  {END}
    4:  out     0xf4, al
    """
    set_up = f"""
        {ioapic_entry(pc.COM1_GSI, VECTOR)}
        mov     dx, 0x3f9
        mov     al, 1
        out     dx, al
    """
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    port = Serial(irq=fd)
    try:
        with pykvm.Machine("2M", irqchip=irqchip) as m:
            assert m.irqchip is not None
            m.irqchip.connect(fd, pc.COM1_GSI)
            port.attach(m.pio, pc.COM1)
            m.debug_exit()
            port.write(b"hello.")
            start(m, guest(VECTOR, set_up, handler))
            result = m.run(timeout=GENEROUS)
            assert (result.reason, result.code) == (reasons.DEBUG_EXIT, ord(".")), result
            assert port.read() == b"HELLO"
    finally:
        port.close()
        os.close(fd)


@both
def test_an_edge_interrupts_once_however_long_the_line_is_high(irqchip: str) -> None:
    set_up = f"""
        {ioapic_entry(5, VECTOR)}
        mov     dx, 0x2005
        mov     al, 1
        out     dx, al
        out     dx, al
    """
    with pykvm.Machine("2M", irqchip=irqchip) as m:
        m.test_devices()
        start(m, guest(VECTOR, set_up, counted(2)))
        assert m.run(timeout=0.3).reason == reasons.TIMEOUT
        code = pykvm.asm(guest(VECTOR, set_up, counted(2)), at=0x8000)
        assert m.memory.read(code.symbols["count"], 4) == b"\1\0\0\0"


@pytest.mark.parametrize(
    ("irqchip", "end"),
    [
        pytest.param("kernel", "broadcast", marks=in_kernel),
        pytest.param("split", "broadcast", marks=split),
        pytest.param("split", "directed", marks=split),  # KVM's own IOAPIC has no EOI register
    ],
)
def test_a_level_interrupts_again_until_its_line_is_low(irqchip: str, end: str) -> None:
    """The handler lowers it at the third.

    The guest does not halt meanwhile: a KVM that emulates ring 0 sleeps over KVM_EXIT_IOAPIC_EOI.
    And one that ends an interrupt when it delivers it has one more under way by then.
    """
    directed = f"mov edx, 0xfec00000; mov dword ptr [rdx + 0x40], {VECTOR}"
    handler = f"""
        inc     dword ptr [count]
        mov     eax, [count]
        cmp     eax, 3
        jb      1f
        mov     dx, 0x2005
        mov     al, 0
        out     dx, al
        mov     dword ptr [rsp], offset done    # not back to the idle loop
    1:  mov     dword ptr [rbx + EOI], 0
        {directed if end == "directed" else ""}
        iretq
    done:                                       # time for more, if they came
        sti
        mov     ecx, 1000
    2:  pause
        loop    2b
        mov     eax, [count]
        out     0xf4, al
    """
    set_up = f"""
        {"mov dword ptr [rbx + 0xf0], 0x11ff" if end == "directed" else ""}
        {ioapic_entry(5, LEVEL | VECTOR)}
        mov     dx, 0x2005
        mov     al, 1
        out     dx, al
    """
    with pykvm.Machine("2M", irqchip=irqchip) as m:
        m.test_devices()
        start(m, guest(VECTOR, set_up, handler, idle="pause"))
        result = m.run(timeout=GENEROUS)
        assert result.reason == reasons.DEBUG_EXIT, result
        assert result.code in ((3, 4) if interrupts_end_when_delivered() else (3,))
        if isinstance(m.irqchip, SplitIrqchip):
            assert m.irqchip.ioapic.state()["entries"][5] == LEVEL | VECTOR


@both
def test_a_line_wakes_a_halted_processor_from_another_thread(irqchip: str) -> None:
    with pykvm.Machine("2M", irqchip=irqchip) as m:
        m.debug_exit()
        chip = m.irqchip
        assert chip is not None
        threads = []

        def ready(access: object) -> None:
            threads.append(threading.Thread(target=chip.line, args=(7, 1)))
            threads[-1].start()

        m.on_pio(0x10, ready)
        start(m, guest(VECTOR, f"{ioapic_entry(7, VECTOR)}\n out 0x10, al", counted(1)))
        result = m.run(timeout=GENEROUS)
        threads[0].join(60)
        assert (result.reason, result.code) == (reasons.DEBUG_EXIT, 1), result


@pytest.mark.cap("KVM_CAP_SPLIT_IRQCHIP")
def test_no_entry_that_a_guest_writes_is_too_strange_for_the_split_ioapic() -> None:
    """Delivery modes, destinations and vectors that there are not: KVM's routes take them all."""
    with pykvm.Machine("2M", irqchip="split") as m:
        chip = m.irqchip
        assert isinstance(chip, SplitIrqchip)
        for mode in range(8):
            for vector in (0, 0x0F, 0x31, 0xFF):
                for flags in (0, LEVEL, 1 << 11, LEVEL | 1 << 11):
                    for destination in (0x01, 0xFF):
                        entry = destination << 56 | flags | mode << 8 | vector
                        state = chip.ioapic.state()
                        state["entries"][3] = entry
                        chip.ioapic.restore(state)
                        if mode not in (2, 4, 5):  # SMI, NMI, INIT: not at a vCPU that is to run
                            chip.line(3, 1)
                            chip.line(3, 0)
        m.debug_exit()
        state["entries"] = [MASKED] * 24
        chip.ioapic.restore(state)
        start(m, "mov al, 7; out 0xf4, al")
        assert m.run(timeout=GENEROUS).code == 7


@pytest.mark.cap("KVM_CAP_SPLIT_IRQCHIP")
def test_the_split_irqchip_has_no_pic_in_the_kernel() -> None:
    with pykvm.Machine("2M", irqchip="split") as m:
        with pytest.raises(pykvm.KvmError):
            m.vm.get_irqchip(kvm.KVM_IRQCHIP_PIC_MASTER)
        assert "split irqchip" in repr(m)
