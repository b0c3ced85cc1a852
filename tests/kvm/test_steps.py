"""Steps and watchpoints, in every mode in which this KVM can be stopped."""

from __future__ import annotations

import pytest

import pykvm
from pykvm import kvm
from pykvm.debug import probe
from pykvm.errors import CapabilityError
from tests.support.stops import CELL, COUNT, ENTRY, MODES, make, need_steps

in_every_mode = pytest.mark.parametrize(("mode", "ring"), MODES)


@in_every_mode
def test_a_step_is_one_instruction(made: list[pykvm.Machine], mode: str, ring: int) -> None:
    m = make(made, COUNT, mode, ring)
    need_steps(m)
    seen = []
    for _ in range(6):
        result = m.step()
        assert result.reason == "step"
        seen.append((m.cpu.ecx, m.cpu.ebx, m.mem[CELL]))
    assert seen == [(3, 0, 0), (3, 0, 0), (3, 1, 0), (3, 1, 1), (2, 1, 1), (2, 1, 1)]
    assert m.cpu.rip == m.resolve("top")
    assert m.step(3).reason == "step"
    assert m.cpu.rip > m.resolve("bottom")
    assert m.run(timeout=20).code == 7


@in_every_mode
def test_a_write_that_is_watched_stops_the_run_behind_it(
    made: list[pykvm.Machine], mode: str, ring: int
) -> None:
    m = make(made, COUNT, mode, ring)
    need_steps(m)
    point = m.watch(CELL, 4)
    for count in (1, 2, 3):
        result = m.run(timeout=20)
        assert (result.reason, result.exit.point) == ("watchpoint", point)
        assert (m.cpu.rip, m.mem[CELL]) == (m.resolve("bottom"), count)
        if point.way == probe.STEP:
            assert result.exit.new == bytes([count, 0, 0, 0])
    point.delete()
    assert m.run(timeout=20).code == 7
    assert point.hits == 3


IN_TURNS = """
    cmp ebx, 0
    jne 2f
    mov ecx, 50
1:  mov eax, [0x9000]       # reads do not count
    loop 1b
    mov dword ptr [0x9000], 5
    hlt
2:  cmp dword ptr [0x9000], 5   # the second vCPU waits for the first
    jne 2b
    inc dword ptr [0x9000]
    mov dword ptr [0x9004], 1
    hlt
"""


@pytest.mark.parametrize("how", ["auto", "step"])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_of_several_vcpus_the_one_that_wrote_is_named(
    made: list[pykvm.Machine], how: str, order: tuple[int, int]
) -> None:
    m = make(made, IN_TURNS, cpus=2)
    if how == "step" or m.debugger.obstacle(probe.WATCH, m.cpu):
        need_steps(m)
    first, second = order
    m.cpus[first].rbx, m.cpus[second].rbx = 0, 1
    point = m.watch(CELL, 4, how=how)
    for who, value in ((first, 5), (second, 6)):
        result = m.run(timeout=60)
        assert (result.reason, result.exit.point, result.exit.cpu) == ("watchpoint", point, who)
        assert (result.cpu, m.mem.u32[CELL]) == (who, value)
        if point.way == probe.STEP:
            assert result.exit.new == value.to_bytes(4, "little")
    assert m.mem.u32[CELL + 4] == 0
    assert m.run(timeout=60).reason == "halted"
    assert m.mem.u32[CELL + 4] == 1


def test_one_of_several_that_has_halted_stays_so_while_the_rest_is_watched(
    made: list[pykvm.Machine],
) -> None:
    m = make(
        made,
        "cmp ebx, 0; je 1f; mov dword ptr [0x9000], 1; mov dword ptr [0x9000], 2;"
        "mov ecx, 40; 2: loop 2b; hlt; 1: inc edi; hlt; inc edi; hlt",
        cpus=2,
    )
    need_steps(m)
    m.cpus[0].rbx, m.cpus[1].rbx = 0, 1
    m.watch(CELL, 4, how="step")
    for value in (1, 2):
        result = m.run(timeout=60)
        assert (result.reason, result.exit.cpu, m.mem[CELL]) == ("watchpoint", 1, value)
        assert m.cpus[0].edi == 1
    assert m.run(timeout=60).reason == "halted"
    assert m.cpus[0].edi == 1  # it never went on while the other ran


