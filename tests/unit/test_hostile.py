"""The search for what a hostile driver could do: it finds bugs, and finds none here."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import pytest

import tests.hostile.__main__ as hostile
from tests.hostile.build import BuildError, Variant, patched
from tests.hostile.coverage import BranchCoverage
from tests.hostile.machines import HostileDriver
from tests.hostile.planted import DEVICE, RING
from tests.hostile.rings import WatchedPair
from tests.support.twin_memory import Mismatch
from tests.support.vring_compare import Pair

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")

STEPS = 60
BUDGET = 60_000
"""Steps in which a planted bug has to be found; most are within some hundreds."""


@pytest.fixture(scope="module")
def watched() -> Iterator[Variant]:
    variant = Variant()
    yield variant
    variant.close()


# ---- it finds nothing ----------------------------------------------------------------------------


@pytest.mark.sanitize
def test_queue_and_model_agree_whatever_a_driver_does() -> None:
    met: set[str] = set()
    for seed in range(60):
        pair = Pair(Random(seed))
        for _ in range(STEPS):
            pair.step()
        met |= pair.breaches.keys()
    assert len(met) > 3  # drivers that broke the rules, in ways that both took for the same


@pytest.mark.sanitize
def test_devices_and_model_agree_whatever_a_driver_does() -> None:
    steps: set[str] = set()
    kinds: set[str] = set()
    for seed in range(60):
        driver = HostileDriver(Random(seed))
        steps |= {driver.step() for _ in range(STEPS)}  # Mismatch, where they do not agree
        driver.prove()
        assert driver.device.counters.requests > 0
        kinds.add(driver.kind)
        driver.close()
    assert len(kinds) == 4 and len(steps) >= 9


@needs_gcc
def test_the_queue_reads_each_byte_once_and_touches_nothing_else(watched: Variant) -> None:
    races = 0
    for seed in range(60):
        pair = WatchedPair(Random(seed), watched)
        for _ in range(STEPS):
            pair.step()
        races += pair.races
    assert races > 100
    taken, total = watched.branches()
    assert taken > 0.85 * total > 100


# ---- it would find something ---------------------------------------------------------------------


@needs_gcc
@pytest.mark.parametrize("name", RING)
def test_a_bug_planted_into_the_queue_is_found(name: str) -> None:
    variant = Variant(RING[name])
    try:
        with pytest.raises(Mismatch):
            _search_ring(variant)
    finally:
        variant.close()


def _search_ring(variant: Variant) -> None:
    for seed in range(BUDGET // STEPS):
        pair = WatchedPair(Random(seed), variant)
        for _ in range(STEPS):
            pair.step()


@pytest.mark.parametrize("name", DEVICE)
def test_a_bug_planted_into_the_devices_is_found(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, method, bug = DEVICE[name]
    monkeypatch.setattr(target, method, bug)
    with pytest.raises(Exception, match=r"."):
        _search_devices()


def _search_devices() -> None:
    for seed in range(BUDGET // STEPS):
        driver = HostileDriver(Random(seed))
        for _ in range(STEPS):
            driver.step()
        driver.prove()
        driver.close()


def test_every_planted_bug_still_fits() -> None:
    for patches in RING.values():
        patched(patches)
    with pytest.raises(BuildError, match="0 places"):
        patched([("there is no such line", "")])


# ---- the command ---------------------------------------------------------------------------------


@needs_gcc
def test_the_command_says_what_it_did(capsys: pytest.CaptureFixture[str]) -> None:
    status = hostile.main(
        ["--operations", "300", "--seed", "5", "--only", "ring", "--only", "device"]
    )
    said = capsys.readouterr().out
    assert status == 0
    assert said.startswith("seed 5\nring: 300 operations, 100 with every access watched")
    assert "device: 300 operations" in said
    assert said.count("distinct states") == 2 and said.count("branches of") == 2


def test_a_breach_is_told_with_what_repeats_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(*DEVICE["a reset leaves the queues"])
    arguments = ["--only", "device", "--operations", "20000", "--seed"]
    assert hostile.main([*arguments, "11"]) == 1
    said = capsys.readouterr().out
    assert "BREACH" in said
    again = said.partition("repeat it: ")[2].split("(")[0].split()
    assert hostile.main(again) == 1
    assert (
        capsys.readouterr().out.partition("BREACH")[2].split("(")[0]
        == (said.partition("BREACH")[2].split("(")[0])
    )


def test_a_process_that_grows_is_a_breach(monkeypatch: pytest.MonkeyPatch) -> None:
    growth = hostile.Growth()
    growth.check(hostile.WARM)
    growth.check(hostile.WARM + 1)
    kept = b"x" * (hostile.GROWTH + (256 << 20))
    with pytest.raises(hostile.Breach, match="grew"):
        growth.check(hostile.WARM + 2)
    del kept


LOOK = """
def look(times):
    total = 0
    for n in range(
        times
    ):
        total += n
    if times:
        total += 1
    return total
"""


def test_branches_are_counted_both_ways(tmp_path: Path) -> None:
    file = tmp_path / "looked_at.py"
    file.write_text(LOOK)
    module: Any = ModuleType("looked_at")
    module.__file__ = str(file)
    exec(compile(LOOK, str(file), "exec"), module.__dict__)
    coverage = BranchCoverage([module])
    assert (coverage.taken, coverage.total) == (0, 4)
    with coverage():
        assert module.look(1) == 1
    assert coverage.taken == 3 and coverage.missing() == ["looked_at.py:8 past"]
    with coverage():
        module.look(0)
    assert coverage.taken == 4 and coverage.missing() == []
