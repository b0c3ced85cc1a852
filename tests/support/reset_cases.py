"""Random writes by a guest and by the host, resets in between: a case, and what must hold of it.

A case is plain data, so that Hypothesis can give it (``tests/unit/test_reset_machine.py``) and,
where importing Hypothesis takes half a minute, ``random`` (``tests/kvm/test_reset_cases.py``).
"""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass

import pykvm
from pykvm import result as reasons
from pykvm.memory import GuestMemory
from pykvm.snapshot.reset import MODES, Tracking
from tests.support.same_machine import Judge

PAGE = 4096
CODE = 0x8000
TABLE = 0x9000
MOST_WRITES = 12
DONE = 0xD0000000

LOW = 0xA000, 0x40000
"""What the guest may write of the first region: all above its code and its table."""
HIGH = 0x100000, 0x118000
"""The second region, a memfd."""

SIZES = (1, 2, 4, 8)
HOW = ("write", "word", "fill", "load", "view", "kept view", "region")
REGISTERS = ("rax", "rbp", "r15", "rflags", "cr2", "cr8")

# In ring 3, which every back end runs natively: ecx entries of (gpa, size, value).
GUEST = f"""
        mov     esi, {TABLE}
        mov     ecx, [rsi]
        jrcxz   end
next:   add     rsi, 24
        mov     rdi, [rsi]
        mov     rax, [rsi+16]
        mov     edx, [rsi+8]
        cmp     edx, 1
        je      one
        cmp     edx, 2
        je      two
        cmp     edx, 4
        je      four
        mov     [rdi], rax
        jmp     done
four:   mov     [rdi], eax
        jmp     done
two:    mov     [rdi], ax
        jmp     done
one:    mov     [rdi], al
done:   dec     ecx
        jnz     next
        movq    xmm7, rax
end:    mov     [{DONE}], eax
"""

Write = tuple[int, int, int]
"""Address, bytes, value."""


@dataclass(frozen=True)
class Turn:
    """What happens between two resets.

    Attributes:
        guest: what the guest writes, in one run.
        host: what the host writes: how, address, bytes, value.
        registers: what the host sets.
        second: reset to the second snapshot, not to the first.
    """

    guest: tuple[Write, ...]
    host: tuple[tuple[str, int, int, int], ...]
    registers: tuple[tuple[str, int], ...]
    second: bool


@dataclass(frozen=True)
class Case:
    """A machine's life.

    Attributes:
        mode: of tracking, see ``pykvm.snapshot.reset.MODES``.
        patience: as in ``struct pykvm_reset``: how soon the log is cleared.
        before: written before the first snapshot, and ``between`` before the second.
        turns: each ends with a reset, after which all must be as it was.
    """

    mode: str
    patience: int
    before: tuple[Write, ...]
    between: tuple[Write, ...]
    turns: tuple[Turn, ...]


def place(offset: int, length: int) -> int:
    """An address of ``length`` bytes within a region, by a number below :data:`PLACES`."""
    first, end = LOW if offset < LOW[1] - LOW[0] else HIGH
    at = first + offset - (0 if first == LOW[0] else LOW[1] - LOW[0])
    return min(at, end - length)


PLACES = LOW[1] - LOW[0] + HIGH[1] - HIGH[0]


