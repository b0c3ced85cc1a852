"""The vCPU loop, C and Python, over a scripted KVM_RUN."""

from __future__ import annotations

import errno
import os
import select
import signal
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any

import pytest

from pykvm import result as reasons
from pykvm import vcpu_thread
from pykvm._abi import lib
from pykvm.devices import ring
from pykvm.devices.access import MmioAccess, PioAccess
from pykvm.devices.ring import Fifo, RingFullError
from pykvm.devices.serial import Serial
from pykvm.errors import BusyError, KvmError
from pykvm.vcpu_thread import NEVER, RESERVED, End
from tests.support.fake_vcpu import HLT, FakeRun, error, mmio, other, pio

pytestmark = pytest.mark.sanitize


def run(fake: FakeRun, max_exits: int | None = None, seconds: float | None = None) -> End:
    deadline = NEVER if seconds is None else time.monotonic_ns() + int(seconds * 1e9)
    return fake.runner.run(deadline, max_exits)


# ---- handlers ----------------------------------------------------------------------------------


def test_a_handler_sees_port_size_direction_and_value() -> None:
    fake = FakeRun(pio(0x3F8, b"\x34\x12", size=2), HLT)
    seen: list[PioAccess] = []
    fake.pio.handle(0x3F8, seen.append)
    assert run(fake).reason == reasons.HALTED
    (access,) = seen
    assert (access.port, access.size, access.is_write, access.value) == (0x3F8, 2, True, 0x1234)
    assert access.data == b"\x34\x12"


@pytest.mark.parametrize("size", [1, 2, 4])
def test_what_a_handler_returns_answers_the_read(size: int) -> None:
    fake = FakeRun(pio(0x60, size=size), HLT)
    value = 0x89ABCDEF & (1 << 8 * size) - 1
    fake.pio.handle(0x60, lambda access: value)
    run(fake)
    assert fake.answered(0, size) == value.to_bytes(size, "little")


def test_none_answers_all_ones() -> None:
    fake = FakeRun(pio(0x60, size=4), mmio(0x1000, size=8), HLT)
    fake.pio.handle(0x60, lambda access: None)
    fake.mmio.handle(0x1000, lambda access: None)
    run(fake)
    assert fake.answered(0, 4) == b"\xff" * 4
    assert fake.answered(1, 8) == b"\xff" * 8


@pytest.mark.parametrize("size", range(1, 9))
def test_mmio_of_every_width_is_answered_in_full(size: int) -> None:
    value = 0xF123456789ABCDEF & (1 << 8 * size) - 1
    fake = FakeRun(
        mmio(0xFED00008, size=size), mmio(0xFED00010, value.to_bytes(size, "little")), HLT
    )
    seen: list[MmioAccess] = []

    def handler(access: MmioAccess) -> int:
        seen.append(access)
        return value

    fake.mmio.handle(0xFED00000, handler, 0x1000)
    run(fake)
    assert fake.answered(0, size) == value.to_bytes(size, "little")
    load, store = seen
    assert (load.gpa, load.offset, load.size, load.is_write) == (0xFED00008, 8, size, False)
    assert (store.gpa, store.value, store.size) == (0xFED00010, value, size)


def test_a_string_write_reaches_the_handler_item_by_item() -> None:
    fake = FakeRun(pio(0xE9, b"hello", size=1), HLT)
    seen: list[int] = []
    fake.pio.handle(0xE9, lambda access: seen.append(access.value))
    end = run(fake)
    assert bytes(seen) == b"hello"
    assert end.reason == reasons.HALTED
    assert fake.c.exits == 2


