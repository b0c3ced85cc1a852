"""Random writes of guest and host, reset, equal: on a real machine, with cases of Hypothesis's."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pykvm.snapshot.reset import MODES
from tests.support import reset_cases as cases

pytestmark = pytest.mark.needs_kvm

OFFSETS = st.integers(0, cases.PLACES - 1)


@st.composite
def write(draw: st.DrawFn) -> cases.Write:
    size = draw(st.sampled_from(cases.SIZES))
    value = draw(st.integers(0, (1 << 8 * size) - 1))
    return cases.place(draw(OFFSETS), size), size, value


@st.composite
def by_host(draw: st.DrawFn) -> tuple[str, int, int, int]:
    length = draw(st.integers(1, 3 * cases.PAGE))
    gpa = cases.place(draw(OFFSETS), length)
    return draw(st.sampled_from(cases.HOW)), gpa, length, draw(st.integers(0, 255))


def some(of: st.SearchStrategy[object], most: int) -> st.SearchStrategy[object]:
    return st.lists(of, max_size=most).map(tuple)


TURNS = st.builds(
    cases.Turn,
    guest=some(write(), cases.MOST_WRITES),
    host=some(by_host(), 3),
    registers=some(st.tuples(st.sampled_from(cases.REGISTERS), st.integers(0, 15)), 3),
    second=st.booleans(),
)
CASES = st.builds(
    cases.Case,
    mode=st.sampled_from(sorted(MODES)),
    patience=st.sampled_from((0, 1, 32)),
    before=some(write(), cases.MOST_WRITES),
    between=some(write(), 2),
    turns=some(TURNS, 10),
)


@settings(max_examples=100, deadline=None)
@given(CASES)
def test_after_a_reset_the_machine_is_what_it_was(case: cases.Case) -> None:
    cases.check(case)
