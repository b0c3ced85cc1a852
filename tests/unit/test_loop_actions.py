"""What the vCPU loop serves in C: actions, their rings, and claims that change meanwhile."""

from __future__ import annotations

import os
import select
import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any

import pytest

from pykvm import result as reasons
from pykvm._abi import lib
from pykvm.devices import ring
from pykvm.devices.access import PioAccess
from pykvm.devices.ring import Fifo, RingFullError
from pykvm.devices.serial import Serial
from tests.support.fake_vcpu import HLT, FakeRun, mmio, pio, run

pytestmark = pytest.mark.sanitize


def test_actions_serve_without_python_and_count() -> None:
    fake = FakeRun(pio(0x80, b"x"), pio(0x71), mmio(0x5000), pio(0x92, size=2), HLT)
    ignored = fake.pio.ignore(0x80)
    constant = fake.pio.constant(0x71, 0x26)
    wide = fake.mmio.constant(0x5000, 0x1122334455667788)
    empty = fake.pio.count(0x92)
    assert run(fake).reason == reasons.HALTED
    assert fake.answered(1, 1) == b"\x26"
    assert fake.answered(2, 4) == b"\x88\x77\x66\x55"
    assert fake.answered(3, 2) == b"\xff\xff"
    assert [c.hits for c in (ignored, constant, wide, empty)] == [1, 1, 1, 1]
    assert fake.c.entries == 5


def test_a_log_keeps_every_access_in_order_across_a_full_ring() -> None:
    fake = FakeRun(*[pio(0xE0 + n % 4, bytes([n])) for n in range(250)], HLT)
    log = fake.pio.log(0xE0, 4, capacity=16)
    assert run(fake).reason == reasons.HALTED
    records = log.read()
    assert [(r.address, r.value, r.is_write, r.size) for r in records] == [
        (0xE0 + n % 4, n, True, 1) for n in range(250)
    ]
    assert [r.exit for r in records] == list(range(1, 251))
    assert len(log.read()) == 0


def test_a_log_with_a_sink_hands_batches_on() -> None:
    fake = FakeRun(*[pio(0xE0, bytes([n])) for n in range(100)], HLT)
    batches: list[list[int]] = []
    fake.pio.log(0xE0, capacity=32, sink=lambda batch: batches.append([r.value for r in batch]))
    run(fake)
    fake.pio.drain()
    assert [value for batch in batches for value in batch] == list(range(100))
    assert [len(b) for b in batches] == [32, 32, 32, 4]


def test_a_fifo_takes_output_and_gives_queued_input() -> None:
    fake = FakeRun(pio(0x3F8, b"o"), pio(0x3F8), pio(0x3F8), pio(0x3F8), pio(0x3F8, b"k"), HLT)
    fifo = fake.pio.fifo(0x3F8, empty=0x55)
    fifo.write(b"in")
    run(fake)
    assert [fake.answered(n, 1) for n in (1, 2, 3)] == [b"i", b"n", b"\x55"]
    assert fifo.read() == b"ok"
    assert fifo.read() == b""


def test_a_fifo_feeds_more_input_than_its_ring_holds() -> None:
    fake = FakeRun(*[pio(0x3F8) for _ in range(100)], HLT)
    fifo = fake.pio.fifo(0x3F8, capacity=16, empty=0)
    text = bytes(range(1, 101))
    fifo.write(text)
    run(fake)
    assert b"".join(fake.answered(n, 1) for n in range(100)) == text


def test_output_that_nobody_reads_ends_the_run_in_an_error_and_loses_nothing() -> None:
    fake = FakeRun(*[pio(0x3F8, b"abcdefgh", size=1)] * 7, HLT)
    fifo = fake.pio.fifo(0x3F8, capacity=16, keep=16)
    with pytest.raises(RingFullError, match="read"):
        run(fake)
    first = fifo.read()
    assert first == b"abcdefgh" * 4
    assert run(fake).reason == reasons.HALTED
    assert first + fifo.read() == b"abcdefgh" * 7


def test_a_ring_that_turns_non_empty_wakes_a_reader() -> None:
    fake = FakeRun(pio(0x3F8, b"x"), HLT)
    fifo = fake.pio.fifo(0x3F8)
    poll = select.poll()
    poll.register(fifo.fileno(), select.POLLIN)
    assert poll.poll(0) == []
    run(fake)
    assert poll.poll(0) != []
    assert fifo.read() == b"x"
    assert poll.poll(0) == []
    fake.pio.close()


def test_an_eventfd_that_is_asked_for_late_shows_what_waits() -> None:
    fake = FakeRun(pio(0x3F8, b"x"), HLT)
    fifo = fake.pio.fifo(0x3F8)
    run(fake)
    assert select.select([fifo], [], [], 0)[0] == [fifo]
    fake.pio.close()


def test_a_stop_port_ends_the_run_with_its_code() -> None:
    fake = FakeRun(pio(0xF4, b"\x07\x00", size=2), HLT)
    fake.pio.stop(0xF4, tag=reasons.DEBUG_EXIT)
    end = run(fake)
    assert (end.reason, end.code) == (reasons.DEBUG_EXIT, 7)
    assert run(fake).reason == reasons.HALTED


