"""Breakpoints and calls, in every mode in which this KVM can be stopped."""

from __future__ import annotations

import pytest

import pykvm
from pykvm import result as reasons
from pykvm.debug import disassembly, floating, probe, stops
from pykvm.errors import CapabilityError, RunError
from tests.support.stops import CELL, COUNT, ENTRY, MODES, machine, make, need, need_steps

in_every_mode = pytest.mark.parametrize(("mode", "ring"), MODES)


def test_the_reasons_are_those_of_results() -> None:
    assert (stops.BREAKPOINT, stops.WATCHPOINT, stops.STEP) == (
        reasons.BREAKPOINT, reasons.WATCHPOINT, reasons.STEP,
    )  # fmt: skip


# ---- how to stop, asked of tiny guests ---------------------------------------------------------


@in_every_mode
@pytest.mark.parametrize("way", probe.WAYS)
def test_every_way_is_tried_in_every_mode_and_says_why_it_does_not_work(
    mode: str, ring: int, way: str
) -> None:
    name = f"{mode}/{ring}" if ring else mode
    answer = probe.obstacle(way, name, lambda: pykvm.Machine("128K"), "a test")
    if way == probe.PORT:
        assert answer == "", "an exit of a port is the one thing that every KVM has"
    else:
        assert isinstance(answer, str)
    assert probe.obstacle(way, name, lambda: pytest.fail("asked twice"), "a test") == answer


def test_the_mode_of_a_vcpu_is_read_off_its_registers() -> None:
    for mode, ring in MODES:
        with machine(mode=mode, ring=ring) as m:
            assert probe.mode_of(m.cpu.load_sregs()) == (f"{mode}/{ring}" if ring else mode)


# ---- breakpoints -------------------------------------------------------------------------------


@in_every_mode
@pytest.mark.parametrize("how", ["port", "hardware", "step"])
def test_a_breakpoint_stops_before_its_instruction_every_time(
    made: list[pykvm.Machine], mode: str, ring: int, how: str
) -> None:
    m = make(made, COUNT, mode, ring)
    need(m, how)
    need_steps(m)
    point = m.breakpoint("top", how=how)
    assert point.way == how
    top = m.resolve("top")
    for count in range(3):
        result = m.run(timeout=20)
        assert (result.reason, result.exit.point) == ("breakpoint", point)
        assert result.ok
        assert (m.cpu.rip, m.cpu.ecx, m.cpu.ebx) == (top, 3 - count, count)
        assert m.cpu.dx == 0x60
    result = m.run(timeout=20)
    assert (result.reason, result.code, m.cpu.ebx) == ("stopped", 7, 3)
    assert point.hits == 3


def test_the_result_is_the_same_with_breakpoints_everywhere_as_with_none(
    made: list[pykvm.Machine],
) -> None:
    code = pykvm.asm(COUNT, mode="long64", at=ENTRY)
    m = make(made)
    need_steps(m)
    seen = []
    for name in ("start", "top", "bottom"):
        m.breakpoint(name)
    while m.run(timeout=20).reason == "breakpoint":
        seen.append(m.symbols.name(m.cpu.rip))
    assert seen == ["start", *["top", "bottom"] * 3]
    assert m.cpu.ebx == 3
    m.planted.clear()
    assert m.mem[ENTRY : ENTRY + len(code)] == bytes(code)


@in_every_mode
def test_the_guests_own_ins_of_ports_are_served_beside_planted_ones(
    made: list[pykvm.Machine], mode: str, ring: int
) -> None:
    m = make(
        made, "mov dx,0x60; top: in al,dx; in al,dx; mov bl,al; out 0xf4,al; jmp $", mode, ring
    )
    need_steps(m)
    m.breakpoint("top")
    assert m.run(timeout=20).reason == "breakpoint"
    assert m.cpu.al == 0
    result = m.run(timeout=20)
    assert (result.reason, m.cpu.bl) == ("stopped", 1)


