"""``Machine.start()``: a run in the background, for scripts that talk to the guest meanwhile."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import pykvm
from pykvm import result as reasons
from pykvm.background import Background
from pykvm.console import ExpectError
from pykvm.devices.access import PioAccess
from tests.support import tiny_kernel

GENEROUS = 60.0
"""Seconds; a run that needs them hangs."""

pytestmark = pytest.mark.usefixtures("no_leak")


def enter(m: pykvm.Machine, text: str) -> None:
    m.load(pykvm.asm(text, at=0x8000))
    m.cpu.enter("long64", entry=0x8000)


def test_it_runs_while_the_script_goes_on(m: pykvm.Machine) -> None:
    enter(m, "w: pause; cmp byte ptr [0x9000],1; jne w; hlt")
    running = m.start(timeout=GENEROUS)
    assert running.running and m.running
    assert running.result is None
    m.mem.u8[0x9000] = 1
    result = running.wait(GENEROUS)
    assert result.reason == reasons.HALTED
    assert running.result is result
    assert running.wait() is result
    assert not running.running and not m.running


def test_a_wait_may_end_before_the_run_does(m: pykvm.Machine) -> None:
    enter(m, "l: jmp l")
    running = m.start(timeout=GENEROUS)
    with pytest.raises(TimeoutError):
        running.wait(0.05)
    assert running.stop().reason == reasons.STOPPED
    assert running.stop().reason == reasons.STOPPED  # over already: the same


def test_stop_says_why(m: pykvm.Machine) -> None:
    enter(m, "l: jmp l")
    result = m.start().stop(reasons.DEBUG_EXIT, 3)
    assert (result.reason, result.code) == (reasons.DEBUG_EXIT, 3)


def test_its_own_timeout_ends_it(m: pykvm.Machine) -> None:
    enter(m, "l: jmp l")
    result = m.start(timeout=0.05).wait(GENEROUS)
    assert result.reason == reasons.TIMEOUT
    assert [state.code[:2] for state in result.cpus] == [b"\xeb\xfe"]


def test_what_a_handler_raises_comes_from_wait(m: pykvm.Machine) -> None:
    enter(m, "out 0x10,al; hlt")

    @m.on_pio(0x10)
    def fail(exit: PioAccess) -> None:
        raise LookupError("of the handler's")

    running = m.start(timeout=GENEROUS)
    for wait in (running.wait, running.wait):
        with pytest.raises(LookupError, match="handler's"):
            wait(GENEROUS)
    assert running.result is None
    assert not m.running


def test_one_run_at_a_time(m: pykvm.Machine) -> None:
    enter(m, "l: jmp l")
    with m.start(timeout=GENEROUS):
        with pytest.raises(pykvm.BusyError):
            m.start()
        with pytest.raises(pykvm.BusyError):
            m.run()
        assert m.running
    assert m.run(timeout=0.01).reason == reasons.TIMEOUT


def test_the_registers_belong_to_the_run_from_the_first_moment(m: pykvm.Machine) -> None:
    enter(m, "l: jmp l")
    for _ in range(50):
        with m.start(timeout=GENEROUS), pytest.raises(pykvm.BusyError):
            assert m.cpu.rip
        assert m.cpu.rip == 0x8000


def test_a_thread_that_cannot_be_had_leaves_nothing(
    m: pykvm.Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scarce(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    enter(m, "l: jmp l")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="can't start"):
        patch.setattr(threading.Thread, "start", scarce)
        m.start()
    assert m.cpu.rip == 0x8000
    assert m.run(timeout=0.01).reason == reasons.TIMEOUT


def test_ctrl_c_as_its_thread_comes_up_leaves_no_run_behind(
    m: pykvm.Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine must not take itself for idle while a thread is in the guest."""
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        assert in_guest.wait(GENEROUS)
        raise KeyboardInterrupt

    in_guest = threading.Event()
    enter(m, "out 0x10,al; l: jmp l")
    m.on_pio(0x10, lambda access: in_guest.set())
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(threading.Thread, "start", interrupted)
        m.start(timeout=GENEROUS)
    assert not m.running
    assert m.cpu.rip == 0x8002
    assert m.run(timeout=0.01).reason == reasons.TIMEOUT


def test_ctrl_c_before_its_thread_has_begun_leaves_nothing_to_begin(m: pykvm.Machine) -> None:
    enter(m, "hlt")
    background = Background(m)
    assert not background.give_up()
    ran: list[object] = []
    background.begin(lambda: ran.append(1))  # type: ignore[arg-type, return-value]
    assert background._thread is not None
    background._thread.join(GENEROUS)
    assert (ran, background.running) == ([], False)


