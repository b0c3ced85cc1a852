"""The command line as far as it needs no KVM: words, numbers, exit codes, errors, pipes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pykvm
from pykvm import guestlib
from pykvm import result as reasons
from pykvm.cli import exitcodes
from pykvm.cli import run as run_module
from pykvm.cli.common import Count, Seconds, Size
from pykvm.cli.output import ConsoleOutput
from pykvm.result import RunResult
from tests.support import plain
from tests.support.command_line import invoke

COMMAND = [sys.executable, "-m", "pykvm"]

ENVIRONMENT = plain.environment()


def spawn(*args: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """Run the command line in a process of its own."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 60, **options}
    return subprocess.run([*COMMAND, *args], check=False, env=ENVIRONMENT, **options)


# ---- exit codes --------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", [r for r in reasons.REASONS if r != reasons.DEBUG_EXIT])
def test_every_reason_has_an_exit_code(reason: str) -> None:
    code = exitcodes.exit_code(RunResult(reason))
    assert (code == 0) == RunResult(reason).ok


def test_no_two_failures_share_an_exit_code() -> None:
    failures = [r for r in reasons.REASONS if not RunResult(r, code=0).ok]
    codes = [exitcodes.exit_code(RunResult(r)) for r in failures]
    assert len(set(codes)) == len(codes)
    assert not {exitcodes.ERROR, exitcodes.USAGE, exitcodes.BROKEN_PIPE} & set(codes)


@pytest.mark.parametrize(
    ("code", "status"), [(0, 0), (1, 201), (42, 242), (54, 254), (55, 255), (0xFFFFFFFF, 255)]
)
def test_a_debug_exit_code_shows_in_the_exit_code(code: int, status: int) -> None:
    assert exitcodes.exit_code(RunResult(reasons.DEBUG_EXIT, code=code)) == status


@given(st.integers(1, 0xFFFFFFFF))
def test_a_guests_own_code_is_never_taken_for_a_reason(code: int) -> None:
    others = {exitcodes.exit_code(RunResult(r)) for r in reasons.REASONS if r != "debug-exit"}
    others |= {exitcodes.ERROR, exitcodes.USAGE, exitcodes.BROKEN_PIPE}
    status = exitcodes.exit_code(RunResult(reasons.DEBUG_EXIT, code=code))
    assert 0 < status < 256
    assert status not in others


def test_the_table_of_exit_codes_is_complete_and_in_the_help() -> None:
    bases = ("GUEST", "SIGNALLED", "TYPE_CHECKING")
    values = [
        value
        for name, value in vars(exitcodes).items()
        if name.isupper() and type(value) is int and name not in bases
    ]
    listed = {code for code, _ in exitcodes.TABLE}
    assert {str(value) for value in values} <= listed
    shown = invoke("run", "--help").output
    for code, meaning in exitcodes.TABLE:
        assert code in shown
        assert meaning.split(":")[0] in shown


# ---- words and numbers -------------------------------------------------------------------------


def test_the_version_is_the_packages() -> None:
    assert invoke("--version").output == f"pykvm {pykvm.__version__}\n"
    assert spawn("--version").stdout.decode() == f"pykvm {pykvm.__version__}\n"


@pytest.mark.parametrize(
    ("text", "value"), [("4096", 4096), ("0x8000", 0x8000), ("2M", 2 << 20), ("1GiB", 1 << 30)]
)
def test_sizes_and_addresses_are_read_as_people_write_them(text: str, value: int) -> None:
    assert Size().convert(text, None, None) == value


@pytest.mark.parametrize(("text", "value"), [("10", 10), ("0x10", 16), ("0", 0)])
def test_counts_may_be_hexadecimal(text: str, value: int) -> None:
    assert Count(0).convert(text, None, None) == value


@pytest.mark.parametrize(
    ("text", "value"), [("0.5", 0.5), ("none", float("inf")), ("0", 0.0), ("1e-3", 0.001)]
)
def test_a_timeout_is_seconds_or_none(text: str, value: float) -> None:
    assert Seconds().convert(text, None, None) == value


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("--memory", "2MB"),
        ("--memory", "-4096"),
        ("--at", "0xzz"),
        ("--timeout", "-1"),
        ("--timeout", "nan"),
        ("--timeout", "soon"),
        ("--max-exits", "-1"),
        ("--max-exits", "1.5"),
        ("--cpus", "0"),
        ("--mode", "real32"),
        ("--ring", "1"),
        ("--iopl", "4"),
    ],
)
def test_a_bad_value_is_wrong_usage_that_names_the_option(option: str, text: str) -> None:
    result = invoke("run", "hello", option, text)
    assert result.exit_code == exitcodes.USAGE
    assert option in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("args", "file", "guest"),
    [
        (["hello"], None, "hello"),
        (["--ioctls", "hello"], "", "hello"),
        (["hello", "--ioctls"], "", "hello"),
        (["--ioctls=f", "hello"], "f", "hello"),
        (["--", "--ioctls"], None, "--ioctls"),
    ],
)
def test_ioctls_takes_a_file_only_with_an_equals_sign(
    args: list[str], file: str | None, guest: str
) -> None:
    params = run_module.run.make_context("run", args).params
    assert (params["ioctls"], params["guest"]) == (file, guest)


# ---- guests ------------------------------------------------------------------------------------


def test_guests_lists_every_guest_with_what_it_shows() -> None:
    lines = invoke("guests").output.splitlines()
    assert [line.split()[0] for line in lines] == guestlib.names()
    for line, name in zip(lines, guestlib.names(), strict=True):
        assert line.endswith(guestlib.find(name).summary)