def test_an_unclaimed_access_ends_the_run_and_reads_all_ones_if_it_goes_on() -> None:
    fake = FakeRun(pio(0x1234, size=2), mmio(1 << 40, b"12345678"), HLT)
    end = run(fake)
    assert end.reason == reasons.UNCLAIMED
    assert end.exit.port == 0x1234 and end.exit.size == 2 and not end.exit.is_write
    end = run(fake)
    assert end.exit.gpa == 1 << 40 and end.exit.data == b"12345678"
    assert run(fake).reason == reasons.HALTED
    assert fake.answered(0, 2) == b"\xff\xff"


def test_a_claim_released_by_its_own_handler_is_gone_at_once() -> None:
    fake = FakeRun(pio(1, b"a"), pio(1, b"b"), HLT)
    seen: list[int] = []

    def handler(access: PioAccess) -> None:
        seen.append(access.value)
        claim.release()

    claim = fake.pio.handle(1, handler)
    assert run(fake).reason == reasons.UNCLAIMED
    assert bytes(seen) == b"a"


# ---- output, and who reads it ------------------------------------------------------------------


def test_a_reader_in_another_thread_gets_every_byte_once_and_in_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It comes while the vCPU's thread drains the ring, and another vCPU writes."""
    fifo = Fifo(capacity=16)
    push = partial(lib.pykvm_ring_push, fifo.output.c)

    class Slow:
        def __getattr__(self, name: str) -> object:
            return getattr(lib, name)

        def pykvm_ring_pop(self, *arguments: Any) -> int:
            monkeypatch.undo()
            count = lib.pykvm_ring_pop(*arguments)
            push(b"new!", 4)
            reads.append(reader.submit(fifo.read))
            wait(reads, timeout=0.2)  # it must wait for us
            return count

    reads: list[Future[bytes]] = []
    push(b"old!", 4)
    monkeypatch.setattr(ring, "lib", Slow())
    with ThreadPoolExecutor(1) as reader:
        fifo.drain()
        assert reads[0].result(60) + fifo.read() == b"old!new!"


def test_output_that_was_taken_out_of_the_ring_still_wakes_a_reader() -> None:
    fake = FakeRun(pio(0x3F8, b"x"), HLT)
    fifo = fake.pio.fifo(0x3F8)
    fifo.fileno()
    run(fake)
    fake.pio.drain()
    assert select.select([fifo], [], [], 0)[0] == [fifo]
    assert fifo.read() == b"x"
    assert select.select([fifo], [], [], 0)[0] == []
    fake.pio.close()


def test_a_full_fifo_does_not_spoil_the_end_of_a_run() -> None:
    fake = FakeRun(pio(0x3F8, b"abcdefgh"), pio(0x3F8, b"ABCDEFGH"), pio(0x3F8, b"x"), HLT)
    fifo = fake.pio.fifo(0x3F8, capacity=16, keep=16)
    assert run(fake).reason == reasons.HALTED
    fake.pio.drain()
    assert fifo.read() == b"abcdefghABCDEFGHx"


def flood() -> tuple[FakeRun, Serial]:
    """A guest that prints for ever to a port with room for little, whose reader it waits for."""
    fake = FakeRun(pio(0x3F8, b"abcdefgh"))
    serial = Serial(capacity=16, keep=16, wait=True)
    serial.attach(fake.pio, 0x3F8)
    return fake, serial


def test_a_guest_waits_for_the_reader_of_its_console_until_the_deadline() -> None:
    fake, serial = flood()
    for _ in range(2):
        assert run(fake, seconds=0.05).reason == reasons.TIMEOUT
        assert serial.read() == b"abcdefgh" * 4


def test_a_guest_that_waits_for_its_reader_is_stopped() -> None:
    fake, _ = flood()
    timer = threading.Timer(0.03, fake.runner.stop)
    timer.start()
    assert run(fake).reason == reasons.STOPPED
    timer.join(60)


def test_a_slow_reader_gets_everything() -> None:
    fake, serial = flood()
    got = bytearray()
    with ThreadPoolExecutor(1) as other_thread:
        running = other_thread.submit(run, fake, None, 60)
        while len(got) < 200:
            assert select.select([serial], [], [], 60)[0], "nothing came"
            got += serial.read()
        fake.runner.stop()
        assert running.result(60).reason == reasons.STOPPED
    got += serial.read()
    assert bytes(got[:200]) == b"abcdefgh" * 25


# ---- claims that change under a run ------------------------------------------------------------


def test_an_access_on_its_way_does_not_reach_a_claim_made_meanwhile() -> None:
    fake = FakeRun(pio(1, b"a"), HLT)
    slots: list[int] = []

    def handler(access: PioAccess) -> None:
        claim.release()
        slots.append(fake.pio.handle(2, lambda access: None).slot)

    claim = fake.pio.handle(1, handler)
    run(fake)
    assert slots != [claim.slot]
    assert fake.pio.handle(1, handler).slot == claim.slot  # nothing runs: it is free again


def test_an_eventfd_stays_open_as_long_as_a_loop_may_write_to_it() -> None:
    fake = FakeRun(pio(1, b"a"), HLT)
    fifo = fake.pio.fifo(0x3F8)
    number = fifo.fileno()
    kept: list[bool] = []

    def handler(access: PioAccess) -> None:
        found = fake.pio.find(0x3F8)
        assert found is not None
        found.release()
        kept.append(os.fstat(number) is not None)

    fake.pio.handle(1, handler)
    run(fake)
    assert kept == [True]
    fake.pio.close()
    with pytest.raises(OSError):
        os.fstat(number)