def test_a_stop_from_outside_does_not_wait_for_the_rest_of_a_string_and_loses_none() -> None:
    fake = FakeRun(pio(0xE9, b"hello"), HLT)
    seen: list[int] = []

    def handler(access: PioAccess) -> None:
        seen.append(access.value)
        if len(seen) == 2:
            with ThreadPoolExecutor(1) as other_thread:
                other_thread.submit(fake.runner.stop).result()

    fake.pio.handle(0xE9, handler)
    assert run(fake).reason == reasons.STOPPED
    assert bytes(seen) == b"he"
    assert run(fake).reason == reasons.HALTED
    assert bytes(seen) == b"hello"


def test_the_deadline_does_not_wait_for_the_rest_of_a_string_either() -> None:
    fake = FakeRun(pio(0xE9, b"hello"), HLT)
    seen: list[int] = []

    def handler(access: PioAccess) -> None:
        seen.append(access.value)
        while len(seen) == 2 and not fake.c.run.immediate_exit:
            pass  # until the timer has rung

    fake.pio.handle(0xE9, handler)
    assert run(fake, seconds=0.05).reason == reasons.TIMEOUT
    assert bytes(seen) == b"he"
    assert run(fake).reason == reasons.HALTED
    assert bytes(seen) == b"hello"


def test_a_stop_by_its_own_handler_finds_the_string_instruction_complete() -> None:
    fake = FakeRun(pio(0xE9, b"hello"), HLT)
    seen: list[int] = []

    def handler(access: PioAccess) -> None:
        seen.append(access.value)
        fake.runner.stop()

    fake.pio.handle(0xE9, handler)
    assert run(fake).reason == reasons.STOPPED
    assert bytes(seen) == b"hello"


def test_complete_gives_up_the_rest_of_a_string_that_was_cut_short() -> None:
    fake = FakeRun(pio(0x1F0, count=4), HLT)

    def handler(access: PioAccess) -> int:
        with ThreadPoolExecutor(1) as other_thread:
            other_thread.submit(fake.runner.stop).result()
        return 7

    fake.pio.handle(0x1F0, handler)
    assert run(fake).reason == reasons.STOPPED
    fake.runner.complete()
    assert fake.answered(0, 4) == b"\x07\xff\xff\xff"
    assert run(fake).reason == reasons.HALTED


def test_a_string_read_is_answered_item_by_item() -> None:
    fake = FakeRun(pio(0x1F0, size=2, count=4), HLT)
    words = iter([1, 2, 3, 0xFFFF])
    fake.pio.handle(0x1F0, lambda access: next(words))
    run(fake)
    assert fake.answered(0, 8) == b"\1\0\2\0\3\0\xff\xff"


def test_an_access_kept_by_a_handler_stays_what_it_was() -> None:
    fake = FakeRun(
        pio(1, b"a"), pio(1, b"b"), mmio(0x2000, b"12345678"), mmio(0x2000, b"x" * 8), HLT
    )
    kept: list[PioAccess | MmioAccess] = []
    fake.pio.handle(1, kept.append)
    fake.mmio.handle(0x2000, kept.append)
    run(fake)
    assert [k.value.to_bytes(k.size, "little") for k in kept] == [b"a", b"b", b"12345678", b"x" * 8]


def test_a_handlers_exception_comes_through_whole_and_the_run_can_go_on() -> None:
    fake = FakeRun(pio(1, b"a"), HLT)
    boom = RuntimeError("handler")

    def handler(access: PioAccess) -> None:
        raise boom

    fake.pio.handle(1, handler)
    with pytest.raises(RuntimeError) as caught:
        run(fake)
    assert caught.value is boom
    assert run(fake).reason == reasons.HALTED


