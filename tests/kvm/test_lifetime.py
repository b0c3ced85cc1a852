"""Making, closing, leaking, forking: what a machine holds and when it lets go."""

from __future__ import annotations

import gc
import os
import signal
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest

import pykvm
import pykvm.kvm
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


def test_a_device_that_cannot_be_closed_keeps_nothing_else_open() -> None:
    class Stubborn:
        def close(self) -> None:
            raise OSError("disk full")

    m = pykvm.Machine()
    vcpu = m.cpu.vcpu
    m._virtio = Stubborn()  # type: ignore[assignment]
    with pytest.raises(OSError, match="disk full"):
        m.close()
    assert (m.closed, m.vm.closed, m.kvm.closed, vcpu.closed) == (True,) * 4
    m.close()


def test_what_a_kvm_said_is_asked_again_of_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module loaded anew, with other options, comes with a new device node of the same name."""
    asked: list[str] = []
    ask = pykvm.kvm.Kvm.get_supported_cpuid

    def counted(kvm: pykvm.kvm.Kvm) -> list[Any]:
        asked.append(kvm.path)
        return ask(kvm)

    monkeypatch.setattr(pykvm.kvm.Kvm, "get_supported_cpuid", counted)
    node = os.stat("/dev/kvm")
    try:
        os.mknod(tmp_path / "first", node.st_mode, node.st_rdev)
        os.mknod(tmp_path / "second", node.st_mode, node.st_rdev)
        os.close(os.open(tmp_path / "first", os.O_RDWR))
    except OSError as error:
        pytest.skip(f"this process cannot make device nodes that can be opened: {error}")
    path = tmp_path / "first"
    for _ in range(3):
        pykvm.Machine(path=str(path)).close()
    assert asked == [str(path)]
    os.replace(tmp_path / "second", path)
    pykvm.Machine(path=str(path)).close()
    assert asked == [str(path)] * 2


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
    with pykvm.Machine(memory="1M") as m:  # what the first one leaves for the others
        hello(m)
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(1000):
        with pykvm.Machine(memory="1M") as m:
            hello(m)
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before


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
