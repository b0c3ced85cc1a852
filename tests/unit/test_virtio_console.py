"""The console device: output to be read or waited for, input when the driver has room for it."""

from __future__ import annotations

import json
import re
import threading

import pytest

from pykvm.devices.io_thread import IoThread
from pykvm.devices.transcript import ExpectError, Transcript
from pykvm.devices.virtio import mmio as registers
from pykvm.devices.virtio.console import EMERG_WRITE, MAX_OUTPUT, RECEIVE, TRANSMIT, VirtioConsole
from pykvm.devices.virtio.core import NEEDS_RESET
from tests.support.virtio_guest import VERSION_1, VirtioGuest
from tests.support.vring_driver import WRITE

BUFFER = 0x40000
SOON = 10.0


def test_output_is_kept_read_and_handed_on() -> None:
    seen: list[bytes] = []
    console = VirtioConsole(output=seen.append)
    with VirtioGuest(console) as guest:
        _, driver = guest.start()
        guest.memory.write(BUFFER, b"one\ntwo\n")
        driver.send((BUFFER, 4, 0), (BUFFER + 4, 4, 0))
        guest.notify(TRANSMIT)
        assert driver.used() == [(0, 0)] and guest.interrupts() == 1
    assert console.read() == b"one\ntwo\n" and console.read() == b""
    assert console.transcript == b"one\ntwo\n" and console.lines(1) == ["two"]
    assert b"".join(seen) == b"one\ntwo\n"
    assert console.counters.bytes_out == 8


def test_only_the_last_of_the_output_is_kept() -> None:
    console = VirtioConsole(keep=10)
    with VirtioGuest(console) as guest:
        _, driver = guest.start()
        for number in range(5):
            guest.memory.write(BUFFER, b"%05d" % number)
            driver.send((BUFFER, 5, 0))
            guest.notify(TRANSMIT)
    assert console.transcript == b"0000300004" == console.read()


def test_more_output_at_once_than_anybody_has_is_a_breach() -> None:
    console = VirtioConsole()
    with VirtioGuest(console, ram="4M") as guest:
        _, driver = guest.start()
        driver.send((0, MAX_OUTPUT, 0))
        guest.notify(TRANSMIT)
        assert driver.used() == [(0, 0)]
        driver.send((0, MAX_OUTPUT, 0), (0, 1, 0))
        guest.notify(TRANSMIT)
        assert guest.status & NEEDS_RESET and not driver.used()
    assert len(console.transcript) == MAX_OUTPUT


def test_input_waits_for_buffers_and_buffers_for_input() -> None:
    console = VirtioConsole()
    with VirtioGuest(console) as guest:
        driver, _ = guest.start()
        console.write(b"abcdef")
        assert console.pending == 6 and not driver.used()
        driver.send((BUFFER, 4, WRITE))
        guest.notify(RECEIVE)
        assert driver.used() == [(0, 4)] and guest.memory.read(BUFFER, 4) == b"abcd"
        driver.send((BUFFER, 4, WRITE), first=1)
        driver.send((BUFFER + 8, 4, WRITE), first=2)
        guest.notify(RECEIVE)
        assert driver.used() == [(1, 2)] and console.pending == 0
        console.write(b"gh")
        assert driver.used() == [(2, 2)] and guest.memory.read(BUFFER + 8, 2) == b"gh"


def test_input_reaches_a_guest_that_the_io_thread_serves() -> None:
    io = IoThread()
    console = VirtioConsole()
    with VirtioGuest(console, io=io) as guest:
        driver, _ = guest.start()
        driver.send((BUFFER, 4, WRITE))
        guest.notify(RECEIVE)
        console.write(b"hi")
        assert io.settle() and driver.used() == [(0, 2)]
    io.close()


def test_input_survives_a_reset() -> None:
    console = VirtioConsole()
    with VirtioGuest(console) as guest:
        guest.start()
        console.write(b"early")
        driver, _ = guest.start()
        driver.send((BUFFER, 8, WRITE))
        guest.notify(RECEIVE)
        assert driver.used() == [(0, 5)]


def test_the_configuration_has_the_size_and_an_emergency_exit() -> None:
    console = VirtioConsole(columns=132, rows=43)
    with VirtioGuest(console) as guest:
        config = registers.CONFIG
        assert (guest.read(config, 2), guest.read(config + 2, 2)) == (132, 43)
        assert guest.read(config + 4) == 1
        for byte in b"help":  # before any queue
            guest.write(config + EMERG_WRITE, byte)
        assert console.read() == b"help"
        guest.start(VERSION_1 | 1)
        console.resize(80, 25)
        assert guest.acknowledge() == 2 and guest.read(config) == 80 | 25 << 16


def test_what_was_typed_is_in_the_state() -> None:
    console = VirtioConsole(columns=100)
    other = VirtioConsole()
    with VirtioGuest(console), VirtioGuest(other) as guest:
        console.write(b"later")
        other.restore(json.loads(json.dumps(console.state())))
        assert other.pending == 5 and guest.read(registers.CONFIG, 2) == 100


# ---- the transcript ------------------------------------------------------------------------------


def test_expect_goes_on_where_the_last_match_ended() -> None:
    transcript = Transcript()
    transcript.feed(b"login: password: $ ")
    assert transcript.expect(b": ") == b"login: "
    assert transcript.expect(re.compile(rb"\w+: ")) == b"password: "
    with pytest.raises(ExpectError, match="0 s passed") as caught:
        transcript.expect(b"login", timeout=0)
    assert caught.value.tail == b"$ "


def test_expect_waits_and_ends_with_the_run() -> None:
    transcript = Transcript()
    threading.Timer(0.01, transcript.feed, [b"ready"]).start()
    assert transcript.expect(b"ready", timeout=SOON) == b"ready"
    threading.Timer(0.01, transcript.end).start()
    with pytest.raises(ExpectError, match="the run ended"):
        transcript.expect(b"more", timeout=SOON)
    transcript.end(False)
    with pytest.raises(ExpectError, match="passed"):
        transcript.expect(b"more", timeout=0)


def test_what_is_not_kept_any_more_is_not_found() -> None:
    transcript = Transcript(keep=8)
    transcript.feed(b"0123456789")
    assert transcript.read() == b"23456789"
    with pytest.raises(ExpectError):
        transcript.expect(b"01", timeout=0)
    assert transcript.expect(b"9") == b"23456789"