def test_an_in_at_the_same_offset_of_another_page_is_the_guests(made: list[pykvm.Machine]) -> None:
    m = make(made, "mov dx, 0x60; jmp 0x9004; .org 0x1004; in al, dx; out 0xf4, al", "long64")
    m.breakpoint(ENTRY + 4)  # jmp, at the offset in its page that the IN has in the next
    assert m.run(timeout=20).reason == "breakpoint"
    result = m.run(timeout=20)
    assert (result.reason, result.code) == ("stopped", 1)


def test_a_condition_lets_the_guest_go_on(made: list[pykvm.Machine]) -> None:
    m = make(made)
    need_steps(m)
    point = m.breakpoint("top", lambda cpu: cpu.ecx == 1)
    assert m.run(timeout=20).reason == "breakpoint"
    assert (m.cpu.ecx, point.hits, point.passed) == (1, 1, 2)
    assert m.run(timeout=20).reason == "stopped"


@pytest.mark.parametrize("how", ["port", "hardware", "step"])
@pytest.mark.parametrize("false_first", [True, False])
def test_of_several_breakpoints_at_a_place_each_is_asked(
    made: list[pykvm.Machine], how: str, false_first: bool
) -> None:
    m = make(made)
    need(m, how)
    if false_first:
        never = m.breakpoint("top", lambda cpu: False, how=how)
    third = m.breakpoint("top", lambda cpu: cpu.ebx == 2, how=how)
    if not false_first:
        never = m.breakpoint("top", lambda cpu: False, how=how)
    result = m.run(timeout=20)
    assert (result.reason, m.cpu.ebx, result.exit.point) == ("breakpoint", 2, third)
    assert (third.hits, third.passed, never.hits, never.passed) == (1, 2, 0, 3)
    assert m.run_until("top", timeout=20).reason == "stopped"


