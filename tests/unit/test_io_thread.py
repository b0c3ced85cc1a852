"""The I/O thread: what it calls, when it holds still, and how it ends."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator

import pytest

from pykvm.devices.io_thread import IoThread
from pykvm.errors import ClosedError

SOON = 10.0


@pytest.fixture
def io() -> Iterator[IoThread]:
    io = IoThread()
    yield io
    io.close()


@pytest.fixture
def bell() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    yield fd
    os.close(fd)


def test_it_starts_when_it_has_something_to_do(io: IoThread) -> None:
    assert not io.started and io.settle()
    io.call(lambda: None)
    assert io.started and io.settle()


def test_a_doorbell_is_answered_once_however_often_it_rang(io: IoThread, bell: int) -> None:
    rung: list[str] = []
    io.add(bell, lambda: rung.append(threading.current_thread().name))
    with io.quiesce():
        for _ in range(5):
            os.eventfd_write(bell, 1)
    assert io.settle() and rung == ["pykvm-io"]
    os.eventfd_write(bell, 1)
    assert io.settle() and len(rung) == 2


def test_a_doorbell_that_was_removed_rings_no_more(io: IoThread, bell: int) -> None:
    rung: list[int] = []
    io.add(bell, lambda: rung.append(1))
    io.remove(bell)
    io.remove(bell)
    os.eventfd_write(bell, 1)
    assert io.settle() and not rung


def test_to_remove_waits_for_the_callback_under_way(io: IoThread, bell: int) -> None:
    entered, leave, left = threading.Event(), threading.Event(), threading.Event()

    def callback() -> None:
        entered.set()
        leave.wait(SOON)
        left.set()

    io.add(bell, callback)
    os.eventfd_write(bell, 1)
    assert entered.wait(SOON)
    threading.Timer(0.01, leave.set).start()
    io.remove(bell)
    assert left.is_set()


def test_within_quiesce_nothing_runs_and_they_nest(io: IoThread) -> None:
    ran = threading.Event()
    with io.quiesce():
        with io.quiesce():
            io.call(ran.set)
        assert not ran.wait(0.02)
    assert ran.wait(SOON)


def test_it_cannot_wait_for_itself(io: IoThread) -> None:
    caught: list[BaseException] = []

    def quiesce() -> None:
        try:
            with io.quiesce():
                pass
        except RuntimeError as error:
            caught.append(error)

    io.call(quiesce)
    assert io.settle() and caught


def test_later_is_later_and_in_order(io: IoThread) -> None:
    order: list[int] = []
    done = threading.Event()
    start = time.monotonic()

    def last() -> None:
        order.append(2)
        done.set()

    io.later(0.03, last)
    io.later(0.01, lambda: order.append(1))
    assert done.wait(SOON) and order == [1, 2]
    assert time.monotonic() - start >= 0.03


def test_settle_waits_for_what_a_callback_asked_for(io: IoThread) -> None:
    done: list[int] = []
    io.call(lambda: io.call(lambda: io.call(lambda: done.append(1))))
    assert io.settle() and done


def test_settle_ends_also_where_there_is_always_more(io: IoThread, bell: int) -> None:
    io.add(bell, lambda: os.eventfd_write(bell, 1))
    os.eventfd_write(bell, 1)
    assert io.settle()
    io.remove(bell)


def test_what_a_callback_raises_is_told_and_it_goes_on(bell: int) -> None:
    errors: list[BaseException] = []
    io = IoThread(on_error=errors.append)
    io.call(lambda: 1 / 0)
    assert io.settle()
    assert [type(error) for error in errors] == [ZeroDivisionError]
    ran = threading.Event()
    io.call(ran.set)
    assert ran.wait(SOON)
    io.close()


def test_closed_it_takes_nothing_more_and_leaves_nothing(io: IoThread, bell: int) -> None:
    before = len(os.listdir("/proc/self/fd"))
    io.add(bell, lambda: None)
    with io.quiesce():
        pass
    io.close()
    io.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert not any(thread.name == "pykvm-io" for thread in threading.enumerate())
    with pytest.raises(ClosedError):
        io.call(lambda: None)
