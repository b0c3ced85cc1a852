"""``stop()`` ends a run within a second, whatever sixteen vCPUs are doing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

import pykvm
from pykvm import result as reasons
from pykvm.devices.access import PioAccess

CPUS = 16
PROMISE = 1.0
"""Seconds that stop() may take, by the documents."""
PATIENCE = 30.0
"""Seconds after which a test fails: those of a machine that has other things to do as well."""

AT, FLAGS = 0x10000, 0x9000
C_PORT, PYTHON_PORT = 0x80, 0x81

#: What a vCPU does once it has said that it runs. Ring 0, 64-bit, interrupts off.
DOING = {
    "a loop": "l: jmp l",
    "cli; hlt": "cli; h: hlt; jmp h",
    "exits served in C": f"l: out {C_PORT},al; jmp l",
    "exits served in Python": f"l: out {PYTHON_PORT},al; jmp l",
    "string exits served in Python": (
        f"mov edx,{PYTHON_PORT}; l: mov ecx,4096; mov esi,0x100000; rep outsb; jmp l"
    ),
    "reads of memory that is none": "mov ebx,0xd0000000; l: mov eax,[rbx]; jmp l",
}


@pytest.fixture
def m(no_leak: None) -> Iterator[pykvm.Machine]:
    with pykvm.Machine("2M", cpus=CPUS, irqchip=True) as made:
        made.pio.ignore(C_PORT)
        made.on_pio(PYTHON_PORT, lambda access: None)
        made.mmio.unclaimed("ignore")
        yield made


def load(m: pykvm.Machine, *doing: str) -> None:
    """Have the vCPUs do these things in turn."""
    for number, text in enumerate(doing):
        code = f"mov byte ptr [rdi + {FLAGS}],1; {text}"
        m.load(pykvm.asm(code, at=AT + 0x1000 * number))
    for cpu in m.cpus:
        entry = AT + 0x1000 * (cpu.index % len(doing))
        cpu.enter("long64", entry=entry, stack=0x80000, map_size=1 << 32)
        cpu.rdi = cpu.index
    m.mem[FLAGS : FLAGS + CPUS] = bytes(CPUS)


def all_run(m: pykvm.Machine) -> None:
    """Wait until every vCPU has said that it runs."""
    deadline = time.monotonic() + PATIENCE
    while m.mem[FLAGS : FLAGS + CPUS] != b"\1" * CPUS:
        assert time.monotonic() < deadline, m.mem[FLAGS : FLAGS + CPUS]
        time.sleep(0.01)


def ends(what: str, end: Callable[[], pykvm.RunResult]) -> pykvm.RunResult:
    """Measure what it takes, and tell it."""
    began = time.monotonic()
    result = end()
    seconds = time.monotonic() - began
    print(f"{what}: ended after {seconds * 1000:.0f} ms{' (!)' * (seconds > PROMISE)}")
    assert seconds < PATIENCE
    return result


@pytest.mark.parametrize("doing", DOING)
def test_stop_ends_sixteen_that_do_the_same(m: pykvm.Machine, doing: str) -> None:
    load(m, DOING[doing])
    running = m.start()
    all_run(m)
    assert ends(doing, running.stop).reason == reasons.STOPPED


def test_stop_ends_sixteen_that_do_different_things(m: pykvm.Machine) -> None:
    for _ in range(3):
        load(m, *DOING.values())
        running = m.start()
        all_run(m)
        assert ends("all of it", running.stop).reason == reasons.STOPPED


def test_a_slow_handler_of_a_string_is_not_waited_for(m: pykvm.Machine) -> None:
    """4096 bytes in one exit, and a handler that takes its time until the stop is asked for."""
    seen: list[int] = []

    @m.on_pio(0x82)
    def slow(access: PioAccess) -> None:
        seen.append(access.value)
        while not any(cpu._runner.c.stop for cpu in m.cpus):
            pass

    text = f"mov edx,0x82; mov ecx,{CPUS * 4096}; mov esi,0x100000; rep outsb; hlt"
    load(m, text)
    running = m.start()
    all_run(m)
    assert ends("a slow handler of a string", running.stop).reason == reasons.STOPPED
    assert len(seen) < 4 * CPUS  # of 4096 each: one under way, and some before all are told


def test_a_thread_that_computes_beside_them_does_not_delay_it_for_long(m: pykvm.Machine) -> None:
    """Sixteen vCPUs, the script and a busy thread want the interpreter, which serves one."""
    over = threading.Event()

    def compute() -> None:
        while not over.is_set():
            sum(range(1000))

    busy = threading.Thread(target=compute)
    load(m, *DOING.values())
    running = m.start()
    all_run(m)
    busy.start()
    try:
        result = ends("all of it, beside a busy thread", running.stop)
    finally:
        over.set()
        busy.join(60)
    assert result.reason == reasons.STOPPED


def test_a_handler_of_one_of_them_ends_all(m: pykvm.Machine) -> None:
    load(m, *DOING.values())

    @m.on_pio(0x82)
    def end(access: PioAccess) -> None:
        m.stop()

    m.load(
        pykvm.asm(
            f"mov byte ptr [rdi + {FLAGS}],1; w: pause; cmp byte ptr [0x8000],1; jne w;"
            " out 0x82,al; l: jmp l",
            at=0x60000,
        )
    )
    m.cpus[5].rip = 0x60000
    running = m.start()
    all_run(m)
    m.mem.u8[0x8000] = 1
    assert ends("all of it, by a handler", running.wait).reason == reasons.STOPPED


def test_the_timeout_ends_them_in_time(m: pykvm.Machine) -> None:
    load(m, *DOING.values())
    result = m.run(timeout=0.5)
    print(f"a timeout of 0.5 s: ended after {result.seconds:.3f} s")
    assert result.reason == reasons.TIMEOUT
    assert result.seconds < PATIENCE
    assert len(result.cpus) == CPUS
