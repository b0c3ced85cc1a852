"""The parts of the benches that need neither KVM nor a quiet machine: figures, goals, output."""

from __future__ import annotations

import json
import math
import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benches import measure, reference, run
from benches.measure import OF_DIFFERENCE, OF_OURS, BenchError, Goal, Result, compare, take_turns

COSTS = st.floats(min_value=1e-3, max_value=1e9)
PAIRED = st.lists(st.tuples(COSTS, COSTS), min_size=1, max_size=50)


def result(ours: float, reference: float, goal: Goal | None = None) -> Result:
    return compare("a/b", "ns", [ours], [reference], goal=goal)


# ---- taking samples ------------------------------------------------------------------------------


def test_samplers_take_turns_in_alternating_order_after_a_warm_up() -> None:
    calls: list[str] = []

    def sampler(name: str) -> float:
        calls.append(name)
        return 1.0

    take_turns([lambda: sampler("a"), lambda: sampler("b")], 3)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"


def test_every_sampler_leads_as_often_when_there_are_three() -> None:
    order: list[int] = []

    def sampler(which: int) -> float:
        order.append(which)
        return float(which)

    take_turns([lambda: sampler(0), lambda: sampler(1), lambda: sampler(2)], 6)
    leaders = [order[start] for start in range(3, len(order), 3)]
    assert sorted(leaders) == [0, 0, 1, 1, 2, 2]


def test_samples_stay_with_their_sampler_and_the_warm_up_is_dropped() -> None:
    counters = [iter(range(100)), iter(range(1000, 1100))]
    ours, reference = take_turns([lambda: float(next(counters[0])), lambda: next(counters[1])], 4)
    assert ours == [1, 2, 3, 4]
    assert reference == [1001, 1002, 1003, 1004]


def test_no_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="not 0"):
        take_turns([lambda: 1.0], 0)


# ---- figures -------------------------------------------------------------------------------------


@given(PAIRED)
def test_the_ratio_is_the_median_of_the_pairs_ratios(pairs: list[tuple[float, float]]) -> None:
    ours, reference = zip(*pairs, strict=True)
    made = compare("a/b", "ns", ours, reference)
    assert made.ratio == statistics.median(a / b for a, b in pairs)
    assert made.ours == statistics.median(ours)
    assert made.pairs == len(pairs)
    low, high = made.spread["ratio"]
    assert low <= made.ratio <= high or math.isclose(low, high)


def test_drift_that_meets_both_does_not_touch_the_ratio() -> None:
    drift = [1.0, 5.0, 2.0, 40.0, 3.0]
    made = compare("a/b", "ns", [1.1 * d for d in drift], drift)
    assert made.ratio == pytest.approx(1.1)
    assert made.spread["ratio"] == pytest.approx((1.1, 1.1))


def test_a_ratio_of_medians_survives_pairs_without_a_difference() -> None:
    made = compare("a/b", "ns", [1, 1, 1], [4, 0, 5], ratio_of="medians")
    assert made.ratio == 0.25


@pytest.mark.parametrize(("ours", "reference"), [(1, -1), (-1, 1), (1, 0), (-1, -9)])
def test_a_difference_that_drowned_in_noise_is_no_pass(ours: float, reference: float) -> None:
    made = compare("a/b", "ns", [ours], [reference], ratio_of="medians", goal=Goal(0.4))
    assert made.ratio == math.inf
    assert made.holds is False


@pytest.mark.parametrize(("ours", "reference"), [([], []), ([1], [1, 2])])
def test_samples_without_a_partner_are_refused(ours: list[float], reference: list[float]) -> None:
    with pytest.raises(ValueError, match="pairs"):
        compare("a/b", "ns", ours, reference)


def test_an_unknown_kind_of_ratio_is_refused() -> None:
    with pytest.raises(ValueError, match="ratio_of"):
        compare("a/b", "ns", [1], [1], ratio_of="means")


def test_quartiles_frame_the_middle_half() -> None:
    assert measure.quartiles([1, 2, 3, 4, 5]) == (2, 4)
    assert measure.quartiles([7]) == (7, 7)


# ---- goals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("goal", "at", "above"),
    [
        (Goal(1.5), (15, 10), (16, 10)),
        (Goal(50, OF_OURS), (50, 1), (51, 100)),
        (Goal(10, OF_DIFFERENCE), (20, 10), (21, 10)),
    ],
)
def test_a_goal_holds_up_to_its_limit(
    goal: Goal, at: tuple[float, float], above: tuple[float, float]
) -> None:
    assert result(*at, goal).holds is True
    assert result(*above, goal).holds is False


def test_a_figure_without_a_goal_neither_holds_nor_misses() -> None:
    assert result(9, 1).holds is None


# ---- output --------------------------------------------------------------------------------------


