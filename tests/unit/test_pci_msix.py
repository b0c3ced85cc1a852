"""MSI-X: what is sent, what waits, and what it costs."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pykvm.devices.pci_msix import ENABLE, MASK_ALL, Msix
from tests.support.pci_guest import MESSAGE, Lines


@pytest.fixture
def lines() -> Lines:
    return Lines()


@pytest.fixture
def msix(lines: Lines) -> Msix:
    return Msix(3, lines)


def program(msix: Msix, vector: int, *, data: int = 0x41, masked: int = 0) -> None:
    for offset, value in ((0, MESSAGE), (4, 0), (8, data), (12, masked)):
        msix.write_table(16 * vector + offset, 4, value)


def test_a_message_is_sent_once_it_is_programmed(msix: Msix, lines: Lines) -> None:
    msix.control(ENABLE)
    assert not lines.routes  # every vector is masked at first
    program(msix, 1)
    assert lines.routes == [{1: (MESSAGE, 0x41)}]
    msix.signal(1)
    assert lines.taken() == [1]


def test_a_masked_vector_pends_and_is_sent_when_it_is_unmasked(msix: Msix, lines: Lines) -> None:
    program(msix, 1)
    program(msix, 2, masked=1)
    msix.control(ENABLE | MASK_ALL)
    msix.signal(1)
    msix.signal(2)
    assert lines.taken() == [] and msix.read_pending(0, 8) == 0b110
    msix.control(ENABLE)
    assert lines.taken() == [1] and msix.read_pending(0, 1) == 0b100
    msix.write_table(16 * 2 + 12, 4, 0)
    assert lines.taken() == [2] and msix.read_pending(0, 4) == 0


def test_switched_off_it_sends_nothing(msix: Msix, lines: Lines) -> None:
    program(msix, 0)
    msix.signal(0)
    msix.control(ENABLE)
    msix.control(0)
    msix.signal(0)
    msix.control(0)
    assert lines.taken() == [0]  # pending when it was switched on; the second is forgotten
    msix.control(ENABLE)
    assert lines.taken() == []


def test_routes_change_together_and_only_if_they_change(msix: Msix, lines: Lines) -> None:
    for vector in range(3):
        program(msix, vector, data=vector)
    assert not lines.routes
    msix.control(ENABLE)
    assert lines.routes == [{vector: (MESSAGE, vector) for vector in range(3)}]
    for control in (ENABLE | MASK_ALL, ENABLE, 0, ENABLE):
        msix.control(control)
    msix.write_table(12, 4, 1)
    msix.write_table(12, 4, 0)
    assert len(lines.routes) == 1
    msix.write_table(16 + 8, 4, 77)
    assert lines.routes[1:] == [{1: (MESSAGE, 77)}]


@pytest.mark.parametrize("address", [0, 0x1000, 0xFEC0_0000, 0xFEF0_0000])
def test_what_is_no_interrupt_is_not_routed(msix: Msix, lines: Lines, address: int) -> None:
    msix.control(ENABLE)
    program(msix, 0)
    msix.write_table(0, 4, address)
    assert lines.routes[-1] == {0: None}


def test_the_table_is_written_in_words_and_remembers_one_control_bit(msix: Msix) -> None:
    msix.write_table(0, 8, 0x1122_3344_5566_7788)
    msix.write_table(8, 4, 0x99AA_BBCC)
    msix.write_table(12, 4, 0xFFFF_FFFE)
    assert msix.read_table(0, 8) == 0x1122_3344_5566_7788 and msix.read_table(12, 4) == 0
    before = msix.state()
    for offset, size in ((0, 1), (0, 2), (2, 4), (4, 8), (48, 4), (1 << 20, 4)):
        msix.write_table(offset, size, 0)
    assert msix.state() == before
    assert msix.read_table(48, 4) == 0 and msix.read_table(44, 8) == 1


def test_state_brings_back_table_and_pending(msix: Msix, lines: Lines) -> None:
    program(msix, 0)
    program(msix, 1, masked=1)
    msix.control(ENABLE)
    msix.signal(1)
    other = Lines()
    again = Msix(3, other)
    again.restore(msix.state(), ENABLE)
    assert other.routes == [{0: (MESSAGE, 0x41)}] and other.taken() == []
    again.write_table(16 + 12, 4, 0)
    assert other.taken() == [1]


@pytest.mark.parametrize("count", [0, 2049])
def test_the_number_of_vectors_is_limited(count: int, lines: Lines) -> None:
    with pytest.raises(ValueError, match="1 to 2048"):
        Msix(count, lines)


STEP = st.one_of(
    st.tuples(st.just("signal"), st.integers(0, 2), st.just(0)),
    st.tuples(st.just("mask"), st.integers(0, 2), st.integers(0, 1)),
    st.tuples(st.just("control"), st.sampled_from([0, ENABLE, ENABLE | MASK_ALL]), st.just(0)),
    st.tuples(st.just("write"), st.integers(0, 60), st.integers(0, 1 << 32)),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(STEP, max_size=40))
def test_nothing_is_sent_that_is_masked_and_nothing_is_lost(
    steps: list[tuple[str, int, int]],
) -> None:
    """A model: three masks, an enable, and who waits."""
    lines = Lines()
    msix = Msix(3, lines)
    control, masked, waiting = 0, [True] * 3, [False] * 3

    def open(vector: int) -> bool:
        return control == ENABLE and not masked[vector]

    for what, first, second in steps:
        expected = []
        if what == "signal":
            msix.signal(first)
            if open(first):
                expected = [first]
            else:
                waiting[first] = True
        elif what == "control":
            msix.control(first)
            control = first
            if not control & ENABLE:
                waiting = [False] * 3
        elif what == "mask":
            msix.write_table(16 * first + 12, 4, second)
            masked[first] = bool(second)
        elif first % 16 < 12:  # not a mask: never sends anything new
            msix.write_table(first, 4, second & 0xFFFF_FFFF)
        for vector in range(3):
            if waiting[vector] and open(vector):
                expected.append(vector)
                waiting[vector] = False
        assert sorted(lines.taken()) == sorted(expected)
        assert msix.read_pending(0, 1) == sum(each << at for at, each in enumerate(waiting))
