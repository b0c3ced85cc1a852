"""GDT, IDT and TSS: what is put in is read back, from bytes and from guest memory."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykvm.arch.x86_64.segments import Gate, code32, code64, data, ldt, tss
from pykvm.arch.x86_64.tables import Gdt, Idt, Tss32, Tss64, exception_name
from tests.support.states import long64, prot32


def test_a_gdt_hands_out_selectors_with_the_rpl_of_the_segment() -> None:
    gdt = Gdt()
    assert gdt.add(code64()) == 0x08
    assert gdt.add(data(dpl=3)) == 0x13
    assert gdt.add(tss(0x1000)) == 0x18
    assert gdt.add(code32()) == 0x28  # a TSS of long mode takes two entries
    assert gdt.limit == 0x2F
    assert gdt[0x13] == data(0x13, dpl=3)
    assert gdt[0x18].base == 0x1000


def test_a_32_bit_gdt_has_8_byte_system_descriptors() -> None:
    gdt = Gdt(long=False)
    assert (gdt.add(tss(0x1000)), gdt.add(ldt(0x2000, 7)), gdt.limit) == (0x08, 0x10, 0x17)
    assert [selector for selector, _ in gdt] == [0x08, 0x10]


def test_a_segment_can_be_placed_at_a_selector() -> None:
    gdt = Gdt()
    assert gdt.place(0x30, code64(dpl=3)) == 0x33
    assert [selector for selector, _ in gdt] == [0x30]


@pytest.mark.parametrize("selector", [0, 3, 4, 0xC, 0x10000])
def test_no_segment_is_placed_where_no_selector_leads(selector: int) -> None:
    with pytest.raises(ValueError, match="GDT entry"):
        Gdt().place(selector, data())


def test_a_taken_entry_is_not_overwritten() -> None:
    gdt = Gdt()
    gdt.place(0x10, data())
    with pytest.raises(ValueError, match="taken"):
        gdt.place(0x08, tss(0))  # its second half would lie on the data segment


def test_a_selector_beyond_the_limit_is_an_index_error() -> None:
    with pytest.raises(IndexError, match="beyond"):
        Gdt()[0x08]


def test_a_gdt_prints_one_line_an_entry() -> None:
    gdt = Gdt(base=0x500)
    gdt.add(code64())
    gdt.add(tss(0x600))
    assert repr(gdt).splitlines() == [
        "GDT at 0x500, limit 0x1f",
        "  0x0008 code64   DPL0 base 0x0 limit 0xffffffff xra",
        "  0x0010 tss busy DPL0 base 0x600 limit 0x67",
    ]


@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_decode_as_a_gdt_and_print(raw: bytes, long: bool) -> None:
    gdt = Gdt.decode(raw, long=long)
    assert bytes(gdt) == raw[: len(raw) // 8 * 8]
    assert repr(gdt)


@pytest.mark.parametrize("make", [prot32, long64])
def test_the_gdt_of_a_machine_is_read_through_gdtr(make: object) -> None:
    state = make()  # type: ignore[operator]
    gdt = Gdt.read(state.memory, state.sregs)
    assert gdt[state.sregs.cs.selector] == state.sregs.cs
    assert gdt[state.sregs.tr.selector] == state.sregs.tr


def test_a_gdt_outside_ram_reads_as_empty() -> None:
    state = long64()
    state.sregs.gdt.base = 0x7000_0000_0000
    assert list(Gdt.read(state.memory, state.sregs)) == []


def test_an_idt_holds_gates_by_vector() -> None:
    idt = Idt(base=0x2000)
    idt.set(14, 0x8000, selector=0x10, ist=1)
    idt.set(3, 0x9000, kind="trap", dpl=3)
    assert idt[14] == Gate(0x8000, 0x10, 14, ist=1)
    assert idt[3] == Gate(0x9000, 0x10, 15, dpl=3)
    assert idt[13] is None and idt[256] is None and idt[-1] is None
    assert [vector for vector, _ in idt] == [3, 14]
    assert idt.limit == 0xFFF
    assert repr(idt).splitlines()[2] == "   14 #PF  interrupt → 0x10:0x8000 DPL0 IST1"


@pytest.mark.parametrize(
    "arguments", [{"vector": 256}, {"vector": -1}, {"vector": 3, "kind": "call"}]
)
def test_what_no_idt_holds_is_refused(arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        Idt().set(offset=0, **arguments)  # type: ignore[arg-type]


def test_a_short_32_bit_idt_is_as_long_as_asked_for() -> None:
    idt = Idt(long=False, vectors=32)
    assert idt.limit == 32 * 8 - 1
    with pytest.raises(ValueError, match="32 entries"):
        idt.set(32, 0)


def test_an_idt_is_written_loaded_and_read_back() -> None:
    state = long64()
    idt = Idt(base=0x10000)
    idt.set(6, 0x1234)
    idt.write(state.memory)
    idt.load(state.sregs.idt)
    again = Idt.read(state.memory, state.sregs)
    assert bytes(again) == bytes(idt) and again.base == 0x10000


@given(st.binary(max_size=100), st.booleans())
def test_any_bytes_decode_as_an_idt_and_print(raw: bytes, long: bool) -> None:
    assert repr(Idt.decode(raw, long=long))


def test_a_64_bit_tss_has_the_stacks_where_the_manual_has_them() -> None:
    raw = bytes(Tss64(rsp0=0x1111, ist1=0x2222, ist7=0x7777))
    assert len(raw) == 104
    assert (raw[4:6], raw[36:38], raw[84:86]) == (b"\x11\x11", b"\x22\x22", b"\x77\x77")
    assert raw[102:104] == b"\x68\x00"  # no I/O permission bitmap


def test_a_32_bit_tss_has_a_whole_task() -> None:
    task = Tss32(esp0=0x1000, ss0=0x10, cr3=0x2000, eip=0x8000, cs=8, eflags=2, ldt=0x18)
    raw = bytes(task)
    assert (raw[4:6], raw[8], raw[29], raw[33], raw[76], raw[96]) == (
        b"\x00\x10", 0x10, 0x20, 0x80, 8, 0x18,
    )  # fmt: skip
    assert task.limit == 0x67


@pytest.mark.parametrize("kind", [Tss32, Tss64])
@given(raw=st.binary(max_size=120))
def test_any_bytes_decode_as_a_tss(kind: type[Tss32] | type[Tss64], raw: bytes) -> None:
    task = kind.decode(raw)
    assert bytes(task) == raw[:104].ljust(104, b"\0")
    assert repr(task)


def test_a_tss_refuses_what_it_does_not_have() -> None:
    with pytest.raises(AttributeError, match="esp0"):
        Tss64(esp0=1)
    with pytest.raises(AttributeError, match="rsp9"):
        Tss64().rsp9  # noqa: B018
    with pytest.raises(ValueError, match="32 bits"):
        Tss32(esp0=1 << 32)
    assert repr(Tss64(rsp0=0x1000)) == "<Tss64 rsp0=0x1000 iomap_base=0x68>"


def test_exceptions_are_named() -> None:
    assert [exception_name(n) for n in (0, 6, 13, 14, 15, 32, -1)] == [
        "#DE", "#UD", "#GP", "#PF", "", "", "",
    ]  # fmt: skip