def drawn(generator: random.Random) -> Case:
    """A case of a generator's."""

    def writes(most: int) -> tuple[Write, ...]:
        # Few pages, so that turns meet; now and then across a page's end.
        found = []
        for _ in range(generator.randrange(most + 1)):
            size = generator.choice(SIZES)
            page = generator.randrange(PLACES // PAGE) // generator.choice((1, 8)) * PAGE
            offset = page + generator.choice((0, PAGE - size, PAGE - 1, generator.randrange(PAGE)))
            found.append((place(offset, size), size, generator.getrandbits(8 * size)))
        return tuple(found)

    turns = []
    for _ in range(generator.randrange(1, 13)):
        host = []
        for _ in range(generator.randrange(3)):
            length = generator.choice((1, 8, PAGE, 3 * PAGE + 5))
            gpa = place(generator.randrange(PLACES), length)
            host.append((generator.choice(HOW), gpa, length, generator.randrange(256)))
        registers = [
            (generator.choice(REGISTERS), generator.randrange(16))
            for _ in range(generator.randrange(3))
        ]
        turns.append(
            Turn(writes(MOST_WRITES), tuple(host), tuple(registers), generator.random() < 0.3)
        )
    return Case(
        generator.choice(sorted(MODES)),
        generator.choice((0, 1, 32)),
        writes(MOST_WRITES),
        writes(2),
        tuple(turns),
    )


def machine_for(case: Case) -> pykvm.Machine:
    """A machine that is about to write, and tracks as the case says."""
    memory = GuestMemory(LOW[1])
    memory.add_memfd(HIGH[0], HIGH[1] - HIGH[0])
    m = pykvm.Machine(memory)
    try:
        m._tracking = Tracking(m.vm, m.memory, case.mode)
        m.load(pykvm.asm(GUEST, mode="long64", at=CODE), at=CODE)
        m.cpu.enter("long64", entry=CODE, ring=3)
        m.mmio.stop(DONE, 4)
    except BaseException:
        m.close()
        raise
    return m


def guest_writes(m: pykvm.Machine, writes: tuple[Write, ...]) -> None:
    """Have the guest do it, and see that it did."""
    table = struct.pack("<QQQ", len(writes), 0, 0)
    for gpa, size, value in writes:
        table += struct.pack("<QQQ", gpa, size, value)
    m.memory.write(TABLE, table)
    result = m.run(timeout=30)
    assert result.reason == reasons.STOPPED, result
    if writes:
        gpa, size, value = writes[-1]
        assert m.memory.read(gpa, size) == value.to_bytes(size, "little")


def host_writes(m: pykvm.Machine, how: str, gpa: int, length: int, value: int) -> list[object]:
    """The same by the host; what is returned is to be held until the end of the case."""
    data = bytes((value,)) * length
    if how == "write":
        m.memory.write(gpa, data)
    elif how == "word":
        m.memory.u64[min(gpa, HIGH[1] - 8) & ~7] = value
    elif how == "fill":
        m.memory.fill(gpa, length, value)
    elif how == "load":
        m.memory.load(gpa, data)
    elif how == "region":
        region = m.memory.region_at(gpa)
        with region.view() as whole:
            whole[gpa - region.guest_phys_addr] = value
    else:
        view = m.memory.view(gpa, length)
        view[:] = data
        if how == "kept view":
            return [view]
        view.release()
    return []


def check(case: Case) -> None:
    """Live the case; after every reset the machine must be what the snapshot says."""
    held: list[object] = []
    with machine_for(case) as m:
        start = m.cpu.rip
        guest_writes(m, case.before)
        m.cpu.rip = start
        with m.snapshot() as first:
            for gpa, size, value in case.between:
                m.memory.write(gpa, value.to_bytes(size, "little"))
            with m.snapshot() as second:
                judges = [Judge(m, first), Judge(m, second)]
                for number, turn in enumerate(case.turns):
                    guest_writes(m, turn.guest)
                    for each in turn.host:
                        held += host_writes(m, *each)
                    for view in held:
                        view[0] ^= 0x55  # type: ignore[index]
                    for name, value in turn.registers:
                        setattr(m.cpu, name, value << 12 if name == "cr2" else value)
                    if number % 3 == 2:  # two runs before one reset
                        m.cpu.rip = start
                        guest_writes(m, turn.guest[::-1])
                    (second if turn.second else first).restore()
                    if m._plan is not None:
                        m._plan[1].c.patience = case.patience
                    found = judges[turn.second].differences()
                    assert not found, (number, found)
        for view in held:
            view.release()  # type: ignore[attr-defined]
