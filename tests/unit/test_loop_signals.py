"""The vCPU loop, interrupted: signals and threads at awkward moments lose nothing."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from pykvm import result as reasons
from pykvm import vcpu_thread
from pykvm._abi import lib
from pykvm.devices.access import PioAccess
from pykvm.errors import BusyError
from pykvm.vcpu_thread import NEVER, RESERVED
from tests.support.fake_vcpu import HLT, FakeRun, pio, run

pytestmark = pytest.mark.sanitize


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
        other.submit(run, fake).result(60)
    lib.pykvm_vcpu_end(fake.c)
    assert run(fake).reason == reasons.HALTED