class Integer:
    """What NumPy's integers are: no int, but a number that can be one."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __index__(self) -> int:
        return self.number


@pytest.mark.parametrize("answer", [True, Integer(1), Integer(-255), -255 + 256])
def test_whatever_is_an_integer_answers(answer: Any) -> None:
    fake = FakeRun(pio(0x61), HLT)
    fake.pio.handle(0x61, lambda access: answer)
    if getattr(answer, "number", 1) < 0:
        with pytest.raises(ValueError, match="answered -0xff, which does not fit the 1 byte of"):
            run(fake)
    else:
        run(fake)
        assert fake.answered(0, 1) == b"\x01"


@pytest.mark.parametrize(
    ("answer", "kind"),
    [(256, ValueError), ("x", TypeError), (-2, ValueError), (1 << 80, ValueError)],
)
def test_an_answer_that_does_not_fit_is_an_error_that_names_the_place(
    answer: object, kind: type[Exception]
) -> None:
    fake = FakeRun(pio(0x61), HLT)
    fake.pio.handle(0x61, lambda access: answer)  # type: ignore[arg-type,return-value]
    with pytest.raises(kind, match="0x61"):
        run(fake)


@pytest.mark.parametrize("answer", ["x", 1 << 80, -2])
def test_what_the_handler_of_a_write_returns_is_nobodys_business(answer: object) -> None:
    """``lambda access: file.write(access.data)`` is a handler."""
    fake = FakeRun(pio(0x61, b"a"), HLT)
    fake.pio.handle(0x61, lambda access: answer)  # type: ignore[arg-type,return-value]
    assert run(fake).reason == reasons.HALTED


@pytest.mark.parametrize("size", [0, 9, 255])
def test_an_access_of_an_impossible_width_cannot_be_made(size: int) -> None:
    with pytest.raises(ValueError, match=f"not {size}"):
        PioAccess(1, size, 0, True)


# ---- actions -----------------------------------------------------------------------------------


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


# ---- how runs end ------------------------------------------------------------------------------


def test_a_limit_counts_exits_and_the_next_run_goes_on() -> None:
    fake = FakeRun(pio(1, b"a"))
    claim = fake.pio.ignore(1)
    assert run(fake, 10).reason == reasons.LIMIT
    assert claim.hits == 10
    assert run(fake, 0).reason == reasons.LIMIT
    assert run(fake, 5).reason == reasons.LIMIT
    assert claim.hits == 15


def test_a_deadline_ends_a_storm_of_exits_served_in_c_and_in_python() -> None:
    fake = FakeRun(pio(1, b"a"))
    fake.pio.ignore(1)
    assert run(fake, seconds=0.05).reason == reasons.TIMEOUT
    fake = FakeRun(pio(1, b"a"))
    fake.pio.handle(1, lambda access: None)
    assert run(fake, seconds=0.05).reason == reasons.TIMEOUT


def test_a_deadline_in_the_past_ends_at_once() -> None:
    fake = FakeRun(pio(1, b"a"))
    fake.pio.ignore(1)
    assert run(fake, seconds=-5).reason == reasons.TIMEOUT


def test_stop_from_a_handler_ends_the_run_after_its_access() -> None:
    fake = FakeRun(pio(1), HLT)

    def handler(access: PioAccess) -> int:
        fake.runner.stop()
        return 7

    fake.pio.handle(1, handler)
    assert run(fake).reason == reasons.STOPPED
    assert fake.answered(0, 1) == b"\x07"
    assert run(fake).reason == reasons.HALTED


def test_stop_from_another_thread_ends_a_run_and_if_early_the_next() -> None:
    fake = FakeRun(pio(1, b"a"))
    fake.pio.ignore(1)
    threading.Thread(target=fake.runner.stop).start()
    assert run(fake, seconds=60).reason == reasons.STOPPED
    assert run(fake, seconds=0.01).reason == reasons.TIMEOUT


def test_a_stop_between_exit_and_entry_is_not_lost() -> None:
    fake = FakeRun(pio(1, b"a", stop=True), pio(1, b"b"))
    claim = fake.pio.ignore(1)
    assert run(fake, seconds=60).reason == reasons.STOPPED
    assert claim.hits == 1


def test_a_second_run_at_once_is_refused() -> None:
    fake = FakeRun(pio(1, b"a"), HLT)
    caught: list[BaseException] = []

    def handler(access: PioAccess) -> None:
        with pytest.raises(BusyError) as info:
            run(fake)
        caught.append(info.value)

    fake.pio.handle(1, handler)
    run(fake)
    assert "running" in str(caught[0])


def test_runs_nest_and_the_outer_deadline_still_holds() -> None:
    outer, inner = FakeRun(pio(1, b"a")), FakeRun(HLT)
    nested: list[str] = []
    outer.pio.handle(1, lambda access: nested.append(run(inner).reason))
    assert run(outer, seconds=0.05).reason == reasons.TIMEOUT
    assert set(nested) == {reasons.HALTED}


def test_eintr_and_eagain_do_not_end_a_run() -> None:
    fake = FakeRun(error(errno.EINTR), error(errno.EAGAIN), HLT)
    assert run(fake).reason == reasons.HALTED
    assert fake.c.exits == 1


def test_another_failure_of_kvm_run_raises_its_errno() -> None:
    fake = FakeRun(error(errno.ENXIO))
    with pytest.raises(KvmError) as caught:
        run(fake)
    assert (caught.value.ioctl, caught.value.errno) == ("KVM_RUN", errno.ENXIO)


def test_efault_with_an_explanation_is_an_exit() -> None:
    fake = FakeRun({"reason": lib.KVM_EXIT_MEMORY_FAULT, "error": errno.EFAULT})
    end = run(fake)
    assert end.reason == reasons.OTHER_EXIT
    assert end.exit.name == "KVM_EXIT_MEMORY_FAULT"


def test_an_unknown_exit_is_preserved() -> None:
    fake = FakeRun(other(4242))
    end = run(fake)
    assert end.reason == reasons.OTHER_EXIT
    assert end.exit.reason == 4242


def test_a_hook_serves_an_exit_and_false_ends_the_run() -> None:
    fake = FakeRun(HLT)
    halts: list[object] = []

    def hook(exit: object) -> bool:
        halts.append(exit)
        return len(halts) < 3

    fake.hooks[lib.KVM_EXIT_HLT] = hook
    assert run(fake).reason == reasons.HALTED
    assert len(halts) == 3


def test_a_shutdown_hook_that_changes_nothing_does_not_run_for_ever() -> None:
    fake = FakeRun(other(lib.KVM_EXIT_SHUTDOWN))
    calls: list[object] = []
    fake.hooks[lib.KVM_EXIT_SHUTDOWN] = calls.append
    assert run(fake).reason == reasons.SHUTDOWN
    assert len(calls) == 1


def test_a_traced_run_reports_every_kvm_run_and_serves_every_exit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from pykvm.kvm import ioctl, tracing

    calls: list[tuple[str, int]] = []
    monkeypatch.setattr(ioctl, "tracer", lambda *arguments: 0)
    monkeypatch.setattr(tracing, "log_run", lambda vcpu, result: calls.append(("KVM_RUN", result)))
    fake = FakeRun(pio(1, b"abc"), pio(1), error(errno.EINTR), HLT)
    seen: list[PioAccess] = []
    fake.pio.handle(1, seen.append)
    assert run(fake).reason == reasons.HALTED
    assert len(seen) == 4
    assert calls == [("KVM_RUN", 0), ("KVM_RUN", 0), ("KVM_RUN", -errno.EINTR), ("KVM_RUN", 0)]


def test_complete_gives_up_a_half_done_string_read() -> None:
    fake = FakeRun(pio(1, size=1, count=4), HLT)
    assert run(fake).reason == reasons.UNCLAIMED
    fake.runner.complete()
    assert fake.answered(0, 4) == b"\xff" * 4
    assert run(fake).reason == reasons.HALTED


def test_complete_gives_up_what_its_ring_has_no_room_for() -> None:
    fake = FakeRun(*[pio(0x3F8, b"abcdefgh")] * 7, HLT)
    fake.pio.fifo(0x3F8, capacity=16, keep=16)
    with pytest.raises(RingFullError):
        run(fake)
    assert fake.c.access.pending == lib.PYKVM_RETRY
    fake.runner.complete()
    assert fake.c.access.pending == lib.PYKVM_IDLE


def test_complete_leaves_a_stop_to_the_next_run() -> None:
    fake = FakeRun(HLT, pio(1, b"a"))
    fake.pio.ignore(1)
    run(fake)
    fake.runner.stop()
    fake.runner.complete()
    assert run(fake, seconds=1).reason == reasons.STOPPED


# ---- signals and threads at awkward moments ------------------------------------------------------


class CtrlC:
    """The compiled module, with Ctrl-C raised once as one of its functions comes back."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> object:
        function = getattr(lib, name)
        if name != self._name:
            return function

        def interrupted(*arguments: object) -> None:
            self._name = ""
            function(*arguments)
            raise KeyboardInterrupt

        return interrupted


