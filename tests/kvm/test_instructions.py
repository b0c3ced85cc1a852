"""Listings of what was executed, and coverage of blocks."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

import pykvm
from pykvm.debug.coverage import Block, find_blocks
from pykvm.debug.disassembly import successors
from pykvm.errors import CapabilityError
from tests.support.stops import COUNT, ENTRY, MODES, machine

in_every_mode = pytest.mark.parametrize(("mode", "ring"), MODES)

BRANCHES = """
start:
    mov ecx, 2
loop:
    test ecx, ecx
    jz done
    dec ecx
    jmp loop
never:
    inc ebx
    jmp start
done:
    call leaf
    out 0xf4, al
leaf:
    mov al, 3
    ret
"""


# ---- listings ------------------------------------------------------------------------------------


@in_every_mode
def test_a_listing_has_every_instruction_with_what_it_changed(mode: str, ring: int) -> None:
    pytest.importorskip("capstone")
    with machine(COUNT, mode, ring) as m:
        trace = m.instructions()
        assert trace.result.reason == "stopped"
        texts = [each.text.split()[0] for each in trace.executed]
        assert texts == ["mov", "mov", *["inc", "mov", "dec", "jne"] * 3, "mov", "out"]
        counts = [each.changed["rbx"] for each in trace.executed if each.text.startswith("inc")]
        assert counts == [1, 2, 3]
        assert trace.executed[0].changed["rcx"] == 3
        assert "top:" in str(trace)


def test_a_listing_shows_the_guests_own_code_and_stops_at_breakpoints() -> None:
    pytest.importorskip("capstone")
    with machine() as m:
        point = m.breakpoint("bottom")
        trace = m.instructions(limit=100)
        assert trace.result.exit.point is point
        assert [each.text for each in trace.executed][2:] == [
            "inc ebx",
            "mov dword ptr [0x9000], ebx",
        ]
        assert m.instructions(limit=1).executed[0].text == "dec ecx"


# ---- coverage ------------------------------------------------------------------------------------


def blocks_of(m: pykvm.Machine, mode: str = "long64") -> list[Block]:
    pytest.importorskip("capstone")
    bits = {"real16": 16, "prot32": 32, "long64": 64}[mode]
    end = m.resolve("leaf") + 3
    return find_blocks(m.mem.read(ENTRY, end - ENTRY), ENTRY, bits)


def test_a_loop_leads_back_and_on() -> None:
    pytest.importorskip("capstone")
    with machine("mov ecx, 2; top: inc ebx; loop top; behind: hlt", "prot32") as m:
        code = m.mem.read(ENTRY, m.resolve("behind") + 1 - ENTRY)
        blocks = find_blocks(code, ENTRY, 32)
        names = [m.symbols.name(block.address) for block in blocks]
        assert names[1:] == ["top", "behind"]
        m.cpu.rip = blocks[2].address - 2
        after = successors(m.cpu, m.mem, None)
        assert after == {m.resolve("top"), m.resolve("behind")}


@in_every_mode
def test_blocks_that_are_reached_are_found_in_order_and_each_costs_one_stop(
    mode: str, ring: int
) -> None:
    with machine(BRANCHES, mode, ring) as m:
        blocks = blocks_of(m, mode)
        names = {m.symbols.name(block.address) for block in blocks}
        assert {"start", "loop", "done", "leaf"} <= names
        assert "never" not in names, "nothing leads there"
        never = m.resolve("never")
        with m.trace() as trace, m.coverage([*blocks, never]) as covered:
            result = m.run(timeout=20)
        assert (result.reason, result.code) == ("stopped", 3)
        hit = [m.symbols.name(address) for address in covered.hit]
        assert hit[:2] == ["start", "loop"] and never not in covered.hit
        assert len(covered.hit) == len(blocks) and covered.ratio < 1
        assert len(trace.events) == len(blocks) + 1
        assert len(m.planted) == 0


def test_a_second_run_finds_what_the_first_did_not() -> None:
    with machine("cmp ebx, 1; je one; out 0xf4, al; one: inc ecx; out 0xf4, al") as m:
        one = m.resolve("one")
        covered = m.coverage([(ENTRY, 3), (one, 4)])
        with covered:
            m.run(timeout=20)
        assert list(covered.hit) == [ENTRY]
        m.cpu.enter("long64", entry=ENTRY)
        m.cpu.rbx = 1
        with covered:
            m.run(timeout=20)
        assert list(covered.hit) == [ENTRY, one]


def test_drcov_is_as_dynamorio_has_it(tmp_path: Path) -> None:
    with machine(BRANCHES) as m:
        blocks = blocks_of(m)
        with m.coverage(blocks) as covered:
            m.run(timeout=20)
        covered.save(tmp_path / "g.drcov", name="/guest.elf")
    head, _, rest = (tmp_path / "g.drcov").read_bytes().partition(b"BB Table: ")
    lines = head.decode().splitlines()
    assert lines[0] == "DRCOV VERSION: 2" and lines[2] == "Module Table: version 2, count 1"
    assert lines[3] == "Columns: id, base, end, entry, checksum, timestamp, path"
    module = [word.strip() for word in lines[4].split(",")]
    assert (int(module[0]), int(module[1], 16), module[-1]) == (0, ENTRY, "/guest.elf")
    count, _, table = rest.partition(b" bbs\n")
    assert len(table) == 8 * int(count)
    found = {
        (ENTRY + offset, size)
        for offset, size, number in struct.iter_unpack("<IHH", table)
        if number == 0
    }
    assert found == {(b.address, b.size) for b in blocks if b.address in covered.hit}


def test_blocks_that_are_not_mapped_are_refused() -> None:
    with machine() as m, pytest.raises(CapabilityError, match="nothing is mapped at 0x7"):
        m.coverage([ENTRY, 0x7000_0000_0000]).begin()
    with machine() as m:
        assert len(m.planted) == 0


def test_after_branches_of_every_kind_a_step_arrives() -> None:
    """Where there are no single steps, what may come next is worked out."""
    pytest.importorskip("capstone")
    code = """
        lea rax, [rip + a]
        jmp rax
        ud2
    a:  lea r8, [rip + table]
        xor ecx, ecx
        jmp [r8 + rcx * 8]
        ud2
    b:  lea r9d, [rip + c]
        mov edx, 1
        cmp edx, 1
        jne a
        addr32 jmp [r8d + 8]
        ud2
    c:  push rbx
        call leaf
        mov ecx, 2
    d:  loop d
        jrcxz e
        ud2
    e:  mov rax, rsp                        # and back to ring 3 by way of an interrupt frame
        mov ecx, ss
        push rcx
        push rax
        pushfq
        mov ecx, cs
        push rcx
        lea rcx, [rip + f]
        push rcx
        iretq
        ud2
    f:  mov al, 5
        out 0xf4, al
    leaf:
        ret
    table:
        .quad b, c
    """
    with machine(code, ring=3) as m:
        trace = m.instructions(limit=100)
        assert (trace.result.reason, trace.result.code) == ("stopped", 5), trace
        names = [each.text.split()[0] for each in trace.executed]
        assert names.count("ret") == names.count("iretq") == 1 and names[-1] == "out"