def test_a_breakpoint_by_steps_stops_each_of_several_vcpus(made: list[pykvm.Machine]) -> None:
    m = make(made, "inc ebx; top: inc ebx; inc ebx; hlt", cpus=2)
    need_steps(m)
    m.breakpoint("top", how="step")
    stopped = [m.run(timeout=60).exit for _ in range(2)]
    assert {stop.cpu for stop in stopped} == {0, 1}
    assert m.run(timeout=60).reason == "halted"
    assert [cpu.ebx for cpu in m.cpus] == [3, 3]


@pytest.mark.cap("KVM_CAP_IRQCHIP")
def test_vcpus_that_wait_in_the_kernel_are_not_stepped_together(made: list[pykvm.Machine]) -> None:
    m = make(made, cpus=2, irqchip=True)
    need_steps(m)
    with pytest.raises(CapabilityError, match=r"step: several vCPUs cannot be stepped .*irqchip"):
        m.watch(CELL, how="step")


def test_reads_are_watched_by_debug_registers_or_refused(made: list[pykvm.Machine]) -> None:
    m = make(made, "mov eax, [0x9000]; inc ebx; out 0xf4, al")
    if m.debugger.obstacle(probe.WATCH, m.cpu):
        with pytest.raises(CapabilityError, match="single steps see writes only"):
            m.watch(CELL, 4, "rw")
    else:
        m.watch(CELL, 4, "rw")
        assert m.run(timeout=20).reason == "watchpoint"
        assert m.cpu.ebx == 0


def test_more_than_can_be_looked_at_after_each_step_is_refused(
    made: list[pykvm.Machine],
) -> None:
    m = make(made)
    need_steps(m)
    for length in (0x10001, 1 << 47, 1 << 4000):
        with pytest.raises(CapabilityError, match="0x10000 bytes can be looked at"):
            m.watch(CELL, length, how="step")
    assert not m.debugger.watchpoints
    m.watch(CELL, 0x10000, how="step")
    assert m.run(timeout=20).reason == "watchpoint"


def test_run_until_an_address_or_a_condition(made: list[pykvm.Machine]) -> None:
    m = make(made)
    need_steps(m)
    assert m.run_until("bottom", timeout=20).reason == "breakpoint"
    assert (m.cpu.rip, m.cpu.ebx) == (m.resolve("bottom"), 1)
    assert m.run_until(lambda cpu: cpu.ebx == 3, timeout=20).reason == "step"
    assert (m.cpu.ebx, m.mem[CELL]) == (3, 2)
    assert not m.debugger.breakpoints


@in_every_mode
def test_a_step_over_a_port_or_a_device_is_one_step_too(
    made: list[pykvm.Machine], mode: str, ring: int
) -> None:
    seen: list[int] = []
    device = 0x10_0000 if mode != "real16" else 0xF_0000
    m = pykvm.Machine(pykvm.GuestMemory(0xF_0000))
    made.append(m)
    code = "out 0xe9, al; inc ecx; in al, 0x60; inc ecx; mov [ebx], al; inc ecx; mov al, [ebx]; hlt"
    m.load(pykvm.asm(code.replace("ebx", "bx") if mode == "real16" else code, mode=mode, at=ENTRY))  # type: ignore[arg-type]
    m.cpu.enter(mode, entry=ENTRY, ring=ring, iopl=3)
    m.cpu.rbx = device
    if mode == "real16":
        m.cpu.ds.base, m.cpu.rbx = device, 0
    m.on_pio(0xE9, lambda access: seen.append(m.cpu.ecx))
    m.pio.constant(0x60, 0x42)
    m.mmio.constant(device, 0x37, 4)
    need_steps(m)
    got = []
    for _ in range(7):
        assert m.step().reason == "step"
        got.append((m.cpu.ecx, m.cpu.al))
    assert got == [(0, 0), (1, 0), (1, 0x42), (2, 0x42), (2, 0x42), (3, 0x42), (3, 0x37)]
    assert seen == [0]


