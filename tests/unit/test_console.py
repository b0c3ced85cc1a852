"""The serial console from the host's side, over a UART that a test holds in its hand."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykvm.console import LINE_SHOWN, Console, ExpectError, readable
from pykvm.pc import PanicWatch, Pc

GENEROUS = 60.0
"""Seconds; a test that needs them hangs."""


class FakeSerial:
    """What a console needs of a UART."""

    def __init__(self) -> None:
        self.room = 4
        self.typed = b""
        self.taken = threading.Event()
        self._lock = threading.Lock()
        self._output = bytearray()
        self._out = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._in = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def prints(self, data: bytes) -> None:
        """The guest does."""
        with self._lock:
            self._output += data
        os.eventfd_write(self._out, 1)

    def reads(self) -> None:
        """The guest has read all input."""
        os.eventfd_write(self._in, 1)

    def read(self) -> bytes:
        with suppress(BlockingIOError):
            os.eventfd_read(self._out)
        with self._lock:
            data = bytes(self._output)
            self._output.clear()
        return data

    def write(self, data: bytes) -> None:
        assert len(data) <= self.room
        self.typed += data
        self.taken.set()

    def send_break(self) -> None:
        self.typed += b"<break>"

    def fileno(self) -> int:
        return self._out

    def input_fileno(self) -> int:
        return self._in

    def close(self) -> None:
        os.close(self._out)
        os.close(self._in)


@pytest.fixture
def serial() -> Iterator[FakeSerial]:
    made = FakeSerial()
    yield made
    made.close()


@pytest.fixture
def console(serial: FakeSerial) -> Iterator[Console]:
    made = Console(serial, keep=1000)
    made.start()
    yield made
    made.close()


def test_expect_goes_on_where_the_last_match_ended(serial: FakeSerial, console: Console) -> None:
    serial.prints(b"one two one")
    assert console.expect(b"one", GENEROUS) == b"one"
    assert console.expect(b"one", GENEROUS) == b" two one"
    with pytest.raises(ExpectError, match=r"0\.01 s passed"):
        console.expect(b"one", 0.01)
    serial.prints(b"[12:34] on")
    assert console.expect(re.compile(rb"\d+:\d+"), GENEROUS) == b"[12:34"
    serial.prints(b"e")
    assert console.expect(b"one", GENEROUS) == b"] one"


def test_expect_waits_while_the_guest_runs(serial: FakeSerial, console: Console) -> None:
    timer = threading.Timer(0.02, serial.prints, [b"late"])
    timer.start()
    assert console.expect(b"late") == b"late"
    timer.join(60)


def test_the_end_of_the_run_ends_the_waiting_and_tells_the_tail(
    serial: FakeSerial, console: Console
) -> None:
    serial.prints(b"no login here")
    timer = threading.Timer(0.02, console.stop)
    timer.start()
    with pytest.raises(ExpectError, match="the run ended before") as failed:
        console.expect(b"login:")
    timer.join(60)
    assert failed.value.tail == b"no login here"


def test_the_transcript_is_the_end_of_what_came(serial: FakeSerial, console: Console) -> None:
    serial.prints(b"x" * 3000 + b"end")
    console.expect(b"end", GENEROUS)
    assert console.transcript == b"x" * 997 + b"end"


def test_what_is_typed_goes_in_as_there_is_room(serial: FakeSerial, console: Console) -> None:
    console.write(b"abcdefghij")
    for part in (b"abcd", b"abcdefgh", b"abcdefghij"):
        assert serial.taken.wait(GENEROUS)
        assert serial.typed == part
        serial.taken.clear()
        serial.reads()
    console.send_break()
    assert serial.typed.endswith(b"<break>")


def test_output_comes_whole_and_in_order(serial: FakeSerial) -> None:
    got: list[bytes] = []
    console = Console(serial, output=got.append, keep=10)
    console.start()
    sent = [bytes([65 + n]) * 100 for n in range(20)]
    for piece in sent:
        serial.prints(piece)
    console.stop()
    serial.prints(b"printed while nothing runs")
    console.close()
    assert b"".join(got) == b"".join(sent) + b"printed while nothing runs"


# ---- for people --------------------------------------------------------------------------------


@given(st.binary())
def test_nothing_a_guest_prints_moves_our_cursor(line: bytes) -> None:
    text = readable(line)
    assert text.isprintable()


def test_lines_are_cut_and_escapes_told(serial: FakeSerial, console: Console) -> None:
    serial.prints(b"plain\r\n\tindented \x1b[2J\x07\n" + "ünï\n".encode() + b"y" * 500)
    console.expect(b"y" * 500, GENEROUS)
    assert console.lines() == [
        "plain", "        indented \\x1b[2J\\x07", "ünï", "y" * LINE_SHOWN + "…",
    ]  # fmt: skip
    assert console.lines(1) == ["y" * LINE_SHOWN + "…"]


def test_a_panic_is_told_without_its_escapes() -> None:
    said: list[str] = []
    ended: list[bool] = []
    watch = PanicWatch(said.append, lambda: ended.append(True))
    for piece in (b"[    1.0] Kernel pa", b"nic - not syncing: \x1b[31mno init\r\n", b"more\n"):
        watch(piece)
    assert said == ["[    1.0] Kernel panic - not syncing: \\x1b[31mno init"]
    assert not ended
    watch(b"---[ end Kernel panic - not syncing: no init ]---\n")
    assert ended


# ---- what a run of a booted machine does beside it -----------------------------------------------


def test_a_run_that_begins_twice_waits_for_the_kernel_on_its_way_into_the_cache() -> None:
    """start() begins what run() begins again in its thread."""
    go_on, kept = threading.Event(), threading.Event()

    class Plan:
        to_keep: object = "a kernel"

        def keep(self) -> None:
            first, self.to_keep = self.to_keep, "still there, as the other thread sees it"
            if first == "a kernel":
                assert go_on.wait(GENEROUS)
                kept.set()

    class Quiet:
        def start(self) -> None: ...
        def stop(self) -> None: ...

    pc = object.__new__(Pc)
    pc.console, pc.plan, pc._keeper, pc._grace = Quiet(), Plan(), None, None  # type: ignore[assignment]
    pc.run_begins()
    pc.run_begins()
    threading.Timer(0.1, go_on.set).start()
    pc.run_ended()
    assert kept.is_set()