def test_ctrl_c_as_an_access_comes_back_does_not_lose_it() -> None:
    fake = FakeRun(pio(1, b"a"), pio(2), pio(1, b"b"), HLT)
    seen: list[int] = []
    claim = fake.pio.handle(1, lambda access: seen.append(access.value))
    fake.pio.handle(2, lambda access: 0x55)
    for exit in fake.script[0:3]:
        exit.signal = signal.SIGINT
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            run(fake)
    assert run(fake).reason == reasons.HALTED
    assert (bytes(seen), fake.answered(1, 1), claim.hits) == (b"ab", b"\x55", 2)


def test_ctrl_c_as_a_halt_comes_back_does_not_lose_it() -> None:
    fake = FakeRun(HLT, pio(1, b"a"))
    fake.script[0].signal = signal.SIGINT
    with pytest.raises(KeyboardInterrupt):
        run(fake)
    assert run(fake).reason == reasons.HALTED
    assert (fake.c.exits, run(fake).reason) == (1, reasons.UNCLAIMED)


def test_ctrl_c_as_an_unclaimed_access_comes_back_does_not_lose_it() -> None:
    fake = FakeRun(pio(1, b"a"), HLT)
    fake.script[0].signal = signal.SIGINT
    with pytest.raises(KeyboardInterrupt):
        run(fake)
    end = run(fake)
    assert (end.reason, end.exit.value) == (reasons.UNCLAIMED, ord("a"))


