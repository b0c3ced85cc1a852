"""KVM against Unicorn, step by step."""

from __future__ import annotations

import pytest

import pykvm
from pykvm import guestlib
from pykvm.errors import CapabilityError
from tests.support.stops import MODES, machine

pytest.importorskip("capstone")
pytest.importorskip("unicorn")

ARITHMETIC = """
    mov eax, 0x12345678
    mov ebx, 0x9abcdef
    mov ecx, 40
again:
    add eax, ebx
    rol eax, 7
    imul ebx, ebx, 33
    xor ebx, eax
    sub eax, 1
    adc ebx, 5
    shr eax, 3
    push ax
    pop dx
    in al, 0x60
    cpuid
    dec cx
    mov ecx, 1
    loop again
    out 0xf4, al
"""


@pytest.mark.parametrize(("mode", "ring"), MODES)
def test_both_do_the_same(mode: str, ring: int) -> None:
    with machine(ARITHMETIC, mode, ring) as m:
        done = m.compare_with_unicorn(300)
        assert done.same and done.steps >= 15, done
        assert done.result is not None and done.result.reason == "stopped"


def test_the_first_difference_ends_it_and_is_told() -> None:
    with machine("mov ebx, 1; out 0xe9, al; inc ebx; hlt") as m:

        def tamper(access: object) -> None:
            m.cpu.rbx = 0x50

        m.on_pio(0xE9, tamper)
        done = m.compare_with_unicorn(10)
        assert not done.same and done.steps == 1
        assert done.differs["rbx"] == (0x50, 1)
        assert done.divergence is not None and done.divergence.text.startswith("out")
        assert "rbx 0x50 on KVM, 0x1 on Unicorn" in repr(done)


def test_what_unicorn_cannot_do_is_told() -> None:
    with machine("mov eax, [0xd0000000]; hlt") as m:
        m.mmio.constant(0xD0000000, 5, 4)
        done = m.compare_with_unicorn(10)
        assert not done.same and "[0xd0000000]" in done.error


# ---- real mode -----------------------------------------------------------------------------------

REAL = """
    xor ax, ax
    mov es, ax
    mov ax, 0x7000
    mov ss, ax                      # holds traps back
    mov sp, 0x800
    mov ax, 0x0700                  # another name for this code
    push ax
    push offset elsewhere - 0x7000
    retf
elsewhere:
    mov ax, 0xffff
    mov ds, ax
    mov byte ptr [0x1234], 0x56     # above 1 MiB
    mov al, [0x1234]
    mov es:[0x40 * 4], word ptr offset handler
    mov es:[0x40 * 4 + 2], word ptr 0
    mov es:[0], word ptr offset divided
    mov es:[2], word ptr 0
    mov ds, cx
    mov si, 0x8000
    mov di, 0x9000
    mov cx, 9
    rep movsb
    std
    mov cx, 3
    mov dx, 0x61
    rep insb                        # answered by KVM's side
    cld
    mov eax, es:[0x9007]
    pushf
    pop bx
    stc
    int 0x40
    xor dx, dx
    mov ax, 100
    div dl                          # again, with another divisor
    mov ebp, 0x12345678
    push ebp
    pop edi
    hlt
handler:
    inc si
    clc
    inc si
    iret
divided:
    mov dl, 16
    iret
"""


def test_segments_repetitions_and_interrupts_of_real_mode_are_the_same() -> None:
    with machine(REAL, "real16") as m:
        m.pio.constant(0x61, 0x5A)
        done = m.compare_with_unicorn(400)
        assert done.same and done.steps > 30, done
        assert done.result is not None and done.result.reason == "halted"
        assert m.cpu.cs.selector == 0x700 and m.cpu.edi == 0x12345678
        assert m.mem[0x9007:0x900A] == b"\x5a\x5a\x5a" and m.cpu.dl == 16


def test_a_jump_wraps_at_64_kib_on_both() -> None:
    with machine("jmp far", "real16") as m:
        m.load(pykvm.asm("jmp 0x10010", mode="real16", at=0xFFF0), at=0xFFF0)
        m.load(b"\x43\x43\xf4", at=0x10)  # inc bx; inc bx; hlt
        m.cpu.rip = 0xFFF0
        done = m.compare_with_unicorn(10)
        assert done.same and done.steps == 3, done
        assert m.cpu.bx == 2


@pytest.mark.parametrize("name", ["hello", "real-mode"])
def test_a_guest_in_real_mode_goes_the_same_way_to_its_end(name: str) -> None:
    guest = guestlib.find(name)
    with guest.machine() as m:
        console = m.pio.fifo(guestlib.CONSOLE_PORT)
        guest.prepare(m)
        done = m.compare_with_unicorn(5000, timeout=60)
        assert done.same, done
        assert done.result is not None and done.result.reason == "halted"
        assert console.read().decode() == guest.expected_output
        assert done.steps > 60


@pytest.mark.parametrize("register", ["rbx", "ds"])
def test_the_first_difference_in_real_mode_is_told(register: str) -> None:
    with machine("mov bx, 1; out 0xe9, al; inc bx; inc bx; hlt", "real16") as m:

        def tamper(access: object) -> None:
            if register == "ds":
                m.cpu.ds.selector, m.cpu.ds.base = 0x1000, 0x10000
            else:
                m.cpu.rbx = 0x1000

        m.on_pio(0xE9, tamper)
        done = m.compare_with_unicorn(10)
        assert not done.same and done.steps == 1
        assert list(done.differs) == [register] and done.differs[register][0] == 0x1000
        assert f"{register} 0x1000 on KVM, " in repr(done)


def test_another_handler_than_the_table_says_is_a_difference() -> None:
    code = "out 0xe9, al; int 0x40; nop; nop; hlt; one: inc bx; iret; two: inc cx; iret"
    with machine(code, "real16") as m:
        m.mem.u32[0x100] = m.resolve("one")

        def tamper(access: object) -> None:
            m.mem.u32[0x100] = m.resolve("two")  # behind Unicorn's back

        m.on_pio(0xE9, tamper)
        done = m.compare_with_unicorn(10)
        assert not done.same and not done.error and done.steps == 1
        assert done.divergence is not None and done.divergence.text == "int 0x40"


def test_a_segment_that_unicorn_cannot_have_is_told_before_the_guest_runs() -> None:
    with machine("inc bx; hlt", "real16") as m:
        m.cpu.ds.base = 0x12345
        with pytest.raises(CapabilityError, match="ds has base 0x12345 with selector 0x0"):
            m.compare_with_unicorn(10)
        assert m.cpu.bx == 0


SWITCH = """
    cli
    lgdt [pointer]
    mov eax, cr0
    or al, 1
    mov cr0, eax
    jmp 8:protected
    .code32
protected:
    mov eax, 0x10
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov esp, 0x7000
    push 0x12345678
    pop ebx
    mov edi, 0x9000
    mov ecx, 3
    rep stosd
    hlt
    .balign 8
gdt:
    .quad 0, 0x00cf9a000000ffff, 0x00cf92000000ffff
pointer:
    .word 23
    .long gdt
"""


def test_a_guest_that_leaves_real_mode_is_followed() -> None:
    with machine(SWITCH, "real16") as m:
        done = m.compare_with_unicorn(100)
        assert done.same and done.steps >= 16, done
        assert done.result is not None and done.result.reason == "halted"
        assert (m.cpu.ebx, m.cpu.edi) == (0x12345678, 0x900C)
