"""Entering a mode: registers and tables that agree with each other and with the layout."""

from __future__ import annotations

from typing import Any

import pytest

from pykvm.arch.x86_64 import layout, modes
from pykvm.arch.x86_64.regs import Regs, Sregs
from pykvm.arch.x86_64.rules import check
from pykvm.arch.x86_64.tables import Gdt, Idt, Tss32, Tss64
from pykvm.arch.x86_64.walk import walk_sregs

RAM = 2 << 20


class Machine:
    def __init__(self, ram: int = RAM) -> None:
        self.sregs, self.regs, self.memory = Sregs(), Regs(), bytearray(ram)

    def enter(self, mode: str, entry: int = 0x8000, **options: Any) -> modes.Entry:
        return modes.enter(
            mode, sregs=self.sregs, regs=self.regs, memory=self.memory, entry=entry, **options
        )


EVERY = [
    ("real16", {}),
    ("prot32", {}),
    ("prot32", {"ring": 3}),
    ("long64", {}),
    ("long64", {"ring": 3}),
    ("long64", {"ring": 3, "iopl": 3}),
    ("long64", {"gigapages": True}),
    ("long64", {"tables": 0x100000}),
    ("prot32", {"tables": 0x100000}),
    ("long64", {"map_size": 2 << 20, "perms": "rwu"}),
]


@pytest.mark.parametrize("mode, options", EVERY)
def test_a_mode_breaks_no_rule_and_its_code_and_stack_are_mapped(
    mode: str, options: dict[str, Any]
) -> None:
    m = Machine()
    done = m.enter(mode, **options)
    assert check(m.sregs, m.regs.rip, m.regs.rflags) == []
    assert m.sregs.cs.base + m.regs.rip == 0x8000 == done.entry
    assert m.regs.rsp == done.stack
    if options.get("perms") != "rwu":
        assert walk_sregs(m.memory, m.sregs, 0x8000, "x").gpa == 0x8000
    stack = walk_sregs(m.memory, m.sregs, m.regs.rsp - 8, "w")
    assert stack and stack.gpa == m.regs.rsp - 8
    assert repr(done).startswith(f"{mode}, ring {options.get('ring', 0)}, entry 0x8000")


@pytest.mark.parametrize("mode, options", [pair for pair in EVERY if pair[0] != "real16"])
def test_every_segment_register_holds_what_its_selector_loads(
    mode: str, options: dict[str, Any]
) -> None:
    m = Machine()
    m.enter(mode, **options)
    gdt = Gdt.read(m.memory, m.sregs)
    for name in ("cs", "ss", "ds", "es", "fs", "gs", "tr"):
        register = getattr(m.sregs, name)
        assert gdt[register.selector] == register
    ring = options.get("ring", 0)
    assert m.sregs.cs.selector & 3 == m.sregs.ss.dpl == ring
    assert m.sregs.ldt.unusable


@pytest.mark.parametrize("mode, kind", [("prot32", Tss32), ("long64", Tss64)])
def test_the_tss_in_memory_has_the_stacks_of_the_layout(
    mode: str, kind: type[Tss32] | type[Tss64]
) -> None:
    m = Machine()
    m.enter(mode, ring=3, tables=0x10000)
    task = kind.decode(bytes(m.memory[m.sregs.tr.base :][:104]))
    stack = task.esp0 if kind is Tss32 else task.rsp0
    assert stack == 0x10000 + layout.RSP0_TOP
    assert m.sregs.tr.base == 0x10000 + layout.TSS


def ports_open(m: Machine) -> set[int]:
    """The ports that the I/O permission bitmap lets ring 3 use (SDM Vol. 1 §19.5.2)."""
    task = m.memory[m.sregs.tr.base :][: m.sregs.tr.limit + 1]
    bitmap = task[int.from_bytes(task[102:104], "little") :]
    # The processor reads two bytes, of which the second must lie within the limit too.
    return {
        port for port in range(8 * (len(bitmap) - 1)) if not bitmap[port >> 3] >> (port & 7) & 1
    }