def test_guests_as_json_tell_where_their_sources_are() -> None:
    found = {each["name"]: each for each in json.loads(invoke("guests", "--json").output)}
    assert set(found) == set(guestlib.names())
    assert Path(found["hello"]["source"]).name == "hello.S"
    assert Path(found["hello"]["source"]).is_file()
    assert found["hello"]["mode"] == "real16"
    for name, told in found.items():
        guest = guestlib.find(name)
        wanted = {"memory", "cpus", "irqchip", "pit", "pic"}  # of a machine, all that run() passes
        assert {each: told[each] for each in wanted} == {
            each: getattr(guest, each) for each in wanted
        }


def test_the_shell_is_offered_guests_and_files() -> None:
    items = run_module._complete(click.Context(run_module.run), None, "sm")  # type: ignore[arg-type]
    assert [item.value for item in items if item.type == "plain"] == ["smp", "smp-sipi"]
    assert [item.value for item in items if item.type == "file"] == ["sm"]


# ---- errors ------------------------------------------------------------------------------------


def test_an_unknown_guest_is_one_message_that_lists_the_guests() -> None:
    result = invoke("run", "helo")
    assert result.exit_code == exitcodes.ERROR
    assert result.stdout == ""
    assert result.stderr.startswith("pykvm: ")
    assert "'helo'" in result.stderr and "hello" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("args", [["--debug", "run", "helo"], ["run", "helo", "--debug"]])
def test_debug_shows_the_exception_itself(args: list[str]) -> None:
    assert isinstance(invoke(*args).exception, LookupError)


def test_without_kvm_the_message_says_what_to_do() -> None:
    result = invoke("run", "hello", "--device", "/nowhere/kvm")
    assert result.exit_code == exitcodes.ERROR
    first, *remedies = result.stderr.splitlines()
    assert first.startswith("pykvm: there is no /nowhere/kvm")
    assert remedies and all(line.startswith("  - ") for line in remedies)


def test_a_bug_is_not_dressed_up_as_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[str]:
        raise KeyError("nothing")

    monkeypatch.setattr(guestlib, "names", broken)
    assert isinstance(invoke("guests").exception, KeyError)


def test_ctrl_c_gives_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> list[str]:
        raise KeyboardInterrupt

    monkeypatch.setattr(guestlib, "names", interrupted)
    result = invoke("guests")
    assert result.exit_code == exitcodes.INTERRUPTED
    assert result.output == ""


def test_an_elf_file_is_not_moved(tmp_path: Path) -> None:
    file = tmp_path / "guest"
    file.write_bytes(b"\x7fELF and so on")
    result = invoke("run", str(file), "--at", "0x8000")
    assert result.exit_code == exitcodes.USAGE
    assert "--at" in result.stderr


# ---- output ------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [["guests"], ["doctor", "--device", "/nowhere"]])
def test_a_reader_that_has_left_is_no_error(args: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        done = spawn(*args, stdout=write)
    finally:
        os.close(write)
    assert done.returncode == exitcodes.BROKEN_PIPE
    assert done.stderr == b""


@pytest.mark.parametrize(
    "args", [["guests"], ["guests", "--json"], ["--help"], ["--version"], ["run", "--help"]]
)
def test_a_full_disk_is_one_message(args: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        done = spawn(*args, stdout=full)
    assert done.returncode == exitcodes.ERROR
    assert done.stderr == b"pykvm: No space left on device\n"


def test_the_console_writes_everything_to_a_descriptor_that_does_not_block() -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    sent = os.urandom(1 << 20)  # many times what a pipe holds
    got: list[bytes] = []

    def reader() -> None:
        while piece := os.read(read, 65536):
            got.append(piece)

    thread = threading.Thread(target=reader)
    thread.start()
    try:
        with ConsoleOutput(write) as output:
            output(sent)
        assert output.error is None
    finally:
        os.close(write)
        thread.join(60)
        os.close(read)
    assert b"".join(got) == sent


# ---- what a run is told to have done -----------------------------------------------------------


def guest(**said: Any) -> guestlib.Guest:
    return guestlib.Guest("g", Path("g"), Path("g"), **said)


@pytest.mark.parametrize(
    ("result", "said", "line"),
    [
        (
            RunResult("halted", exits=1, seconds=0.0012),
            {},
            "pykvm: g: halted after 1 exit, 1.2 ms",
        ),
        (
            RunResult("debug-exit", code=7, exits=20, seconds=5.0),
            {},
            "pykvm: g: debug-exit 7 after 20 exits, 5 s",
        ),
        (
            RunResult("shutdown", exits=2, seconds=1e-5),
            {"expected_reason": "shutdown"},
            "pykvm: g: shutdown after 2 exits, 0.01 ms, as it should",
        ),
        (
            RunResult("debug-exit", code=8, exits=2, seconds=1e-5),
            {"expected_reason": "debug-exit", "expected_code": 7},
            "pykvm: g: debug-exit 8 after 2 exits, 0.01 ms",
        ),
        (
            RunResult("halted", exits=2, seconds=1e-5, cpu=1),
            {"cpus": 2},
            "pykvm: g: halted on cpu 1 after 2 exits, 0.01 ms",
        ),
    ],
)
def test_the_closing_line_says_why_exits_and_time(
    result: RunResult, said: dict[str, Any], line: str
) -> None:
    assert run_module._headline(guest(**said), result) == line


# ---- what is loaded ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import pykvm, pykvm.doctor, pykvm.guestlib", {"click", "rich"}),
        ("from pykvm.cli.main import cli; cli(['guests'], standalone_mode=False)", {"rich"}),
    ],
)
def test_libraries_are_loaded_only_by_who_uses_them(code: str, absent: set[str]) -> None:
    script = f"{code}\nimport sys; print('LOADED', *sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    loaded = done.stdout.splitlines()[-1].split()
    assert loaded[0] == "LOADED"
    assert not absent & set(loaded)