@pytest.mark.parametrize("mode", ["real16", "prot32", "long64"])
def test_no_step_is_lost_behind_what_kvm_emulates(made: list[pykvm.Machine], mode: str) -> None:
    code = "mov eax, cr4; inc ebx; inc ebx; inc ebx; inc ebx; out 0xf4, al"
    m = make(made, code.replace("eax", "rax") if mode == "long64" else code, mode)
    need_steps(m)
    assert m.step(4).reason == "step"
    assert m.cpu.ebx == 3
    assert m.run_until(lambda cpu: cpu.ebx == 4, timeout=20).reason == "step"
    assert m.run(timeout=20).reason == "stopped"


def test_a_step_that_meets_the_end_says_so(made: list[pykvm.Machine]) -> None:
    m = make(made, "inc ebx; hlt")
    need_steps(m)
    assert m.step().reason == "step"
    assert m.step(10).reason == "halted"


@in_every_mode
def test_steps_are_a_limit_on_instructions_and_counted(
    made: list[pykvm.Machine], mode: str, ring: int
) -> None:
    m = make(made, COUNT, mode, ring)  # 2 instructions, 3 × 4, and 2 of which the last ends it
    need_steps(m)
    result = m.step(7, timeout=None)
    assert (result.reason, result.steps) == ("step", 7)
    assert (m.cpu.ebx, m.cpu.ecx, m.mem[CELL]) == (2, 2, 1)
    point = m.breakpoint("bottom")
    result = m.step(100, timeout=None)
    assert (result.reason, result.steps, m.cpu.ebx) == ("breakpoint", 1, 2)
    point.delete()
    result = m.step(100, timeout=None)
    assert (result.reason, result.steps, result.code) == ("stopped", 7, 7)
    assert "after 7 steps, " in str(result)
    assert m.run(timeout=0).steps is None


@in_every_mode
def test_a_limit_on_instructions_ends_a_guest_that_does_not_end(
    made: list[pykvm.Machine], mode: str, ring: int
) -> None:
    m = make(made, "top: inc ebx; test ebx, ebx; jmp top", mode, ring)
    need_steps(m)
    for rounds in (20, 40):
        result = m.step(60, timeout=None)
        assert (result.reason, result.steps) == ("step", 60)
        assert (m.cpu.ebx, m.cpu.rip) == (rounds, ENTRY)
    result = m.step(1 << 40, timeout=0.1)
    assert result.reason == "timeout"
    assert result.steps is not None and m.cpu.ebx == 40 + (result.steps + 2) // 3


def test_a_halt_that_was_stepped_to_is_over(made: list[pykvm.Machine]) -> None:
    m = make(made, "inc ebx; inc ebx; inc ebx; hlt")
    need_steps(m)
    assert m.step(10).reason == "halted" and m.cpu.rip == ENTRY + 7
    m.cpu.enter("long64", entry=ENTRY)
    m.breakpoint(ENTRY)  # it is stepped over, and KVM told to go on
    assert m.run(timeout=20).reason == "breakpoint"
    assert m.run(timeout=20).reason == "halted"
    assert (m.cpu.rip, m.cpu.ebx) == (ENTRY + 7, 6)


def test_a_stepped_halt_with_an_irqchip_waits_if_kvm_has_noticed_it() -> None:
    """kvm-pvm has not: docs/backends.md."""
    with pykvm.Machine("128K", irqchip=True) as m:
        m.load(pykvm.asm("cli; hlt; inc ebx; top: jmp top", mode="long64"), at=ENTRY)
        m.cpu.enter("long64", entry=ENTRY)
        m.cpu.rbx = 0
        need_steps(m)
        assert m.step(2).reason == "step" and m.cpu.rip == ENTRY + 2
        halted = m.cpu.vcpu.get_mp_state() == kvm.KVM_MP_STATE_HALTED
        result = m.step(timeout=0.3)
        assert (result.reason, m.cpu.ebx) == (("timeout", 0) if halted else ("step", 1))


def test_steps_of_one_vcpu_leave_the_others_where_they_are(made: list[pykvm.Machine]) -> None:
    m = make(made, cpus=2)
    need_steps(m)
    before = m.cpus[0].rip
    assert m.step(3, cpu=1).reason == "step"
    assert m.cpus[0].rip == before
    assert m.cpus[1].ebx == 1