def test_ring_3_with_iopl_3_also_gets_its_ports_from_the_tss() -> None:
    m = Machine()
    m.memory[:] = b"\xff" * RAM  # what was there before must not count
    m.enter("long64", ring=3, iopl=3)
    assert m.regs.rflags == 0x3002
    assert ports_open(m) == set(range(layout.IO_PORTS))
    m.enter("long64", ring=3)
    assert m.regs.rflags == 2 and ports_open(m) == set()


def test_ring_3_maps_for_the_user_and_ring_0_does_not() -> None:
    for ring, expected in ((0, "rwx-"), (3, "rwxu")):
        m = Machine()
        m.enter("long64", ring=ring)
        assert walk_sregs(m.memory, m.sregs, 0x8000).perms == expected


@pytest.mark.parametrize("gigapages, size", [(False, 2 << 20), (True, 1 << 30)])
def test_long64_maps_four_gib_to_itself(gigapages: bool, size: int) -> None:
    m = Machine()
    done = m.enter("long64", gigapages=gigapages)
    assert done.page_tables is not None
    assert done.page_tables.ranges() == [(0, 0, 4 << 30, "rwx-", size)]
    assert done.page_tables.used[1] <= layout.PAGE_TABLES_END


def test_nx_is_switched_on_with_the_first_page_that_needs_it() -> None:
    m = Machine()
    m.enter("long64", perms="rw")
    assert m.sregs.efer == 0xD00
    m.enter("long64")
    assert m.sregs.efer == 0x500


def test_the_smallest_guest_has_room_for_everything() -> None:
    m = Machine(ram=0x10000)
    before = bytes(m.memory)
    done = m.enter("long64", ring=3, iopl=3)
    assert len(m.memory) == 0x10000  # a bytearray grows when written beyond its end
    assert m.memory[: layout.GDT] == before[: layout.GDT]
    assert m.memory[layout.PAGE_TABLES_END :] == before[layout.PAGE_TABLES_END :]
    assert done.tss is not None


def test_the_tables_move_as_a_block() -> None:
    m = Machine()
    m.enter("long64", tables=0x100000)
    assert not any(m.memory[:0x100000])
    assert (m.sregs.gdt.base, m.sregs.cr3, m.regs.rsp) == (0x100500, 0x101000, 0x108000)


@pytest.mark.parametrize(
    "entry, selector, rip",
    [(0, 0, 0), (0x7C00, 0, 0x7C00), (0xFFFF, 0, 0xFFFF), (0x10000, 0x1000, 0),
     (0x12345, 0x1234, 5), (0xFFFFF, 0xFFFF, 0xF), (0x10FFEF, 0xFFFF, 0xFFFF)],
)  # fmt: skip
def test_a_real_mode_entry_is_split_into_segment_and_offset(
    entry: int, selector: int, rip: int
) -> None:
    m = Machine()
    m.enter("real16", entry)
    assert (m.sregs.cs.selector, m.regs.rip) == (selector, rip)
    assert m.sregs.cs.base == selector << 4
    assert check(m.sregs, m.regs.rip, m.regs.rflags) == []


def test_real_mode_writes_nothing_and_leaves_the_other_registers_alone() -> None:
    m = Machine(ram=0)
    m.regs.rax, m.sregs.cr2, m.sregs.cr8 = 1, 2, 3
    apic_base = m.sregs.apic_base
    m.enter("real16")
    assert (m.regs.rax, m.sregs.cr2, m.sregs.cr8, m.sregs.apic_base) == (1, 2, 3, apic_base)
    assert m.memory == b""


def test_a_mode_can_be_left_for_any_other() -> None:
    for first in ("real16", "prot32", "long64"):
        for second in ("real16", "prot32", "long64"):
            m, fresh = Machine(), Machine()
            m.enter(first)
            m.enter(second)
            fresh.enter(second)
            assert repr(m.sregs) == repr(fresh.sregs) and repr(m.regs) == repr(fresh.regs)