def test_json_has_one_object_a_result_with_all_that_a_reader_needs() -> None:
    data = json.loads(measure.to_json([result(3, 2, Goal(1.05)), result(1, 2)], "kvm_x"))
    assert [entry["name"] for entry in data] == ["a/b", "a/b"]
    first, second = data
    assert first["backend"] == "kvm_x"
    assert (first["ours"], first["reference"], first["ratio"]) == (3, 2, 1.5)
    assert (first["goal"], first["goal_of"], first["holds"]) == (1.05, "ratio", False)
    assert (first["pairs"], first["unit"]) == (1, "ns")
    assert first["spread"]["ratio"] == [1.5, 1.5]
    assert (second["goal"], second["holds"]) == (None, None)


def test_the_table_lines_up_and_says_which_goal_is_missed() -> None:
    lines = measure.table([result(3, 2, Goal(1.05)), result(10, 1, Goal(50, OF_OURS))]).splitlines()
    assert len({len(line) for line in lines[:2]}) == 1
    assert lines[2].endswith("NO") and "≤ 1.05×" in lines[2]
    assert lines[3].endswith("yes") and "ours ≤ 50" in lines[3]


# ---- the command ---------------------------------------------------------------------------------


def bench(results: list[Result] | Exception, c_only: bool = True) -> ModuleType:
    def measured(pairs: int) -> Iterator[Result]:
        if isinstance(results, Exception):
            raise results
        yield from results

    return cast(ModuleType, SimpleNamespace(__doc__="Why?", C_ONLY=c_only, measure=measured))


@pytest.fixture
def questions(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    modules = {
        "good": bench([result(1, 2, Goal(1))]),
        "missed": bench([result(3, 2, Goal(1))], c_only=False),
        "broken": bench(BenchError("no KVM here")),
    }
    monkeypatch.setattr(run, "QUESTIONS", tuple(modules))
    monkeypatch.setattr(run, "load", modules.__getitem__)
    return modules


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["good"], 0),
        (["missed"], 0),
        (["good", "--strict"], 0),
        (["missed", "--strict"], 1),
        (["broken"], 1),
        (["good", "broken", "missed"], 1),
        (["good", "missed", "--c-only", "--strict"], 0),
    ],
)
def test_the_exit_status_tells_failures_and_with_strict_misses(
    questions: dict[str, ModuleType], arguments: list[str], status: int
) -> None:
    assert run.main([*arguments, "--pairs", "1"]) == status


def test_a_broken_bench_does_not_cost_the_others_their_figures(
    questions: dict[str, ModuleType], tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(["--pairs", "1", "--json", str(tmp_path / "out.json")]) == 1
    data = json.loads((tmp_path / "out.json").read_text())
    assert [entry["holds"] for entry in data] == [True, False]
    out, err = capsys.readouterr()
    assert "could not run: broken" in out
    assert "no KVM here" in err
    assert "fewer than 15 pairs" in out


@pytest.mark.parametrize("arguments", [["nothing-of-the-kind"], ["good", "--pairs", "0"]])
def test_bad_arguments_are_said_to_be_bad(
    questions: dict[str, ModuleType], arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run.main(arguments)
    assert stopped.value.code == 2
    assert "error" in capsys.readouterr().err


def test_the_list_asks_every_question_and_marks_what_python_decides(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(run.QUESTIONS)
    assert all("?" in line for line in lines)
    host_only = {line.split()[0] for line in lines if line.endswith("[host only]")}
    assert {"fake-loop", "handler"} <= host_only and "c-action" not in host_only


def test_every_question_can_be_loaded_and_answers_with_measure() -> None:
    for name in run.QUESTIONS:
        module = run.load(name)
        assert callable(module.measure)
        assert isinstance(module.C_ONLY, bool)


# ---- the question that needs no KVM --------------------------------------------------------------


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc to build the C reference with")
def test_a_reference_is_built_once_and_where_nothing_can_be_kept_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = reference.build.__wrapped__  # without its memory
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert build("fake_loop.c").fake_loop
    (kept,) = (tmp_path / "cache").rglob("*.*")
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(BenchError, match="no C compiler: no-such-compiler"):
        build("fake_loop.c")
    monkeypatch.delenv("CC")
    monkeypatch.setenv("XDG_CACHE_HOME", str(kept))  # a file: nothing can be made in it
    assert build("fake_loop.c").fake_loop


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc to build the C reference with")
def test_the_fake_loop_is_measured_without_kvm() -> None:
    results = {made.name: made for made in run.load("fake-loop").measure(1)}
    assert results["fake-loop/c-ignore"].goal == Goal(50, OF_OURS)
    assert results["fake-loop/handler"].goal == Goal(300, OF_OURS)
    # Python costs more than C and both more than nothing: the loops really ran.
    assert results["fake-loop/handler"].ours > results["fake-loop/c-ignore"].ours > 0
    assert all(made.reference > 0 for made in results.values())
