"""Register names, parts and dumps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykvm.arch.x86_64.regs import (
    CR0_BITS,
    CR4_BITS,
    EFER_BITS,
    FLAGS,
    GPRS,
    PARTS,
    RFLAGS_BITS,
    Regs,
    Sregs,
    flag_names,
    format_regs,
    format_sregs,
    mode_name,
    pending_vectors,
    read,
    rflags_names,
    write,
)
from tests.support.states import compat32, long64, long64_ring3, pae, prot32, real16, v8086

U64 = st.integers(0, (1 << 64) - 1)


def test_every_general_register_has_all_of_its_parts() -> None:
    by_parent: dict[str, set[str]] = {}
    for name, (parent, _, _) in PARTS.items():
        by_parent.setdefault(parent, set()).add(name)
    assert set(by_parent) == {*GPRS, "rip", "rflags"}
    assert by_parent["rax"] == {"rax", "eax", "ax", "al", "ah"}
    assert by_parent["rsi"] == {"rsi", "esi", "si", "sil"}
    assert by_parent["r12"] == {"r12", "r12d", "r12w", "r12b"}
    assert len(PARTS) == 4 * 5 + 4 * 4 + 8 * 4 + 3 + 3


@given(st.sampled_from(sorted(PARTS)), U64, st.data())
def test_a_write_is_read_back_and_keeps_what_the_processor_keeps(
    name: str, before: int, data: st.DataObject
) -> None:
    parent, shift, bits = PARTS[name]
    regs = Regs()
    setattr(regs, parent, before)
    value = data.draw(st.integers(0, (1 << bits) - 1))
    write(regs, name, value)
    assert read(regs, name) == value
    mask = ((1 << bits) - 1) << shift
    rest = 0 if bits == 32 else before & ~mask  # a 32-bit write clears the upper half
    assert getattr(regs, parent) == rest | value << shift


def test_the_parts_are_where_the_manual_has_them() -> None:
    regs = Regs()
    regs.rax = 0x1122334455667788
    assert [read(regs, name) for name in ("eax", "ax", "ah", "al")] == [
        0x55667788, 0x7788, 0x77, 0x88,
    ]  # fmt: skip
    write(regs, "ah", 0xFF)
    assert regs.rax == 0x112233445566FF88
    write(regs, "eax", -1)
    assert regs.rax == 0xFFFFFFFF
    write(regs, "rax", -2)
    assert regs.rax == (1 << 64) - 2


@pytest.mark.parametrize(
    "name, value", [("al", 256), ("al", -129), ("eax", 1 << 32), ("rax", 1 << 64)]
)
def test_a_value_that_does_not_fit_is_refused(name: str, value: int) -> None:
    regs = Regs()
    with pytest.raises(ValueError, match=name):
        write(regs, name, value)
    assert regs.rax == 0


def test_flags_have_their_bits() -> None:
    assert FLAGS["cf"] == (0, 1) and FLAGS["if"] == (9, 1) and FLAGS["iopl"] == (12, 2)
    assert set(FLAGS) == {name.lower() for name in RFLAGS_BITS} | {"iopl"}


def test_bits_in_words() -> None:
    assert flag_names(0x80010011, CR0_BITS) == "PE ET WP PG"
    assert flag_names(0, CR4_BITS) == ""
    assert flag_names(1 << 19 | 1, EFER_BITS) == "SCE bit 19"
    assert rflags_names(0x3246) == "PF ZF IF IOPL=3"
    assert rflags_names(2) == ""
    assert rflags_names(0x1002) == "IOPL=1"


@given(U64)
def test_no_value_lacks_a_name(value: int) -> None:
    for table in (CR0_BITS, CR4_BITS, EFER_BITS, RFLAGS_BITS):
        assert len(flag_names(value, table).replace("bit ", "bit").split()) == value.bit_count()


@pytest.mark.parametrize(
    "state, name",
    [
        (real16(), "real mode"),
        (prot32(), "32-bit protected mode, paging off, ring 0"),
        (pae(), "32-bit protected mode, ring 0"),
        (long64(), "64-bit, ring 0"),
        (long64_ring3(), "64-bit, ring 3"),
        (compat32(), "compatibility mode, ring 0"),
        (v8086(), "virtual-8086 mode"),
    ],
)
def test_the_mode_is_named(state: object, name: str) -> None:
    assert mode_name(state.sregs, state.regs.rflags) == name  # type: ignore[attr-defined]


def test_general_registers_print_as_a_table() -> None:
    regs = Regs()
    regs.r10, regs.rflags = 0xABC, 0x246
    lines = format_regs(regs).splitlines()
    assert len(lines) == 5 and "R10=0000000000000abc" in lines[2]
    assert lines[4] == "RIP=000000000000fff0 RFLAGS=00000246 [PF ZF IF]"
    assert repr(regs) == format_regs(regs)


def test_system_registers_print_in_words() -> None:
    sregs = long64().sregs
    sregs.interrupt_bitmap[1] = 1 << 3
    text = format_sregs(sregs)
    assert "CS  0x0010 code64   DPL0" in text
    assert "CR0  0x80010033 [PE MP ET NE WP PG]" in text
    assert "EFER 0x500 [LME LMA]" in text
    assert "APIC_BASE 0xfee00000 [BSP ENABLE]" in text
    assert "vector 67 pending" in text
    assert text.endswith("mode: 64-bit, ring 0")
    assert repr(sregs) == text


def test_pending_vectors_come_from_the_bitmap() -> None:
    sregs = Sregs()
    assert pending_vectors(sregs) == []
    sregs.interrupt_bitmap = [1 << 63, 1, 0, 1 << 63]
    assert pending_vectors(sregs) == [63, 64, 255]
    assert pending_vectors(object()) == []  # struct kvm_sregs2 has no bitmap
