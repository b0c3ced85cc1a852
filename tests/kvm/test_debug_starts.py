"""What a breakpoint does where a run begins: docs/debugging.md has the rule."""

from __future__ import annotations

import pytest

import pykvm
from tests.support.stops import CELL, ENTRY, MODES, machine, make, need, need_steps

in_every_way = pytest.mark.parametrize(
    ("mode", "ring", "how"),
    [(*mode, how) for mode in MODES for how in ("port", "hardware", "step")],
)

LINE = "start: inc ebx; top: inc ebx; mov [0x9000], ebx; end: inc ebx; out 0xf4, al"


def ready(made: list[pykvm.Machine], mode: str, ring: int, how: str) -> pykvm.Machine:
    m = make(made, LINE, mode, ring)
    need(m, how)
    need_steps(m)
    return m


@in_every_way
def test_one_at_the_first_instruction_is_hit_at_once_and_then_gone_past(
    made: list[pykvm.Machine], mode: str, ring: int, how: str
) -> None:
    m = ready(made, mode, ring, how)
    point = m.breakpoint("start", how=how)
    result = m.run(timeout=20)
    assert (result.reason, result.exit.point, m.cpu.ebx) == ("breakpoint", point, 0)
    assert m.cpu.rip == ENTRY
    assert m.run(timeout=20).reason == "stopped"
    assert (m.cpu.ebx, point.hits) == (3, 1)


@in_every_way
def test_one_there_whose_condition_does_not_hold_is_asked_once(
    made: list[pykvm.Machine], mode: str, ring: int, how: str
) -> None:
    m = ready(made, mode, ring, how)
    point = m.breakpoint("start", lambda cpu: cpu.ebx == 1, how=how)
    assert m.run(timeout=20).reason == "stopped"
    assert (m.cpu.ebx, point.hits, point.passed) == (3, 0, 1)


@in_every_way
def test_a_step_that_arrives_at_one_says_so(
    made: list[pykvm.Machine], mode: str, ring: int, how: str
) -> None:
    m = ready(made, mode, ring, how)
    point, never = m.breakpoint("top", how=how), m.breakpoint("end", lambda cpu: False, how=how)
    result = m.step()
    assert (result.reason, result.exit.point, m.cpu.ebx) == ("breakpoint", point, 1)
    assert m.step(2).reason == "step"
    assert m.cpu.rip == m.resolve("end")
    assert m.run(timeout=20).reason == "stopped"
    assert (point.hits, never.hits, never.passed) == (1, 0, 1)


@in_every_way
def test_one_that_is_set_where_a_step_led_is_hit_at_once(
    made: list[pykvm.Machine], mode: str, ring: int, how: str
) -> None:
    m = ready(made, mode, ring, how)
    assert m.step().reason == "step"
    point = m.breakpoint("top", how=how)
    result = m.run(timeout=20)
    assert (result.reason, result.exit.point, m.cpu.ebx) == ("breakpoint", point, 1)
    assert m.run(timeout=20).reason == "stopped"
    assert point.hits == 1


@in_every_way
def test_another_one_set_where_one_was_told_of_is_hit_too(
    made: list[pykvm.Machine], mode: str, ring: int, how: str
) -> None:
    m = ready(made, mode, ring, how)
    first = m.breakpoint("top", how=how)
    assert m.run(timeout=20).exit.point is first
    second = m.breakpoint("top", how=how)
    result = m.run(timeout=20)
    assert (result.exit.point, m.cpu.ebx) == (second, 1)
    assert m.run(timeout=20).reason == "stopped"
    assert (first.hits, second.hits) == (1, 1)


@in_every_way
def test_a_vcpu_that_enters_anew_is_stopped_anew(
    made: list[pykvm.Machine], mode: str, ring: int, how: str
) -> None:
    m = ready(made, mode, ring, how)
    s = m.snapshot()
    point = m.breakpoint("start", how=how)
    for again in (lambda: None, s.restore, lambda: m.cpu.enter(mode, entry=ENTRY, ring=ring)):
        again()
        assert m.run(timeout=20).reason == "breakpoint"
        assert m.cpu.rip == ENTRY
    assert point.hits == 3