def test_what_a_condition_raises_comes_through(made: list[pykvm.Machine]) -> None:
    m = make(made)
    m.breakpoint("top", lambda cpu: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        m.run(timeout=20)


def test_a_breakpoint_once_is_gone_afterwards_and_so_is_a_deleted_one(
    made: list[pykvm.Machine],
) -> None:
    m = make(made)
    need_steps(m)
    once = m.breakpoint("top", once=True)
    other = m.breakpoint("bottom")
    assert m.run(timeout=20).exit.point is once
    assert m.run(timeout=20).exit.point is other
    other.delete()
    other.delete()
    assert m.run(timeout=20).reason == "stopped"
    assert len(m.planted) == 0


def test_a_run_in_the_background_is_stopped_at_a_breakpoint_too(made: list[pykvm.Machine]) -> None:
    m = make(made)
    need_steps(m)
    point = m.breakpoint("top", lambda cpu: cpu.ecx < 3)
    for count in (2, 1):
        with m.start(timeout=20) as running:
            result = running.wait(20)
        assert (result.reason, result.exit.point) == ("breakpoint", point)
        assert m.cpu.ecx == count


def test_stop_ends_a_run_that_is_stepped(made: list[pykvm.Machine]) -> None:
    m = make(made, "l: inc ebx; jmp l")
    need_steps(m)
    m.watch(CELL)
    for _ in range(5):
        with m.start(timeout=60) as running:
            while m.cpu._runner.c.exits < 10:
                pass
            assert running.stop("enough").reason == "enough"


def test_each_of_several_vcpus_is_stopped_and_goes_on(made: list[pykvm.Machine]) -> None:
    m = make(made, "inc ebx; top: inc ebx; inc ebx; hlt", cpus=2)
    need_steps(m)
    m.breakpoint("top")
    stopped = [m.run(timeout=20) for _ in range(2)]
    assert [result.reason for result in stopped] == ["breakpoint"] * 2
    assert {result.exit.cpu for result in stopped} == {0, 1}
    assert m.run(timeout=20).reason == "halted"
    assert [cpu.ebx for cpu in m.cpus] == [3, 3]


def test_ring_3_without_an_idt_is_stopped_also_where_the_port_in_dx_is_not_its_own(
    made: list[pykvm.Machine],
) -> None:
    m = make(made, "mov edx, 0xabcd1234; top: inc ebx; out 0xf4, al", "long64", 3)
    need_steps(m)
    m.breakpoint("top")
    result = m.run(timeout=20)
    assert (result.reason, m.cpu.rip, m.cpu.rdx) == ("breakpoint", m.resolve("top"), 0xABCD1234)
    assert m.run(timeout=20).reason == "stopped"
    assert m.cpu.ebx == 1


def test_where_nothing_is_mapped_a_planted_byte_is_refused_with_the_reason(
    made: list[pykvm.Machine],
) -> None:
    m = make(made)
    with pytest.raises(CapabilityError, match="nothing is mapped there"):
        m.breakpoint(0x7000_0000_0000, how="port")


def test_an_unknown_symbol_is_told_with_those_that_resemble_it(made: list[pykvm.Machine]) -> None:
    m = make(made)
    with pytest.raises(LookupError, match="bottom"):
        m.breakpoint("botom")
    assert m.resolve("top+0x2") == m.resolve("top") + 2


# ---- calls -------------------------------------------------------------------------------------


FUNCTIONS = """
    out 0xf4, al
    jmp $
difference:
    mov rax, rdi
    sub rax, rsi
    ret
sum6:
    lea rax, [rdi + rsi]
    add rax, rdx
    add rax, rcx
    add rax, r8
    add rax, r9
    ret
fact:
    mov rax, 1
    test rdi, rdi
    jz 1f
    push rdi
    dec rdi
    call fact
    pop rdi
    imul rax, rdi
1:  ret
floating:
    .byte 0xf3, 0x0f, 0x58, 0xc0    # addss xmm0, xmm0
    fld1
    ret
stuck:
    jmp stuck
crash:
    ud2
"""


def test_functions_of_the_guest_are_called_and_leave_no_trace(made: list[pykvm.Machine]) -> None:
    for ring in (0, 3):
        m = make(made, FUNCTIONS, ring=ring)
        need_steps(m)
        before = m.cpu.regs
        assert m.call("difference", 50, 8) == 42
        assert m.call("difference", 0, 1) == (1 << 64) - 1
        assert m.call("difference", -1, -2) == 1
        assert m.call("sum6", 1, 2, 3, 4, 5, 6) == 21
        assert m.call("fact", 10) == 3628800
        assert m.cpu.regs == before
        assert m.run(timeout=20).reason == "stopped"


def test_the_floating_point_of_a_called_function_leaves_no_trace_either(
    made: list[pykvm.Machine],
) -> None:
    m = make(made, FUNCTIONS, ring=3)  # where every back end executes it
    need_steps(m)
    fpu = m.cpu.vcpu.get_fpu()
    fpu.xmm[0][3] = 0x3F
    floating.set_fpu(m.cpu.vcpu, fpu)
    before = m.snapshot()
    m.call("floating")
    assert before.diff(m.snapshot()).registers == []


def test_arguments_of_32_bit_code_are_on_the_stack(made: list[pykvm.Machine]) -> None:
    code = "out 0xf4, al; difference: mov eax, [esp + 4]; sub eax, [esp + 8]; ret"
    m = make(made, code, "prot32")
    assert m.call("difference", 5, 7) == 0xFFFFFFFE


def test_a_function_that_does_not_return_is_told(made: list[pykvm.Machine]) -> None:
    m = make(made, FUNCTIONS)
    with pytest.raises(RunError, match="timeout"):
        m.call("stuck", timeout=0.2)
    m = make(made, FUNCTIONS)
    with pytest.raises(pykvm.errors.PykvmError):
        m.call("crash")
    m = make(made, FUNCTIONS)
    with pytest.raises(ValueError, match="does not fit"):
        m.call("fact", 1 << 64)


# ---- without a disassembler --------------------------------------------------------------------


def test_without_capstone_what_needs_it_is_refused_and_says_how_to_get_it(
    made: list[pykvm.Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disassembly, "missing", lambda: "capstone is not installed")
    m = make(made, ring=3)
    if not m.debugger.obstacle(probe.STEP, m.cpu):
        assert m.step().reason == "step"
        return
    with pytest.raises(CapabilityError, match=r"no single step in long64/3.*capstone"):
        m.step()
    with pytest.raises(CapabilityError, match="capstone"):
        m.watch(CELL)
