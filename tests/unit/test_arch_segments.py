"""Segment descriptors and gates: bytes to fields and back, against the manual's bit positions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykvm.arch.x86_64.regs import Sregs
from pykvm.arch.x86_64.segments import (
    FIELDS,
    Gate,
    Segment,
    code16,
    code32,
    code64,
    data,
    ldt,
    null,
    real_mode,
    tss,
    v8086,
)

BIT = st.integers(0, 1)


@st.composite
def segments(draw: st.DrawFn, system: bool = False) -> Segment:
    """Any segment a descriptor can hold."""
    g = draw(BIT)
    limit = draw(st.integers(0, 0xFFFFF))
    present = draw(BIT)
    return Segment(
        base=draw(st.integers(0, (1 << (64 if system else 32)) - 1)),
        limit=limit << 12 | 0xFFF if g else limit, g=g, present=present, unusable=1 - present,
        type=draw(st.integers(0, 15)), s=0 if system else draw(BIT), dpl=draw(st.integers(0, 3)),
        db=draw(BIT), l=draw(BIT), avl=draw(BIT), selector=draw(st.integers(0, 0xFFFF)),
    )  # fmt: skip


@given(segments())
def test_an_8_byte_descriptor_decodes_to_the_segment_it_was_made_from(segment: Segment) -> None:
    assert Segment.decode(segment.encode(), segment.selector) == segment


@given(segments(system=True))
def test_a_system_descriptor_of_long_mode_keeps_a_64_bit_base(segment: Segment) -> None:
    raw = segment.encode(long=True)
    assert len(raw) == 16
    assert Segment.decode(raw, segment.selector) == segment


@given(st.binary(min_size=8, max_size=8))
def test_any_8_bytes_are_a_descriptor(raw: bytes) -> None:
    assert Segment.decode(raw).encode() == raw


@pytest.mark.parametrize(
    "segment, raw",
    [  # worked out by hand from figure 3-8 of the SDM's Vol. 3A
        (code64(), "ffff0000009baf00"),
        (code32(), "ffff0000009bcf00"),
        (data(), "ffff00000093cf00"),
        (data(dpl=3), "ffff000000f3cf00"),
        (code16(), "ffff0000009b0000"),
        (tss(0x12345678), "670078563 48b0012".replace(" ", "")),
        (ldt(0x1000, 0xF), "0f00001000820000"),
        (null(), "0000000000000000"),
    ],
    ids=["code64", "code32", "data", "data3", "code16", "tss", "ldt", "null"],
)
def test_descriptors_are_those_of_the_manual(segment: Segment, raw: str) -> None:
    assert segment.encode().hex() == raw


def test_a_64_bit_tss_carries_the_upper_half_of_its_base_behind() -> None:
    raw = tss(0x1122334455667788).encode(long=True)
    assert raw[8:] == bytes.fromhex("4433221100000000")


@pytest.mark.parametrize(
    "fields, word",
    [
        ({"limit": 1 << 20}, "g=1"),
        ({"limit": 0x1000, "g": 1}, "0xfff"),
        ({"limit": (1 << 44) - 1, "g": 1}, "32 bits"),
        ({"base": 1 << 32}, "base"),
        ({"base": -1}, "base"),
    ],
)
def test_what_no_descriptor_holds_is_refused_with_the_value(
    fields: dict[str, int], word: str
) -> None:
    with pytest.raises(ValueError, match=word):
        Segment(**fields).encode()


@pytest.mark.parametrize("length", [0, 7, 9, 15, 17])
def test_other_lengths_are_no_descriptor(length: int) -> None:
    with pytest.raises(ValueError, match="8 or 16"):
        Segment.decode(bytes(length))


def test_an_unknown_field_is_named() -> None:
    with pytest.raises(TypeError, match="granularity"):
        Segment(granularity=1)  # type: ignore[call-arg]


def test_a_segment_goes_to_a_register_and_back() -> None:
    register = Sregs().ds
    code64(0x33, dpl=3).apply(register)
    assert Segment.of(register) == code64(0x33, dpl=3)
    assert Segment.of(register) is not register


def test_segments_differ_when_any_field_does() -> None:
    for name in FIELDS:
        assert Segment() != Segment(**{name: 1})
    assert Segment() != "a segment"


@pytest.mark.parametrize(
    "segment, kind, rights",
    [
        (code64(), "code64", "xra"),
        (code32(), "code32", "xra"),
        (code16(), "code16", "xra"),
        (data(), "data", "rwa"),
        (real_mode(0), "data16", "rwa"),
        (tss(0), "tss busy", ""),
        (tss(0, busy=False), "tss", ""),
        (ldt(0, 7), "ldt", ""),
        (null(), "null", ""),
        (Segment(present=1, s=1, type=15), "code16", "xrca"),
        (Segment(present=1, s=1, type=4), "data16", "re"),
        (Segment(present=1, type=13), "system type 13", ""),
    ],
)
def test_a_segment_says_what_it_is(segment: Segment, kind: str, rights: str) -> None:
    assert (segment.kind, segment.rights) == (kind, rights)
    assert kind in repr(segment) and rights in repr(segment)


def test_the_repr_has_all_a_reader_asks_for() -> None:
    text = repr(code64(0x33, dpl=3))
    assert text == "0x0033 code64   DPL3 base 0x0 limit 0xffffffff xra"
    assert "not-present" in repr(Segment(s=1, type=3))


def test_real_mode_and_v8086_segments_follow_the_selector() -> None:
    assert real_mode(0x1234).base == v8086(0x1234).base == 0x12340
    assert real_mode(0, code=True).type == 11
    assert v8086(0).access == 0xF3


@given(
    st.integers(0, (1 << 64) - 1), st.integers(0, 0xFFFF), st.integers(0, 15),
    st.integers(0, 3), BIT, st.integers(0, 7),
)  # fmt: skip
def test_a_gate_of_long_mode_decodes_to_what_it_was_made_from(
    offset: int, selector: int, kind: int, dpl: int, present: int, ist: int
) -> None:
    gate = Gate(offset, selector, kind, dpl, present, ist)
    assert len(gate.encode()) == 16
    assert Gate.decode(gate.encode()) == gate


@given(st.integers(0, (1 << 32) - 1), st.integers(0, 0xFFFF), st.integers(0, 15))
def test_a_32_bit_gate_decodes_to_what_it_was_made_from(
    offset: int, selector: int, kind: int
) -> None:
    gate = Gate(offset, selector, kind)
    assert len(gate.encode(long=False)) == 8
    assert Gate.decode(gate.encode(long=False)) == gate


@given(st.binary(min_size=16, max_size=16) | st.binary(min_size=8, max_size=8))
def test_any_bytes_of_a_gates_size_are_a_gate(raw: bytes) -> None:
    assert repr(Gate.decode(raw))


def test_a_gate_is_that_of_the_manual() -> None:
    gate = Gate(0x1122334455667788, 0x10, 14, dpl=3, ist=1)
    assert gate.encode().hex() == "8877100001ee66554433221100000000"
    assert repr(gate) == "interrupt → 0x10:0x1122334455667788 DPL3 IST1"
    assert repr(Gate(present=0)).endswith("not-present")


@pytest.mark.parametrize(
    "gate, long",
    [
        (Gate(1 << 64), True),
        (Gate(1 << 32), False),
        (Gate(0, 1 << 16), True),
        (Gate(dpl=4), True),
        (Gate(type=16), True),
        (Gate(ist=8), True),
        (Gate(ist=1), False),
    ],
)
def test_a_gate_that_does_not_fit_is_refused(gate: Gate, long: bool) -> None:
    with pytest.raises(ValueError):
        gate.encode(long)


def test_other_lengths_are_no_gate() -> None:
    with pytest.raises(ValueError, match="8 or 16"):
        Gate.decode(bytes(12))
    assert Gate() != "a gate"