def test_without_an_idt_its_limit_is_zero_and_with_one_it_is_loaded() -> None:
    m = Machine()
    m.enter("long64")
    assert (m.sregs.idt.base, m.sregs.idt.limit) == (0, 0)
    idt = Idt(base=0x9000)
    idt.set(6, 0x1234)
    done = m.enter("long64", idt=idt)
    assert (m.sregs.idt.base, m.sregs.idt.limit) == (0x9000, 0xFFF)
    assert bytes(Idt.read(m.memory, m.sregs)) == bytes(idt)
    assert done.idt is idt and "#UD" in repr(done)


def test_syscall_and_sysret_find_their_segments_by_star() -> None:
    """AMD APM Vol. 2 §6.1.1: what they load is computed from STAR, and must fit the GDT."""
    m = Machine()
    done = m.enter("long64")
    gdt = Gdt.read(m.memory, m.sregs)
    kernel, user = done.star >> 32 & 0xFFFF, done.star >> 48
    assert (gdt[kernel].kind, gdt[kernel].dpl) == ("code64", 0)
    assert (gdt[kernel + 8].kind, gdt[kernel + 8].dpl) == ("data", 0)
    assert (gdt[user].kind, gdt[user + 8].kind, gdt[user + 16].kind) == (
        "code32", "data", "code64",
    )  # fmt: skip
    assert {gdt[user + step].dpl for step in (0, 8, 16)} == {3}


@pytest.mark.parametrize(
    "mode, options, word",
    [
        ("long32", {}, "long64"),
        ("real16", {"ring": 3}, "ring 3"),
        ("long64", {"ring": 1}, "ring 1"),
        ("long64", {"iopl": 4}, "iopl 4"),
        ("long64", {"tables": 0x800}, "multiple of 4 KiB"),
        ("long64", {"tables": -0x1000}, "multiple of 4 KiB"),
        ("real16", {"entry": 0x10FFF0}, "first MiB"),
        ("real16", {"entry": -1}, "first MiB"),
        ("real16", {"stack": 0x10000}, "16 bits"),
        ("real16", {"idt": Idt()}, "IVT"),
        ("prot32", {"entry": 1 << 32}, "32 bits"),
        ("prot32", {"stack": 1 << 32}, "32 bits"),
        ("prot32", {"tables": 1 << 32}, "32 bits"),
        ("long64", {"entry": 0x1000}, "page tables"),
        ("long64", {"entry": 0x6FFF}, "page tables"),
        ("prot32", {"entry": 0x500}, "tables=gpa"),
        ("long64", {"map_size": 0x1000}, "2 MiB"),
        ("long64", {"map_size": 8 << 30}, "4 GiB"),
        ("long64", {"perms": "q"}, "rights"),
    ],
)
def test_what_no_mode_can_do_is_refused_with_no_register_changed(
    mode: str, options: dict[str, Any], word: str
) -> None:
    m, untouched = Machine(), Machine()
    with pytest.raises(ValueError, match=word):
        m.enter(mode, **options)
    assert repr(m.sregs) == repr(untouched.sregs) and repr(m.regs) == repr(untouched.regs)


def test_code_may_lie_where_another_mode_has_its_page_tables() -> None:
    assert Machine().enter("prot32", 0x1000).entry == 0x1000
    assert Machine().enter("real16", 0x600).entry == 0x600


def test_what_one_guest_was_given_another_gets_again() -> None:
    first, second = Machine(), Machine()
    done = first.enter("long64", entry=0x20000, ring=3, iopl=3)
    kept = done.of(None)
    again = kept.again(second.regs, second.memory)
    assert bytes(second.memory) == bytes(first.memory)
    assert (second.regs.rip, second.regs.rsp) == (first.regs.rip, first.regs.rsp)
    assert second.regs.rflags == first.regs.rflags
    assert repr(again) == repr(done)
    assert again.page_tables is not None and again.page_tables.memory is second.memory
    assert kept.page_tables is not None and kept.page_tables.memory is None
