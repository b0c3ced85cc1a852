"""Random writes of guest and host, reset, equal: cases of ``random``, which is quick to import.

``tests/unit/test_reset_machine.py`` has the same by Hypothesis.
"""

from __future__ import annotations

import random
import time

import pytest

from pykvm.snapshot.reset import MODES
from tests.support.reset_cases import check, drawn

SECONDS = 5.0
"""For a hundred cases; on a slow back end at least ten are tried."""


def test_after_a_reset_the_machine_is_what_it_was() -> None:
    began, tried = time.monotonic(), set()
    for seed in range(100):
        case = drawn(random.Random(seed))
        try:
            check(case)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}\n{case}") from error
        tried.add(case.mode)
        if seed >= 9 and time.monotonic() - began > SECONDS:
            break
    print(f"{seed + 1} cases in {time.monotonic() - began:.1f} s")
    assert tried == set(MODES)


@pytest.mark.parametrize("mode", sorted(MODES))
def test_a_page_forgotten_is_found(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The property can fail: host writes that nobody notes, in a mode that counts on it."""
    monkeypatch.setattr("pykvm.memory.host_writes.HostWrites.mark", lambda *_: None)
    failed = 0
    for seed in range(12):
        case = drawn(random.Random(seed))
        case = type(case)(mode, case.patience, case.before, case.between, case.turns)
        try:
            check(case)
        except AssertionError:
            failed += 1
    assert bool(failed) == (mode != "whole")
