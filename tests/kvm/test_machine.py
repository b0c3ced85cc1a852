"""The machine on a real KVM: what its handlers and actions serve."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import pykvm
import pykvm.kvm
from pykvm import result as reasons
from pykvm.devices.access import MmioAccess, PioAccess
from tests.support.small_guest import run, start

# ---- handlers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["real16", "prot32", "long64"])
def test_a_guest_of_every_mode_says_hello(m: pykvm.Machine, mode: str) -> None:
    start(m, "mov al,'H'; out 0xe9,al; mov al,'i'; out 0xe9,al; hlt", mode)
    out: list[str] = []

    @m.on_pio(0xE9)
    def _(exit: PioAccess) -> None:
        out.append(chr(exit.value))

    result = run(m)
    assert "".join(out) == "Hi"
    assert (result.reason, result.exits) == (reasons.HALTED, 3)
    assert result.ok and result.check() is result


def test_ring_3_with_iopl_3_runs_and_uses_ports(m: pykvm.Machine) -> None:
    start(m, "mov eax,cs; and eax,3; out 0xe9,al; l: jmp l", ring=3, iopl=3)

    @m.on_pio(0xE9)
    def _(exit: PioAccess) -> None:
        ring.append(exit.value)
        m.stop()

    ring: list[int] = []
    assert run(m).reason == reasons.STOPPED
    assert ring == [3]


def test_a_handler_answers_in_and_mmio_loads(m: pykvm.Machine) -> None:
    start(m, "in al,0x60; mov rbx,[0x300000]; mov [0x300008],ebx; hlt")
    stores: list[MmioAccess] = []

    @m.on_mmio(0x300000, 0x100)
    def _(exit: MmioAccess) -> int | None:
        if exit.is_write:
            stores.append(exit)
            return None
        return 0x1122334455667788 if exit.size == 8 else 0

    m.on_pio(0x60, lambda exit: 0x5A)
    assert run(m).reason == reasons.HALTED
    assert m.cpu.al == 0x5A
    assert m.cpu.rbx == 0x1122334455667788
    assert [(s.gpa, s.value, s.size) for s in stores] == [(0x300008, 0x55667788, 4)]


def test_rep_outs_and_rep_ins_move_every_item(m: pykvm.Machine) -> None:
    start(
        m,
        """
        mov dx,0x10; mov esi,0x9000; mov ecx,5; rep outsb
        mov dx,0x11; mov edi,0x9100; mov ecx,6; rep insw
        hlt
        """,
    )
    m.mem[0x9000:0x9005] = b"items"
    out: list[int] = []
    words = iter(range(0x100, 0x106))
    m.on_pio(0x10, lambda exit: out.append(exit.value))
    m.on_pio(0x11, lambda exit: next(words))
    assert run(m).reason == reasons.HALTED
    assert bytes(out) == b"items"
    assert [m.mem.u16[0x9100 + 2 * n] for n in range(6)] == list(range(0x100, 0x106))
    assert (m.cpu.ecx, m.cpu.edi) == (0, 0x910C)


def test_a_write_to_a_rom_comes_as_mmio_and_changes_nothing() -> None:
    memory = pykvm.GuestMemory("2M")
    memory.add(0x400000, "4K", readonly=True)
    memory.load(0x400000, b"rom!")
    with pykvm.Machine(memory) as m:
        start(m, "mov eax,[0x400000]; mov [0x400000],ebx; mov ecx,[0x400000]; hlt")
        stores: list[int] = []
        m.on_mmio(0x400000, 0x1000, lambda exit: stores.append(exit.gpa))
        assert run(m).reason == reasons.HALTED
        assert m.cpu.eax == m.cpu.ecx == int.from_bytes(b"rom!", "little")
        assert stores == [0x400000]


def test_a_handler_over_ram_would_never_be_called(m: pykvm.Machine) -> None:
    for gpa, length in ((0x1000, 4), (0x1FFFFF, 2), (0, 1 << 40)):
        with pytest.raises(ValueError, match=r"KVM serves itself(.|\n)*0x0-0x1fffff"):
            m.on_mmio(gpa, length, lambda exit: 0)
    m.on_mmio(0x200000, 4, lambda exit: 0)


def test_a_handlers_exception_is_the_callers(m: pykvm.Machine) -> None:
    start(m, "out 0x10,al; hlt")

    def handler(exit: PioAccess) -> None:
        raise LookupError("mine")

    m.on_pio(0x10, handler)
    with pytest.raises(LookupError, match="mine"):
        run(m)
    assert run(m).reason == reasons.HALTED


def test_handlers_read_and_write_registers(m: pykvm.Machine) -> None:
    start(m, "mov ebx,5; l: out 0x10,al; test ebx,ebx; jnz l; hlt")

    @m.on_pio(0x10)
    def _(exit: PioAccess) -> None:
        m.cpu.rbx -= 1

    result = run(m)
    assert (result.reason, result.exits, m.cpu.rbx) == (reasons.HALTED, 6, 0)


def test_msr_accesses_are_served_and_refused(m: pykvm.Machine) -> None:
    start(m, "mov ecx,0xc0000103; rdmsr; mov ebx,eax; mov eax,77; xor edx,edx; wrmsr; hlt")
    seen: list[tuple[bool, int]] = []

    @m.on_msr(0xC0000103)
    def _(exit: object) -> int | None:
        seen.append((exit.is_write, exit.data))  # type: ignore[attr-defined]
        return None if exit.is_write else 0x1234  # type: ignore[attr-defined]

    assert run(m).reason == reasons.HALTED
    assert m.cpu.ebx == 0x1234
    assert seen == [(False, 0), (True, 77)]


def test_a_refused_msr_is_a_general_protection_fault(m: pykvm.Machine) -> None:
    start(m, "mov ecx,0xc0000103; rdmsr; hlt")
    m.on_msr(0xC0000103, lambda exit: False)
    assert run(m).reason == reasons.SHUTDOWN  # no IDT to take the #GP


def test_a_hlt_hook_lets_the_guest_go_on(m: pykvm.Machine) -> None:
    start(m, "hlt; inc ebx; hlt; inc ebx; hlt")
    count: list[object] = []

    @m.on_hlt
    def _(exit: object) -> bool:
        count.append(exit)
        return len(count) < 3

    assert run(m).reason == reasons.HALTED
    assert m.cpu.ebx == 2


# ---- C actions and doorbells -------------------------------------------------------------------


def test_a_console_fifo_takes_the_output_without_python(m: pykvm.Machine) -> None:
    start(m, "mov ecx,300; l: mov al,cl; out 0xe9,al; loop l; in al,0xe9; hlt")
    console = m.pio.fifo(0xE9, capacity=64, empty=0x21)
    result = run(m)
    assert (result.reason, result.exits) == (reasons.HALTED, 302)
    assert console.read() == bytes(n & 0xFF for n in range(300, 0, -1))
    assert m.cpu.al == 0x21


def test_a_doorbell_rings_in_the_kernel_and_makes_no_exit(m: pykvm.Machine) -> None:
    start(m, "mov al,5; out 0x50,al; mov [0x500000],eax; mov [0x500000],eax; hlt")
    port, address = os.eventfd(0), os.eventfd(0)
    try:
        m.pio.eventfd(0x50, port, size=1)
        claim = m.mmio.eventfd(0x500000, address, size=4)
        result = run(m)
        assert (os.eventfd_read(port), os.eventfd_read(address)) == (1, 2)
        assert (result.reason, result.exits) == (reasons.HALTED, 1)
        claim.release()
        m.cpu.rip = 0x8004
        assert run(m).reason == reasons.UNCLAIMED
    finally:
        os.close(port)
        os.close(address)


def test_load_takes_bytes_and_says_what_takes_a_path(m: pykvm.Machine) -> None:
    for path in ("guest.bin", Path("guest.bin")):
        with pytest.raises(TypeError, match=r"takes bytes: .*load_elf\(\) a path"):
            m.load(path, at=0x8000)  # type: ignore[arg-type]
    m.load(b"\xf4", at=0x8000)
    assert m.memory[0x8000] == 0xF4
