"""How the doctor measures, on clocks and kernels of our own."""

from __future__ import annotations

import shutil

import pytest

from pykvm import doctor
from pykvm.doctor import measure
from pykvm.doctor.measure import Ring0, Timing

# ---- measuring ---------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("as") is None, reason="needs as (binutils)")
def test_the_code_that_is_timed_is_what_its_comment_says() -> None:
    from pykvm.assembler import asm

    assert bytes(asm("l: inc rcx\n jmp l")) == measure.COUNT_CODE
    outs = "out 0x80, al\n" * 63
    assert bytes(asm(f"l: {outs} jmp l")) == measure.OUT_CODE


@pytest.mark.parametrize(
    ("ring0_ns", "verdict", "boots"), [(700.0, "emulated", False), (0.4, "native", True)]
)
def test_ring_0_is_judged_by_ring_3(
    monkeypatch: pytest.MonkeyPatch, ring0_ns: float, verdict: str, boots: bool
) -> None:
    monkeypatch.setattr(measure, "instruction_ns", lambda ring, path: {0: ring0_ns, 3: 0.3}[ring])
    ring0 = measure.ring0()
    assert ring0 == Ring0(verdict, ring0_ns, 0.3, ring0_ns / 0.3)
    report = doctor.Report("/dev/kvm", ring0=ring0)
    assert report.linux[0] is boots
    assert any("ring=3" in line for line in report.advice) is not boots


@pytest.mark.parametrize(("ring3", "told"), [(40.0, True), (15.0, False)])
def test_dear_exits_from_ring_3_are_told(ring3: float, told: bool) -> None:
    costs = {
        "pio_c": Timing("", 12.0, 10.0, 50.0),
        "pio_ring3": Timing("", ring3, ring3, ring3),
    }
    advice = doctor.Report("/dev/kvm", costs=costs).advice
    assert any("4.0 times" in line for line in advice) is told


def test_where_both_rings_are_slow_ring_0_is_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "instruction_ns", lambda ring, path: {0: 9.0, 3: 5.0}[ring])
    assert measure.ring0().verdict == "native"


def test_a_timing_is_the_median_and_the_first_sample_does_not_count() -> None:
    taken = iter([(9.0, 1), (0.003, 1), (0.001, 1), (0.004, 2), (0.005, 1), (0.009, 1)])
    timing = measure._median("x", lambda seconds: next(taken))
    assert [timing.ns, timing.low, timing.high] == pytest.approx([3e6, 1e6, 9e6])
    assert timing.per_second == pytest.approx(1000 / 3)


def test_a_slow_machine_gets_longer_samples() -> None:
    asked: list[float] = []

    def sample(seconds: float) -> tuple[float, int]:
        asked.append(seconds)
        return seconds, int(seconds / 0.015)

    timing = measure._median("x", sample)
    assert asked[:3] == [0.004, 0.008, 0.016]
    assert set(asked[3:]) == {0.016}
    assert timing.ns == pytest.approx(16e6)


def test_samples_that_all_come_out_empty_are_taken_again_and_longer() -> None:
    taken = iter([1, 0, 0, 0, 0, 0, 1, 0, 1, 0, 0, 0])
    timing = measure._median("x", lambda seconds: (seconds, next(taken)))
    assert timing.ns == pytest.approx(8e6)


def test_a_machine_that_makes_no_exit_at_all_ends_the_measurement() -> None:
    with pytest.raises(RuntimeError, match="nothing happened"):
        measure._median("x", lambda seconds: (seconds, 0))
