"""Making, closing, leaking, forking: what a machine holds and when it lets go."""

from __future__ import annotations

import gc
import os
import signal
import warnings

import pytest

import pykvm
from pykvm import result as reasons

pytestmark = pytest.mark.usefixtures("no_leak")


def hello(m: pykvm.Machine) -> None:
    m.load(b"\xe6\xe9\xf4", at=0x8000)  # out 0xe9,al; hlt
    m.cpu.enter("real16", entry=0x8000)
    m.pio.ignore(0xE9)
    assert m.run(timeout=60).reason == reasons.HALTED


def test_a_closed_machine_says_so_and_closes_twice() -> None:
    m = pykvm.Machine()
    hello(m)
    cpu = m.cpu
    m.close()
    m.close()
    m.stop()
    for use in (m.run, lambda: cpu.rax, lambda: cpu.enter("real16", 0), lambda: m.mem[0]):
        with pytest.raises(pykvm.ClosedError):
            use()
    assert "closed" in repr(m)


def test_a_view_of_the_memory_outlives_the_machine() -> None:
    with pykvm.Machine() as m:
        hello(m)
        view = m.mem.view(0x8000, 3)
    assert bytes(view) == b"\xe6\xe9\xf4"
    view[0] = 7
    assert view[0] == 7
    view.release()


def test_a_machine_that_cannot_be_made_leaves_nothing() -> None:
    with pytest.raises(ValueError, match="cpuid"):
        pykvm.Machine(cpuid="guest")
    with pytest.raises(ValueError, match="cpus"):
        pykvm.Machine(cpus=0)
    with pytest.raises(ValueError, match="irqchip"):
        pykvm.Machine(pit=True)
    with pytest.raises(ValueError):
        pykvm.Machine(memory="2 bananas")
    with pytest.raises(pykvm.CapabilityError):
        pykvm.Machine(path="/dev/null")
    with pytest.raises(pykvm.CapabilityError):
        pykvm.Machine(path="/nowhere/kvm")


def test_a_forgotten_machine_warns_and_is_closed() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        m = pykvm.Machine()
        hello(m)
        del m
        gc.collect()
    assert any(issubclass(w.category, ResourceWarning) for w in caught)


@pytest.mark.watchdog(900)
def test_a_thousand_machines_leak_nothing() -> None:
    for _ in range(1000):
        with pykvm.Machine(memory="1M") as m:
            hello(m)


def test_after_a_fork_the_error_says_that_machines_do_not_cross_it() -> None:
    with pykvm.Machine() as m:
        hello(m)
        read, write = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:  # nothing here may raise: it would run the rest of the tests twice
            try:
                text = "no error"
                try:
                    m.run(timeout=5)
                except pykvm.PykvmError as error:
                    text = str(error)
                os.write(write, text.encode())
            finally:
                os._exit(0)
        os.close(write)
        with os.fdopen(read) as pipe:
            text = pipe.read()
        os.waitpid(child, 0)
        assert "EIO" in text and "fork" in text
        m.cpu.rip = 0x8000
        assert m.run(timeout=60).reason == reasons.HALTED


def test_a_machine_made_after_a_fork_has_timeouts_of_its_own() -> None:
    """A child has none of its parent's timers."""
    with pykvm.Machine() as m:
        hello(m)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(20)
            with pykvm.Machine() as m:
                m.load(b"\xeb\xfe", at=0x8000)  # jmp $
                m.cpu.enter("real16", entry=0x8000)
                code = 0 if m.run(timeout=0.1).reason == reasons.TIMEOUT else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