def test_ctrl_c_in_a_handler_is_the_handlers_own() -> None:
    """It has seen the access, so nobody gets it again."""
    fake = FakeRun(pio(1, b"a"), HLT)
    seen: list[int] = []

    def handler(access: PioAccess) -> None:
        seen.append(access.value)
        signal.raise_signal(signal.SIGINT)

    fake.pio.handle(1, handler)
    with pytest.raises(KeyboardInterrupt):
        run(fake)
    assert run(fake).reason == reasons.HALTED
    assert seen == [ord("a")]


def test_ctrl_c_before_a_hook_has_seen_its_exit_does_not_lose_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = FakeRun(HLT, pio(1, b"a"))
    seen: list[object] = []
    fake.hooks[lib.KVM_EXIT_HLT] = seen.append
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(vcpu_thread.Runner, "_exit", interrupted_once)
        run(fake)
    assert seen == []
    assert run(fake).reason == reasons.UNCLAIMED
    assert len(seen) == 1


def interrupted_once(runner: vcpu_thread.Runner, lock: object) -> None:
    raise KeyboardInterrupt


def test_ctrl_c_in_a_hook_is_the_hooks_own() -> None:
    fake = FakeRun(HLT, pio(1, b"a"))
    seen: list[object] = []

    def hook(exit: object) -> None:
        seen.append(exit)
        signal.raise_signal(signal.SIGINT)

    fake.hooks[lib.KVM_EXIT_HLT] = hook
    with pytest.raises(KeyboardInterrupt):
        run(fake)
    fake.runner.give_back()  # as who asked for the run does
    assert run(fake).reason == reasons.UNCLAIMED
    assert len(seen) == 1


