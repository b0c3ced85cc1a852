"""AML: what is encoded is disassembled to what it was, and any bytes are shown or refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykvm.arch.x86_64 import aml

_names = st.from_regex(r"\A[A-Z_][A-Z0-9_]{0,3}\Z")
_values = st.recursive(
    st.integers(0, 2**64 - 1).map(lambda n: (aml.integer(n), n))
    | st.text(st.characters(codec="ascii", min_codepoint=0x20), max_size=20)
    .filter(lambda text: '"' not in text)
    .map(lambda text: (aml.string(text), text)),
    lambda inner: st.lists(inner, max_size=5).map(
        lambda items: (aml.package(*[code for code, _ in items]), [value for _, value in items])
    ),
    max_leaves=8,
)


def _as_asl(value: Any) -> str:
    if isinstance(value, list):
        return f"Package () {{{', '.join(map(_as_asl, value))}}}"
    if isinstance(value, str):
        return f'"{value}"'
    return {0: "Zero", 1: "One"}.get(value, f"{value:#x}")


@given(name=_names, value=_values)
def test_values_are_disassembled_to_what_they_were(name: str, value: tuple[bytes, Any]) -> None:
    code, plain = value
    shown = aml.disassemble(aml.scope("\\_SB", aml.device(name, aml.name("_UID", code))))
    lines = shown.splitlines()
    assert lines[0] == "Scope (\\_SB_)"
    assert lines[1].strip() == f"Device ({name.ljust(4, '_')})"
    if "EisaId" not in shown:  # a number may look like one
        assert lines[2].strip() == f"Name (_UID, {_as_asl(plain)})"


@given(size=st.sampled_from([0, 40, 53, 54, 55, 56, 57, 60, 61, 62, 4070, 4085, 4090, 4095, 70000]))
def test_lengths_of_every_size_are_read_back(size: int) -> None:
    code = aml.name("BUF0", aml.buffer(bytes(size))) + aml.name("NEXT", aml.integer(7))
    assert aml.disassemble(code).splitlines()[1] == "Name (NEXT, 0x7)"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("COM1", b"COM1"),
        ("RTC", b"RTC_"),
        ("\\_SB", b"\\_SB_"),
        ("\\", b"\\\0"),
        ("^FOO", b"^FOO_"),
        ("\\_SB.COM1", b"\\\x2e_SB_COM1"),
        ("A.B.C", b"\x2f\x03A___B___C___"),
    ],
)
def test_paths_are_encoded_as_20_2_2_says(text: str, code: bytes) -> None:
    assert aml.path(text) == code
    padded = aml.disassemble(aml.name(text, aml.integer(1)))
    assert padded.replace("_", "").startswith(f"Name ({text.replace('_', '')}, One)")


@pytest.mark.parametrize("text", ["com1", "TOOLONG", "1ABC", "A-B", "A..B", "É"])
def test_names_that_acpi_does_not_know_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no ACPI name"):
        aml.path(text)


def test_plug_and_play_ids_are_packed_as_19_3_4_says() -> None:
    assert aml.eisa_id("PNP0501") == bytes.fromhex("0c41d00501")
    for wrong in ("PNP050", "pnp0501", "PNP05012", "PNPXYZW"):
        with pytest.raises(ValueError):
            aml.eisa_id(wrong)


def test_what_does_not_fit_is_refused() -> None:
    for value in (-1, 1 << 64):
        with pytest.raises(ValueError, match="64 bits"):
            aml.integer(value)
    with pytest.raises(ValueError, match="zero"):
        aml.string("a\0b")


def test_methods_are_shown() -> None:
    code = aml.method("_STA", aml.return_(aml.integer(15)))
    assert aml.disassemble(code).split() == ["Method", "(_STA,", "0)", "Return", "(0xf)"]


@given(code=st.binary(max_size=200))
def test_any_bytes_are_disassembled_or_refused(code: bytes) -> None:
    try:
        aml.disassemble(code)
    except ValueError as error:
        assert str(error)


@pytest.mark.parametrize("opening", [b"\x10\x3fABCD", b"\x12\x3f\x01", b"\x08ABCD\x12\x3f\x01"])
def test_a_bomb_of_nested_terms_is_refused_soon(opening: bytes) -> None:
    with pytest.raises(ValueError):
        aml.disassemble(opening * 10_000)
