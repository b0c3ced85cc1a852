"""tests/conftest.py itself: what pytest does with it, in a process of its own on a small tree."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import plain

TESTS = Path(__file__).resolve().parents[1]

PASSES = "def test_it(): pass\n"
FAKE_KVM = """
import pytest

class FakeKvm:
    def check_extension(self, cap):
        return 2

@pytest.fixture
def kvm():
    return FakeKvm()
"""

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """``run(source, *options, device=…)``: pytest on one file in tests/kvm under our conftest."""
    tests = tmp_path / "tests"
    (tests / "kvm").mkdir(parents=True)
    shutil.copytree(TESTS / "support", tests / "support")
    shutil.copy(TESTS / "conftest.py", tests)
    for folder in (tests, tests / "kvm"):
        (folder / "__init__.py").touch()

    def run(
        source: str, *options: str, device: str = "/dev/null"
    ) -> subprocess.CompletedProcess[str]:
        (tests / "kvm" / "test_small.py").write_text(source)
        environment = plain.environment() | {
            "PYKVM_TEST_DEVICE": device,
            "PYTHONPATH": str(TESTS.parent),
            "PYTEST_ADDOPTS": "-p no:cacheprovider -p no:hypothesispytest -p no:randomly",
        }
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-ra", "--rootdir", str(tmp_path), *options, "tests"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=100,
        )

    return run


def test_without_kvm_its_tests_are_skipped_with_the_reason(run: Run) -> None:
    done = run(PASSES, device="/nowhere/kvm")
    assert done.returncode == 0
    assert "SKIPPED [1] tests/kvm/test_small.py: cannot open /nowhere/kvm: No such" in done.stdout
    assert "KVM tests: 0 ran, 1 skipped" in done.stdout


def test_require_kvm_fails_before_anything_runs(run: Run) -> None:
    done = run(PASSES, "--require-kvm", device="/nowhere/kvm")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--require-kvm: cannot open /nowhere/kvm: No such file" in done.stderr
    assert "test_small" not in done.stdout


def test_with_kvm_its_tests_run_and_are_counted(run: Run) -> None:
    done = run(PASSES, "--require-kvm")
    assert done.returncode == 0
    assert "KVM tests: 1 ran, 0 skipped" in done.stdout


def test_require_kvm_fails_when_every_test_skips_itself(run: Run) -> None:
    source = "import pytest\ndef test_it(): pytest.skip('no')\n"
    assert run(source).returncode == 0
    done = run(source, "--require-kvm")
    assert done.returncode == pytest.ExitCode.TESTS_FAILED
    assert "every KVM test was skipped" in done.stdout


def test_a_missing_capability_skips_and_names_the_probe(run: Run) -> None:
    source = FAKE_KVM + (
        "@pytest.mark.cap('KVM_CAP_USER_MEMORY', 3)\n"
        "def test_marked(): assert False\n"
        "@pytest.mark.cap('KVM_CAP_USER_MEMORY', at_least=2)\n"
        "def test_marked_and_there(): pass\n"
        "def test_asked(require_cap):\n"
        "    assert require_cap('KVM_CAP_USER_MEMORY') == 2\n"
        "    require_cap('KVM_CAP_NR_VCPUS', at_least=4)\n"
        "    assert False\n"
    )
    done = run(source)
    assert "1 passed, 2 skipped" in done.stdout
    assert "KVM_CHECK_EXTENSION(KVM_CAP_USER_MEMORY) = 2, the test needs 3" in done.stdout
    assert "KVM_CHECK_EXTENSION(KVM_CAP_NR_VCPUS) = 2, the test needs 4" in done.stdout


def test_a_test_that_hangs_ends_the_run_with_its_stack(run: Run) -> None:
    # In C, with the GIL held: no signal handler or thread of Python's could end it.
    source = "import ctypes\ndef test_stuck(): ctypes.PyDLL(None).sleep(60)\n"
    done = run(source, "--watchdog", "0.5")
    assert done.returncode != 0
    assert "Timeout" in done.stderr and "in test_stuck" in done.stderr


def test_a_test_may_ask_for_more_time(run: Run) -> None:
    source = (
        "import pytest, select\n"
        "@pytest.mark.watchdog(60)\n"
        "def test_slow(): select.select([], [], [], 0.5)\n"
    )
    assert run(source, "--watchdog", "0.1").returncode == 0


LEFT = {
    "os.eventfd(0)": "1 × fd anon_inode:[eventfd]",
    "os.pipe()": "2 × fd pipe",
    "threading.Thread(target=threading.Event().wait, daemon=True).start()": "1 × thread",
    "kept.append(mmap.mmap(memfd(), 4096))": "mapping /memfd:x",
}
CLOSED = """
    os.close(os.eventfd(0))
    thread = threading.Thread(target=len, args=('',)); thread.start(); thread.join()
"""


def test_what_a_test_leaves_behind_fails_it_and_what_it_closes_does_not(run: Run) -> None:
    source = (
        "import mmap, os, threading\nkept = []\n"
        "def memfd():\n    fd = os.memfd_create('x'); os.truncate(fd, 4096); return fd\n"
    )
    for number, body in enumerate((CLOSED, *LEFT)):
        source += f"def test_{number}(no_leak): {body}\n"
    done = run(source)
    assert done.returncode == 1
    assert re.findall(r"ERROR at teardown of (\w+)", done.stdout) == [
        f"test_{1 + number}" for number in range(len(LEFT))
    ]
    found = re.findall(r"^E +AssertionError: left behind: (.*)", done.stdout, re.M)
    for left, line in zip(LEFT.values(), found, strict=True):
        assert left in line


def test_ctrl_c_in_the_midst_of_a_test_is_no_leak_of_its(run: Run) -> None:
    source = "import os\ndef test_long(no_leak):\n    os.eventfd(0)\n    raise KeyboardInterrupt\n"
    done = run(source)
    assert done.returncode == pytest.ExitCode.INTERRUPTED
    assert "left behind" not in done.stdout + done.stderr and "Traceback" not in done.stderr
