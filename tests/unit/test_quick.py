"""The quick reading of ``pykvm boot``'s command line: what it takes, click takes for the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykvm.cli import quick
from pykvm.cli.boot import boot
from tests.support.waiting import PATIENCE

HERE = str(Path(__file__))
TEXT = st.text("ab0=- ,.x", max_size=6)
VALUES = {
    "--initrd": st.sampled_from([HERE, "/nowhere", "/", ""]),
    "--append": TEXT,
    "--memory": st.sampled_from(["1M", "0x100000", "12", "1Q", "", "0"]),
    "--cpus": st.sampled_from(["1", "2", "0x3", "0", "-1", "x"]),
    "--cpu-features": TEXT,
    "--protocol": st.sampled_from(["auto", "bzimage", "vmlinux", "pvh", "multiboot", "Auto", ""]),
    "--irqchip": st.sampled_from(["kernel", "split", "none"]),
    "--system-map": st.sampled_from([HERE, "/nowhere"]),
    "--timeout": st.sampled_from(["0", "1.5", "none", "nan", "inf", "-1", "x"]),
    "--device": st.just("/dev/other"),
    "--ioctls": st.just("x"),
}
FLAGS = ["--kaslr", "--no-cache", "--force", "-v", "--verbose", "--json", "--debug", "--help", "--"]


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """Words as users might give them, right or wrong."""
    words: list[str] = []
    for _ in range(draw(st.integers(0, 5))):
        kind = draw(st.integers(0, 5))
        if kind == 0:
            words.append(draw(st.sampled_from([HERE, HERE, "/nowhere", "/", "--nonsense"])))
        elif kind == 1:
            words.append(draw(st.sampled_from(FLAGS)))
        else:
            name = draw(st.sampled_from(sorted(VALUES)))
            value = draw(VALUES[name])
            words += [f"{name}={value}"] if kind == 2 else [name, value]
    return [*words, *draw(st.sampled_from([[HERE], [HERE], []]))]


def by_click(words: list[str]) -> dict[str, Any]:
    params = dict(boot.make_context("boot", list(words)).params)
    assert params.pop("ioctls") is None
    return params


@given(command_lines())
def test_what_is_taken_means_to_click_the_same(words: list[str]) -> None:
    taken = quick.parse(words)
    if taken is not None:
        assert taken == by_click(words)


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--initrd", HERE, "--append", "console=ttyS0 quiet"],
        ["--memory=256M", "--cpus", "2", "--timeout=1.5", "-v"],
        ["--kaslr", "--no-cache", "--force", "--protocol", "bzimage", "--irqchip=split"],
        ["--cpu-features=+x2apic", "--system-map", HERE, "--device", "/dev/other"],
    ],
)
def test_what_is_plain_is_taken(more: list[str]) -> None:
    assert quick.parse([HERE, *more]) == by_click([HERE, *more])
    assert quick.parse([*more, HERE]) == by_click([HERE, *more])


@pytest.mark.parametrize(
    "words",
    [
        [], ["--help"], [HERE, "--json"], [HERE, HERE], [HERE, "--cpus", "0"], ["/nowhere"], ["/"],
        [HERE, "--memory"], [HERE, "--memory", "1Q"], [HERE, "--timeout", "nan"], ["--", HERE],
        [HERE, "--cpus", "1", "--cpus", "2"], [HERE, "--append", "-x"], [HERE, "--ioctls"],
    ],
)  # fmt: skip
def test_the_rest_is_left_to_click(words: list[str]) -> None:
    assert quick.parse(words) is None


def test_every_option_is_known_or_click_s_on_purpose() -> None:
    known = {*quick._VALUES, *quick._FLAGS}
    options = {
        name for param in boot.params if isinstance(param, click.Option) for name in param.opts
    }
    assert known <= options
    assert options - known == {
        "--disk", "--test-devices", "--ioctls", "--gdb", "--gdb-anywhere", "--trace",
        "--trace-filter", "--json", "--debug",
    }  # fmt: skip


def run(*words: str) -> tuple[int, str, set[str]]:
    """``pykvm`` in a process of its own: its status, its message, and what it loaded."""
    code = (
        "import atexit, sys\n"
        "atexit.register(lambda: print(*sorted(sys.modules)))\n"
        "from pykvm.cli.quick import main; main()"
    )
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    return done.returncode, done.stderr, set(done.stdout.split())


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_an_error_is_told_alike_with_click_and_without(tmp_path: Path, more: list[str]) -> None:
    status, message, loaded = run("boot", HERE, "--device", str(tmp_path / "kvm"), *more)
    assert status == 1
    assert message.startswith("pykvm: ") and str(tmp_path / "kvm") in message
    assert ("click" in loaded) == bool(more)


def test_what_a_machine_cannot_be_is_told_as_wrong_usage() -> None:
    status, message, _ = run("boot", HERE, "--cpu-features", "nonsense")
    assert status in (1, 2)  # 1 without KVM
    assert status == 1 or message.startswith("Usage: ")
