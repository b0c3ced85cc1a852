"""What all tests share: what happens without /dev/kvm, fixtures, and a watchdog against hanging.

Tests under ``tests/kvm`` and ``tests/guests`` need /dev/kvm and carry the marker ``needs_kvm``.
Without it they are skipped, with the reason; with ``--require-kvm`` the whole run fails at once
instead, and it also fails when every one of them was skipped.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import pytest

from tests.support.backend import describe_backend, kvm_problem
from tests.support.leaks import Holdings, assert_nothing_left

if TYPE_CHECKING:
    from pykvm.kvm import Kvm, Vcpu, Vm

# Where pytest sees this it explains every difference in full: of two disk images, for minutes,
# until the watchdog ends the run. What CI means to Hypothesis is in tests/unit/conftest.py.
ON_CI = bool(os.environ.pop("CI", "") + os.environ.pop("BUILD_NUMBER", ""))

_HERE = Path(__file__).parent
_NEED_KVM = (_HERE / "kvm", _HERE / "guests")
_STDERR = pytest.StashKey[TextIO]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("pykvm")
    group.addoption(
        "--require-kvm",
        action="store_true",
        help="fail, instead of skipping, when /dev/kvm cannot be used",
    )
    group.addoption(
        "--watchdog",
        type=float,
        metavar="SECONDS",
        default=float(os.environ.get("PYKVM_TEST_WATCHDOG", "120")),
        help="end the run, with all stacks, when one test takes longer; 0: never (%(default)s)",
    )


def pytest_configure(config: pytest.Config) -> None:
    for marker in (
        "needs_kvm: needs /dev/kvm; on all tests under tests/kvm and tests/guests",
        "cap(name, at_least=1): skip where KVM_CHECK_EXTENSION says less of this KVM_CAP_*",
        "sanitize: also run with the C part built under ASan and UBSan",
        "watchdog(seconds): this test may take longer than --watchdog",
    ):
        config.addinivalue_line("markers", marker)
    if "libasan" in os.environ.get("LD_PRELOAD", ""):
        # capstone is loaded with RTLD_DEEPBIND, and ASan ends a process that does that.
        for name in ("capstone", "unicorn"):
            sys.modules[name] = None  # type: ignore[assignment]
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # So it is for what a shell starts in the background; what tests start must get Ctrl-C.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Output is not yet captured here: this is the terminal, whatever a test does to fd 2.
    config.stash[_STDERR] = os.fdopen(os.dup(2), "w")
    problem = kvm_problem()
    if problem and config.getoption("--require-kvm"):
        raise pytest.UsageError(f"--require-kvm: {problem}")


def pytest_unconfigure(config: pytest.Config) -> None:
    if (stderr := config.stash.get(_STDERR, None)) is not None:
        stderr.close()


# -- KVM: needed, skipped, reported -------------------------------------------------------------


def pytest_report_header() -> str:
    problem = kvm_problem()
    return f"kvm: {problem}" if problem else f"kvm: {describe_backend()}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    problem = kvm_problem()
    for item in items:
        if any(item.path.is_relative_to(folder) for folder in _NEED_KVM):
            item.add_marker(pytest.mark.needs_kvm)
        if problem and item.get_closest_marker("needs_kvm"):
            item.add_marker(pytest.mark.skip(reason=problem))


def _count(reporter: pytest.TerminalReporter, *outcomes: str) -> int:
    return sum(
        "needs_kvm" in getattr(report, "keywords", {})
        for outcome in outcomes
        for report in reporter.stats.get(outcome, ())
    )


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or exitstatus != pytest.ExitCode.OK:
        return
    ran = _count(reporter, "passed", "failed", "error", "xfailed", "xpassed")
    skipped = _count(reporter, "skipped")
    if session.config.getoption("--require-kvm") and skipped and not ran:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    ran = _count(terminalreporter, "passed", "failed", "error", "xfailed", "xpassed")
    skipped = _count(terminalreporter, "skipped")
    where = kvm_problem() or describe_backend()
    terminalreporter.write_line(f"KVM tests: {ran} ran, {skipped} skipped ({where})")
    if terminalreporter.config.getoption("--require-kvm") and skipped and not ran:
        terminalreporter.write_line("--require-kvm: every KVM test was skipped: failed", red=True)


# -- a test that hangs ---------------------------------------------------------------------------


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Arm faulthandler's timer around each test: it prints all stacks and ends the process.

    Its thread is C's and needs no GIL, so it also ends a test stuck in an ioctl or holding the
    GIL, which a timer thread or a signal handler of Python's cannot.
    """
    marker = item.get_closest_marker("watchdog")
    seconds = float(marker.args[0]) if marker else item.config.getoption("--watchdog")
    if seconds <= 0 or item.config.getoption("usepdb"):
        return (yield)
    stderr = item.config.stash[_STDERR]
    faulthandler.dump_traceback_later(seconds, exit=True, file=stderr)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


# -- fixtures ------------------------------------------------------------------------------------


@pytest.fixture
def kvm() -> Iterator[Kvm]:
    """An open /dev/kvm, closed after the test."""
    from pykvm.kvm import Kvm

    with Kvm() as opened:
        yield opened


@pytest.fixture
def vm(kvm: Kvm) -> Iterator[Vm]:
    """An empty VM without an interrupt controller or memory."""
    with kvm.create_vm() as made:
        yield made


@pytest.fixture
def vcpu(vm: Vm) -> Iterator[Vcpu]:
    """vCPU 0 of ``vm``, in its reset state."""
    with vm.create_vcpu(0) as made:
        yield made


def _check_cap(name: str, at_least: int, of: Kvm | Vm) -> int:
    from pykvm._abi import lib

    value = of.check_extension(getattr(lib, name))
    if value < at_least:
        pytest.skip(f"KVM_CHECK_EXTENSION({name}) = {value}, the test needs {at_least}")
    return value


@pytest.fixture
def require_cap(kvm: Kvm) -> Callable[..., int]:
    """``require_cap("KVM_CAP_X", at_least=1, of=None)``: its value, or a skip naming the probe.

    ``of`` is the Kvm or Vm to ask; a VM may know better than the system does.
    """

    def require(name: str, at_least: int = 1, of: Kvm | Vm | None = None) -> int:
        return _check_cap(name, at_least, kvm if of is None else of)

    return require


@pytest.fixture(autouse=True)
def _skip_without_cap(request: pytest.FixtureRequest) -> None:
    markers = list(request.node.iter_markers("cap"))
    if not markers:
        return
    kvm: Kvm = request.getfixturevalue("kvm")
    for marker in markers:
        name, at_least = (*marker.args, 1)[:2]
        _check_cap(name, marker.kwargs.get("at_least", at_least), kvm)


@pytest.fixture
def no_leak(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail the test if it leaves a descriptor, a thread or a mapping of KVM's behind.

    Ask for it first, so that it is the last to look.
    """
    before = Holdings.now()
    yield
    if request.session.exitstatus != pytest.ExitCode.INTERRUPTED:  # Ctrl-C left it in the midst
        assert_nothing_left(before)
