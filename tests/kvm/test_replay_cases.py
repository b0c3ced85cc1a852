"""Random guests, random devices, a random host, recorded: the replay ends as the recording did."""

from __future__ import annotations

import random
import time
import warnings

import pykvm
from pykvm import result as reasons
from pykvm.kvm.tracing import trace
from tests.support.same_machine import Judge

ENTRY = 0x8000
DATA = 0x20000
WINDOW = 0xD0000000
SECONDS = 6.0
"""For two hundred guests; on a slow back end at least five are tried."""

SIZED = (("al", "byte", 1), ("ax", "word", 2), ("eax", "dword", 4), ("rax", "qword", 8))


def program(generator: random.Random) -> str:
    """Some instructions that ask for something, or are told something, in a loop."""
    lines = [f"mov r15d, {generator.randrange(1, 4)}", "again:"]
    for _ in range(generator.randrange(1, 15)):
        register, width, size = generator.choice(SIZED)
        port = generator.choice((0x40, 0x44, 0xE9, 0x50))
        data, count = DATA + generator.randrange(0x800), generator.randrange(20)
        lines += generator.choice(
            (
                [f"in {SIZED[min(size, 4).bit_length() - 1][0]}, {port}"],
                [f"out {port}, {SIZED[min(size, 4).bit_length() - 1][0]}"],
                [f"mov {register}, {width} ptr [{WINDOW + generator.randrange(8)}]"],
                [f"mov {width} ptr [{WINDOW + generator.randrange(8)}], {register}"],
                [
                    f"mov edi, {data}",
                    f"mov ecx, {count}",
                    "mov edx, 0x40",
                    "rep insb",
                ],
                [
                    f"mov esi, {data}",
                    f"mov ecx, {count}",
                    "mov edx, 0x44",
                    "rep outsb",
                ],
                [f"mov [{data}], rax", "add rbx, rax"],
                [f"add rax, [{data}]", "adc r8, r9"],
                ["hlt"],
            )
        )
    return "\n".join([*lines, "dec r15d", "jnz again", "out 0x10, al"])


def furnish(m: pykvm.Machine, generator: random.Random) -> None:
    """Devices that say anything, and now and then do something to the guest."""

    def mischief() -> None:
        which = generator.randrange(12)
        if which == 0:
            m.memory.write(DATA + generator.randrange(0x800), generator.randbytes(20))
        elif which == 1:
            m.memory.u32[DATA + generator.randrange(0x800)] = generator.getrandbits(32)
        elif which == 2:
            m.cpu.r9 = generator.getrandbits(64)
        elif which == 3:
            m.cpu.msr["KERNEL_GS_BASE"] = generator.getrandbits(40)
        elif which == 4:
            m.cpu.cr8 = generator.randrange(16)
        elif which == 5:
            m.stop()

    def handler(access: object) -> int:
        mischief()
        return generator.getrandbits(8 * access.size)  # type: ignore[attr-defined]

    def hlt(exit: object) -> bool:
        mischief()
        return generator.random() < 0.8

    m.on_pio(0x40, handler, count=8)
    m.on_mmio(WINDOW, 0x100, handler)
    m.on_hlt(hlt)
    m.pio.fifo(0xE9).write(generator.randbytes(6))
    m.pio.constant(0x50, generator.getrandbits(32), 4)
    m.pio.stop(0x10, tag="done")


def case(seed: int) -> int:
    """Record a guest, and replay it three times; how many exits it made."""
    generator = random.Random(seed)
    with pykvm.Machine("256K") as m:
        m.load(pykvm.asm("cld\n" + program(generator), mode="long64", at=ENTRY), at=ENTRY)
        m.cpu.enter("long64", entry=ENTRY)
        m.memory.write(DATA, generator.randbytes(0x800))
        furnish(m, generator)
        with m.snapshot() as s:
            with m.record() as log:
                while m.run(timeout=30, max_exits=generator.randrange(1, 30)).reason != "done":
                    which = generator.randrange(10)
                    if which == 0:
                        m.memory.fill(DATA + generator.randrange(0x800), 9, 0x5A)
                    elif which == 1:
                        m.cpu.rax = generator.getrandbits(64)
            with m.snapshot() as end:
                judge = Judge(m, end)
                for turn in range(2):
                    s.restore()
                    if turn:
                        with trace(lambda line: None):  # the loop returns to Python at every exit
                            result = m.replay(log, timeout=30)
                    else:
                        result = m.replay(log, timeout=30)
                    assert result.reason == reasons.REPLAYED, result
                    assert not (found := judge.differences()), found
                s.claims.clear()
                s.devices.clear()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", RuntimeWarning)  # nobody serves its ports
                    other = s.fork()
                with other:
                    assert other.replay(log, timeout=30).reason == reasons.REPLAYED
                    assert not (found := Judge(other, end).differences()), found
        return log.exits


def test_random_guests_end_as_they_did() -> None:
    began, exits = time.monotonic(), 0
    for seed in range(200):
        try:
            exits += case(seed)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        if seed >= 4 and time.monotonic() - began > SECONDS:
            break
    assert exits > seed  # each did something that had to be answered
    print(f"{seed + 1} guests, {exits} exits, in {time.monotonic() - began:.1f} s")
