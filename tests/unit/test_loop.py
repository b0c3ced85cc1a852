"""The vCPU loop, C and Python, over a scripted KVM_RUN."""

from __future__ import annotations

import errno
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pykvm import result as reasons
from pykvm._abi import lib
from pykvm.devices.access import MmioAccess, PioAccess
from pykvm.devices.ring import RingFullError
from pykvm.errors import BusyError, KvmError
from tests.support.fake_vcpu import HLT, FakeRun, error, mmio, other, pio, run

pytestmark = pytest.mark.sanitize


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
                other_thread.submit(fake.runner.stop).result(60)

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
            other_thread.submit(fake.runner.stop).result(60)
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
