"""Ten thousand resets, each compared whole: all memory and every register, and the judge judged."""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Iterator

import pytest

import pykvm
from pykvm import result as reasons
from pykvm._abi import ffi, lib
from pykvm.arch.x86_64 import layout
from tests.support.same_machine import Judge

ENTRY = 0x8000
INPUT = 0x10000
PAGE = 4096
MEMORY = 512 * 1024
DONE = 0xD0000000
"""Outside of RAM: the run ends there, from ring 3 too."""

TURNS = 10_000
ENOUGH = 30.0
"""Seconds; where all turns would take longer, as many are made as fit into a sixth of it."""

# Ring 0 writes what the table says, then MSRs, control and debug registers and segments; ring 3,
# where every back end has them, vector registers and the x87's.
GUEST = f"""
        mov     esi, {INPUT}
        mov     ecx, [rsi]
        mov     rbx, [rsi+8]
        jrcxz   after
next:   add     rsi, 16
        mov     rdi, [rsi]
        mov     rax, [rsi+8]
        mov     [rdi], rax
        dec     ecx
        jnz     next
after:  mov     rax, rbx
        mov     rdx, rbx
        shr     rdx, 32
        mov     ecx, 0xC0000102
        wrmsr
        mov     ecx, 0xC0000082
        wrmsr
        xor     edx, edx
        mov     ecx, 0xC0000084
        wrmsr
        mov     ecx, 0x175
        wrmsr
        mov     cr2, rbx
        mov     dr0, rbx
        mov     dr3, rbx
        mov     eax, ebx
        and     eax, 15
        mov     cr8, rax
        lidt    [{INPUT + 0x810}]
        lgdt    [{INPUT + 0x800}]
        mov     eax, {layout.USER_DS | 3}
        mov     ds, ax
        mov     es, ax
        mov     fs, ax
        mov     gs, ax
        xor     edx, edx
        mov     eax, ebx
        mov     ecx, 0xC0000100
        wrmsr
        push    {layout.USER_DS | 3}
        push    0x6000
        push    0x202
        push    {layout.USER_CS | 3}
        lea     rax, [user]
        push    rax
        iretq
user:   movq    xmm0, rbx
        movq    xmm15, rbx
        fninit
        fld1
        mov     rbp, rbx
        mov     r15, rbx
        std
        mov     eax, ebx
        mov     [{DONE}], eax
"""


@pytest.fixture
def machine() -> Iterator[pykvm.Machine]:
    with pykvm.Machine(MEMORY) as m:
        m.load(pykvm.asm(GUEST, mode="long64", at=ENTRY), at=ENTRY)
        m.cpu.enter("long64", entry=ENTRY, perms="rwxu")
        m.memory.write(INPUT + 0x800, struct.pack("<HQ", 0x4F, layout.GDT))
        m.mmio.stop(DONE, 4)
        yield m


def dirty(m: pykvm.Machine, generator: random.Random) -> None:
    """One run that changes other pages and other values than the last."""
    count = generator.randrange(9)
    pages = [generator.randrange(0x20, MEMORY // PAGE) for _ in range(count)]
    mark = (generator.getrandbits(47) | 1 << 40) & ~0x800  # canonical, and no page twice the same
    table = struct.pack("<QQ", count, mark)
    for page in pages:
        table += struct.pack("<QQ", page * PAGE + generator.randrange(511) * 8, mark)
    m.memory.write(INPUT, table)
    m.memory.write(INPUT + 0x810, struct.pack("<HQ", mark & 0xFFF, mark))
    result = m.run(timeout=20)
    assert result.reason == reasons.STOPPED, result
    if count:
        assert m.memory.u64[struct.unpack_from("<Q", table, 16 * count)[0]] == mark


def test_ten_thousand_resets_each_compared_whole(machine: pykvm.Machine) -> None:
    generator = random.Random(5)
    with machine.snapshot() as s:
        judge, began, turns = Judge(machine, s), time.monotonic(), TURNS
        dirty(machine, generator)
        changed = judge.differences()
        for name in ("xsave", "msr 0xc0000102", "sregs.cr8", "sregs.fs", "debugregs.db[0]", "page"):
            assert any(name in each for each in changed), (name, changed)
        for turn in range(TURNS):
            s.restore()
            assert not (found := judge.differences()), (turn, found)
            if turn == 50:
                each = (time.monotonic() - began) / turn
                turns = TURNS if each * TURNS < ENOUGH else int(ENOUGH / 6 / each)
            if turn + 1 >= turns:
                break
            dirty(machine, generator)
        with machine.snapshot() as now:  # and by the way everybody else compares
            assert not s.diff(now)
        print(f"{turn + 1} resets, each compared whole, in {time.monotonic() - began:.1f} s")


def test_a_page_that_is_not_put_back_is_found(machine: pykvm.Machine) -> None:
    with machine.snapshot() as s:
        judge = Judge(machine, s)
        s.restore()
        (region,) = machine.memory.regions
        # Behind everybody's back: neither KVM's log nor the API knows.
        ffi.cast("uint8_t *", region.userspace_addr)[0x40123] = 1
        s.restore()
        assert judge.differences() == ["page 0x40000"]


OMISSIONS = {
    "KVM_SET_MSRS": "msr 0xc0000102",
    "KVM_SET_XSAVE": "xsave",
    "KVM_SET_DEBUGREGS": "debugregs.db[3]",
    "regs": "regs.r15",
    "sregs": "sregs.gs.selector",
    "events": "events",
    "cr8": "sregs.cr8",
}


@pytest.mark.parametrize("omitted", OMISSIONS)
def test_a_register_that_is_not_put_back_is_found(machine: pykvm.Machine, omitted: str) -> None:
    with machine.snapshot() as s:
        judge = Judge(machine, s)
        s.restore()
        assert machine._plan is not None
        plan = machine._plan[1]
        names = [name for _, name, _, _ in plan._calls]
        saved = plan.c.vcpus[0].saved
        nothing = ffi.new("struct kvm_regs *")
        if omitted in names:
            call = plan.c.calls[names.index(omitted)]
            call.request, call.arg, call.expected = lib.KVM_GET_REGS, nothing, 0
        elif omitted == "regs":
            plan.c.vcpus[0].sync &= ~lib.KVM_SYNC_X86_REGS
        elif omitted == "sregs":
            plan.c.vcpus[0].sync &= ~lib.KVM_SYNC_X86_SREGS
        elif omitted == "cr8":
            saved.sregs.cr8 = 3
        else:
            saved.events.nmi.pending = 1
        dirty(machine, random.Random(7))
        s.restore()
        found = judge.registers()
        assert any(OMISSIONS[omitted] in each for each in found), found