@in_every_way
def test_run_until_where_it_stands_goes_on_to_the_next_time(
    made: list[pykvm.Machine], mode: str, ring: int, how: str
) -> None:
    m = make(made, "mov ecx, 3; top: inc ebx; dec ecx; jnz top; out 0xf4, al", mode, ring)
    need(m, how)
    need_steps(m)
    point = m.breakpoint("top", how=how)
    assert m.run(timeout=20).reason == "breakpoint"
    point.delete()
    for count in (1, 2):
        assert m.run_until("top", timeout=20).reason == "breakpoint"
        assert m.cpu.ebx == count
    assert m.run_until("top", timeout=20).reason == "stopped"


@pytest.mark.parametrize("how", ["port", "hardware", "step"])
def test_one_behind_a_write_that_is_watched_is_told_of_after_that(
    made: list[pykvm.Machine], how: str
) -> None:
    m = ready(made, "long64", 0, how)
    point, watched = m.breakpoint("end", how=how), m.watch(CELL, 4)
    assert m.run(timeout=20).exit.point is watched
    result = m.run(timeout=20)
    assert (result.exit.point, m.cpu.ebx) == (point, 2)
    assert m.run(timeout=20).reason == "stopped"


@pytest.mark.parametrize("how", ["port", "hardware", "step"])
def test_each_of_several_vcpus_is_told_of_it_in_turn(how: str) -> None:
    with machine("start: inc ebx; hlt", cpus=2) as m:
        need(m, how)
        need_steps(m)
        m.breakpoint("start", how=how)
        told = [m.run(timeout=20) for _ in range(2)]
        assert [(result.reason, result.cpu) for result in told] == [
            ("breakpoint", 0), ("breakpoint", 1),
        ]  # fmt: skip
        assert [cpu.ebx for cpu in m.cpus] == [0, 0]
        assert m.run(timeout=20).reason == "halted"
        assert [cpu.ebx for cpu in m.cpus] == [1, 1]


def test_a_block_where_a_run_was_stopped_is_covered(made: list[pykvm.Machine]) -> None:
    m = ready(made, "long64", 0, "port")
    m.breakpoint("top")
    assert m.run(timeout=20).reason == "breakpoint"
    with m.coverage([m.resolve("top"), m.resolve("end")]) as covered:
        assert m.run(timeout=20).reason == "stopped"
    assert list(covered.hit) == [m.resolve("top"), m.resolve("end")]


@pytest.mark.parametrize("how", ["port", "hardware", "step"])
def test_one_behind_a_write_to_a_port_that_ended_a_run_is_hit(
    made: list[pykvm.Machine], how: str
) -> None:
    m = make(made, "inc ebx; out 0xe9, al; next: inc ebx; out 0xf4, al")
    need(m, how)
    m.on_pio(0xE9, lambda access: m.stop("enough"))
    assert m.run(timeout=20).reason == "enough"
    point = m.breakpoint("next", how=how)
    result = m.run(timeout=20)
    assert (result.reason, result.exit.point, m.cpu.ebx) == ("breakpoint", point, 1)
    assert m.run(timeout=20).reason == "stopped"


@in_every_way
def test_one_on_a_jump_to_itself_does_not_outlast_the_timeout(
    made: list[pykvm.Machine], mode: str, ring: int, how: str
) -> None:
    m = make(made, "top: jmp top", mode, ring)
    need(m, how)
    need_steps(m)
    point = m.breakpoint("top", lambda cpu: point.passed == 2 and not point.hits, how=how)
    assert m.run(timeout=20).reason == "breakpoint"
    assert point.passed == 2
    assert m.run(timeout=0.05).reason == "timeout"