def test_an_exit_whose_hook_ended_the_run_can_be_given_back() -> None:
    """Of several vCPUs one that halted so stays halted while the others go on."""
    fake = FakeRun(HLT, pio(1, b"a"))
    fake.hooks[lib.KVM_EXIT_HLT] = lambda exit: False
    assert run(fake).reason == reasons.HALTED
    fake.runner.give_back()
    assert run(fake).reason == reasons.HALTED
    assert fake.c.exits == 1


def test_ctrl_c_while_another_vcpus_handler_runs_does_not_lose_the_access() -> None:
    class Busy:
        def __init__(self) -> None:
            self.waited = False

        def __enter__(self) -> None:
            if not self.waited:
                self.waited = True
                raise KeyboardInterrupt

        def __exit__(self, *error: object) -> None:
            pass

    fake = FakeRun(pio(1, b"a"), HLT)
    seen: list[int] = []
    fake.pio.handle(1, lambda access: seen.append(access.value))
    lock = Busy()
    with pytest.raises(KeyboardInterrupt):
        fake.runner.run(NEVER, None, lock)
    assert fake.runner.run(NEVER, None, lock).reason == reasons.HALTED
    assert seen == [ord("a")]


def test_an_access_that_a_signals_handler_gives_up_reaches_nobody() -> None:
    """It gave the vCPU a new state, of which that access is no part."""
    fake = FakeRun(pio(2, size=4), HLT)
    seen: list[object] = []
    fake.pio.handle(2, seen.append)
    fake.script[0].signal = signal.SIGUSR1
    old = signal.signal(signal.SIGUSR1, lambda *_: fake.runner.complete())
    try:
        assert run(fake).reason == reasons.HALTED
    finally:
        signal.signal(signal.SIGUSR1, old)
    assert seen == []


def test_a_vcpu_that_a_thread_is_about_to_run_is_left_alone() -> None:
    fake = FakeRun(HLT)
    run(fake)
    fake.runner.owner = RESERVED
    with pytest.raises(BusyError):
        fake.runner.complete()
    assert fake.runner.owner == RESERVED


def test_ctrl_c_as_a_run_begins_lets_go_of_the_vcpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the timer would write to its run page after it is gone."""
    fake = FakeRun(HLT)
    monkeypatch.setattr(vcpu_thread, "lib", CtrlC("pykvm_vcpu_begin"))
    with pytest.raises(KeyboardInterrupt):
        run(fake)
    assert (fake.c.tid, fake.runner.owner) == (0, 0)
    assert run(fake).reason == reasons.HALTED


def test_of_two_runs_that_begin_at_once_one_is_refused() -> None:
    fake = FakeRun(HLT)
    assert lib.pykvm_vcpu_begin(fake.c, NEVER) == 0  # the other has not yet said who it is
    with pytest.raises(BusyError), ThreadPoolExecutor(1) as other:
        other.submit(run, fake).result()
    lib.pykvm_vcpu_end(fake.c)
    assert run(fake).reason == reasons.HALTED


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
        assert reads[0].result() + fifo.read() == b"old!new!"


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


# ---- claims that change under a run --------------------------------------------------------------


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


# ---- output that nobody reads ------------------------------------------------------------------


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
    timer.join()


def test_a_slow_reader_gets_everything() -> None:
    fake, serial = flood()
    got = bytearray()
    with ThreadPoolExecutor(1) as other_thread:
        running = other_thread.submit(run, fake, None, 60)
        while len(got) < 200:
            assert select.select([serial], [], [], 60)[0], "nothing came"
            got += serial.read()
        fake.runner.stop()
        assert running.result().reason == reasons.STOPPED
    got += serial.read()
    assert bytes(got[:200]) == b"abcdefgh" * 25