@pytest.mark.parametrize("cpus", [1, 2])
@pytest.mark.parametrize("how", ["wait", "stop", "close", "machine"])
def test_a_handler_cannot_wait_for_its_own_run(how: str, cpus: int) -> None:
    with pykvm.Machine(memory="2M", cpus=cpus) as m:
        m.load(pykvm.asm("cmp dil,0; jne o; h: hlt; o: out 0x10,al; hlt", at=0x8000))
        for cpu in m.cpus:
            cpu.enter("long64", entry=0x8000)
            cpu.rdi = cpu.index + 2 - cpus  # the last one's handler asks

        ready = threading.Event()

        @m.on_pio(0x10)
        def _(access: PioAccess) -> None:
            assert ready.wait(GENEROUS)
            if how == "machine":
                m.close()
            else:
                getattr(running, how)()

        running = m.start(timeout=GENEROUS)
        ready.set()
        with pytest.raises(pykvm.BusyError):
            running.wait(GENEROUS)


def test_a_signals_handler_may_stop_it_too(m: pykvm.Machine) -> None:
    enter(m, "l: jmp l")
    running = m.start(timeout=GENEROUS)
    with running._lock:  # where Ctrl-C may find the main thread
        running._stop(reasons.STOPPED, None)
    assert running.wait(GENEROUS).reason == reasons.STOPPED


def test_leaving_the_block_stops_it_also_by_an_exception(m: pykvm.Machine) -> None:
    enter(m, "l: jmp l")
    with pytest.raises(LookupError), m.start() as running:
        raise LookupError
    assert running.result is not None
    assert running.result.reason == reasons.STOPPED


def test_closing_the_machine_stops_it() -> None:
    with pykvm.Machine(memory="2M", cpus=2) as m:
        m.load(pykvm.asm("l: jmp l", at=0x8000))
        for cpu in m.cpus:
            cpu.enter("long64", entry=0x8000)
        running = m.start()
    assert running.wait().reason == reasons.STOPPED
    with pytest.raises(pykvm.ClosedError):
        m.start()


def test_a_stop_that_comes_late_is_not_for_the_next_run(m: pykvm.Machine) -> None:
    enter(m, "out 0x10,al; hlt")
    ended, go_on = threading.Event(), threading.Event()
    run = m._run_them

    def slowly(*arguments: object) -> pykvm.RunResult:
        result = run(*arguments)  # type: ignore[arg-type]
        ended.set()
        assert go_on.wait(GENEROUS)
        return result

    m._run_them = slowly  # type: ignore[method-assign, assignment]
    m.pio.ignore(0x10)
    running = m.start(timeout=GENEROUS)
    assert ended.wait(GENEROUS)
    running._stop(reasons.STOPPED, None)
    go_on.set()
    assert running.wait().reason == reasons.HALTED
    m._run_them = run  # type: ignore[method-assign]
    enter(m, "out 0x10,al; hlt")
    assert m.run(timeout=GENEROUS).reason == reasons.HALTED


def test_a_guest_that_cannot_go_on_says_so_at_once(m: pykvm.Machine) -> None:
    enter(m, "ud2")
    assert m.start(timeout=GENEROUS).wait().reason == reasons.SHUTDOWN
    again = m.start()
    assert isinstance(again, Background)
    assert again.wait().reason == reasons.SHUTDOWN
    again.close()


# ---- with a console ----------------------------------------------------------------------------


@pytest.fixture
def echo(tmp_path: Path) -> Iterator[pykvm.Machine]:
    with pykvm.Machine("16M", irqchip=True, pit=True) as m:
        m.boot(tiny_kernel.elf(tiny_kernel.ECHO), cache=False)
        yield m


def test_a_script_talks_to_the_guest_and_gets_its_end(echo: pykvm.Machine) -> None:
    with echo.start(timeout=GENEROUS) as running:
        echo.console.expect(b"ready\n", GENEROUS)
        echo.console.write(b"hello")
        assert echo.console.expect(b"hello", GENEROUS) == b"hello"
        echo.console.write(b".")
        assert running.wait(GENEROUS).reason == reasons.POWER_OFF
    with pytest.raises(ExpectError, match="the run ended"):
        echo.console.expect(b"more")


def test_a_run_that_was_stopped_is_taken_up_with_its_console(echo: pykvm.Machine) -> None:
    for word in (b"ready", b"again", b"and again"):
        with echo.start(timeout=GENEROUS):
            echo.console.expect(word, GENEROUS)
        echo.console.write({b"ready": b"again", b"again": b"and again"}.get(word, b"."))
    assert echo.run(timeout=GENEROUS).reason == reasons.POWER_OFF


def test_the_example_of_the_documents_runs(tmp_path: Path) -> None:
    """docs/booting.md: the script there, with a kernel that needs no Linux to be talked to."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "booting.md").read_text()
    (script,) = re.findall(r"```python\n(# talk\.py.*?)```", text, re.DOTALL)
    (tmp_path / "vmlinuz").write_bytes(tiny_kernel.elf(tiny_kernel.ECHO))
    (tmp_path / "initrd.img").write_bytes(b"no archive")
    for name in ("vmlinuz", "initrd.img"):
        script = script.replace(f'"{name}"', repr(str(tmp_path / name)))
    script = script.replace("login: ", "ready\\n").replace("root\\n", "# .")
    told: dict[str, object] = {}
    exec(compile(script, "docs/booting.md", "exec"), told)
    result = told["result"]
    assert isinstance(result, pykvm.RunResult)
    assert result.reason == reasons.POWER_OFF
