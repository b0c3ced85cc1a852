"""``pykvm run`` and ``pykvm doctor`` on the KVM that is here, as a shell would see them."""

from __future__ import annotations

import fcntl
import json
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pykvm import guestlib
from pykvm.cli import exitcodes
from pykvm.cli.main import cli
from pykvm.result import RunResult
from tests.support import plain

COMMAND = [sys.executable, "-m", "pykvm"]

ENVIRONMENT = plain.environment()

HALT = b"\xf4"
LOOP = b"\xeb\xfe"
OUT = b"\xe6\xe9"  # out 0xe9, al
EXIT = b"\xe6\xf4"  # out 0xf4, al


def mov_al(value: int) -> bytes:
    return bytes([0xB0, value])


@pytest.fixture
def flat(tmp_path: Path) -> Callable[[bytes], str]:
    """``flat(code)``: the path of a flat binary."""

    def write(code: bytes) -> str:
        file = tmp_path / "guest.bin"
        file.write_bytes(code)
        return str(file)

    return write


class Done(NamedTuple):
    """What came of a command."""

    returncode: int | str | None
    stdout: bytes
    stderr: bytes


Pykvm = Callable[..., Done]


@pytest.fixture
def pykvm(capfdbinary: pytest.CaptureFixture[bytes]) -> Callable[..., Done]:
    """``pykvm("run", …)``: the command line, in this process (another takes seconds in the rig)."""

    def run(*args: str) -> Done:
        with pytest.raises(SystemExit) as end:
            cli.main(list(args), prog_name="pykvm")
        return Done(end.value.code, *capfdbinary.readouterr())

    return run


def spawn(*args: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """Run the command line in a process of its own."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 100, **options}
    return subprocess.run([*COMMAND, *args], check=False, env=ENVIRONMENT, **options)


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """``start("run", …)``: the command line, running; killed at the end."""
    started: list[subprocess.Popen[bytes]] = []

    def popen(*args: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [*COMMAND, *args], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        started.append(process)
        return process

    yield popen
    for process in started:
        process.kill()
        process.communicate(timeout=60)


# ---- what it is for ----------------------------------------------------------------------------


def test_hello_says_hello_and_why_it_ended() -> None:
    done = spawn("run", "hello")
    assert done.stdout == b"Hello, KVM!\n"
    assert re.fullmatch(rb"pykvm: hello: halted after 13 exits, [0-9.e+]+ m?s\n", done.stderr), (
        done.stderr
    )
    assert done.returncode == 0


@pytest.mark.parametrize("name", guestlib.names())
def test_every_guest_keeps_its_promise_on_the_command_line(pykvm: Pykvm, name: str) -> None:
    guest = guestlib.find(name)
    output, _ = guestlib.run_guest(guest, timeout=60)  # what it should be, tests/guests know
    done = pykvm("run", name, "--timeout", "60")
    assert done.stdout.decode("latin-1") == output, done.stderr
    expected = RunResult(guest.expected_reason or "", code=guest.expected_code)
    assert done.returncode == exitcodes.exit_code(expected)


def test_the_console_is_byte_exact(pykvm: Pykvm, flat: Callable[[bytes], str]) -> None:
    # l: out 0xe9, al; inc al; jnz l; hlt
    done = pykvm("run", flat(mov_al(0) + OUT + bytes.fromhex("fec0 75fa") + HALT))
    assert done.stdout == bytes(range(256))


def test_a_wide_write_to_the_console_is_all_its_bytes(
    pykvm: Pykvm, flat: Callable[[bytes], str]
) -> None:
    # mov eax, "abcd"; out 0xe9, eax
    done = pykvm("run", flat(b"\xb8abcd" + bytes.fromhex("e7e9") + HALT))
    assert done.stdout == b"abcd"


ENDING = [
    (signal.SIGINT, b"interrupted", exitcodes.INTERRUPTED),
    (signal.SIGTERM, b"terminated 15", exitcodes.TERMINATED),
    (signal.SIGHUP, b"terminated 1", exitcodes.HANGUP),
]


@pytest.mark.parametrize(("number", "said", "code"), ENDING)
def test_the_console_is_live_and_a_signal_ends_the_run(
    flat: Callable[[bytes], str],
    start: Callable[..., subprocess.Popen[bytes]],
    number: int,
    said: bytes,
    code: int,
) -> None:
    process = start("run", "--timeout", "none", flat(mov_al(0x41) + OUT + LOOP))
    assert process.stdout is not None
    assert os.read(process.stdout.fileno(), 10) == b"A"  # and it runs on
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert b"guest.bin: " + said + b" after 1 exit" in stderr
    # In the loop, or still at the OUT, which is complete only when the guest is entered again.
    assert re.search(rb"cpu 0 running at rip 0x800[24] ", stderr)
    assert b"Traceback" not in stderr


@pytest.mark.parametrize(("number", "code"), [(number, code) for number, _, code in ENDING])
def test_a_reader_that_never_reads_does_not_keep_the_run(
    flat: Callable[[bytes], str],
    start: Callable[..., subprocess.Popen[bytes]],
    number: int,
    code: int,
) -> None:
    process = start("run", "--timeout", "none", flat(OUT + b"\xeb\xfc"))
    assert process.stdout is not None
    fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, 4096)  # soon full
    select.select([process.stdout], [], [])
    process.send_signal(number)
    assert process.wait(60) == code


def test_a_reader_that_has_left_ends_the_run_in_silence(
    flat: Callable[[bytes], str], start: Callable[..., subprocess.Popen[bytes]]
) -> None:
    process = start("run", "--timeout", "none", flat(OUT + b"\xeb\xfc"))
    assert process.stdout is not None
    assert os.read(process.stdout.fileno(), 5)
    process.stdout.close()
    assert process.wait(60) == exitcodes.BROKEN_PIPE
    assert process.stderr is not None
    assert process.stderr.read() == b""


def test_a_full_disk_ends_the_run_with_one_message() -> None:
    with open("/dev/full", "wb") as full:
        done = spawn("run", "hello", stdout=full)
    assert done.returncode == exitcodes.ERROR
    assert done.stderr == b"pykvm: No space left on device\n"


@pytest.mark.parametrize(("code", "status"), [(HALT, 0), (b"\xb0\x05" + EXIT + HALT, 205)])
def test_who_cannot_be_told_why_it_ended_has_the_exit_code(
    flat: Callable[[bytes], str], code: bytes, status: int
) -> None:
    image = flat(b"\xb0A" + OUT + code)
    with open("/dev/full", "wb") as full:
        done = spawn("run", image, stderr=full)
    assert (done.returncode, done.stdout) == (status, b"A")
    line = shlex.join([*COMMAND, "run", image]) + " 2>&-"
    closed = subprocess.run(["sh", "-c", line], capture_output=True, env=ENVIRONMENT, check=False)
    assert (closed.returncode, closed.stdout) == (status, b"A")  # nor told on standard output


# ---- exit codes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "args", "status", "words"),
    [
        (HALT, [], 0, b"halted"),
        (mov_al(0) + EXIT, [], 0, b"debug-exit 0"),
        (mov_al(7) + EXIT, [], 207, b"debug-exit 7"),
        (mov_al(200) + EXIT, [], 255, b"debug-exit 200"),
        (LOOP, ["--timeout", "0.05"], 124, b"timeout"),
        (OUT + b"\xeb\xfc", ["--max-exits", "0x10"], 6, b"limit after 16 exits"),
        (bytes.fromhex("e455"), [], 7, b"unclaimed <in 0x55, 1 byte>"),
        (b"\x0f\x0b", [], 3, b"shutdown"),  # ud2, and no IDT
    ],
)
def test_the_exit_code_tells_the_reason(
    pykvm: Pykvm,
    flat: Callable[[bytes], str],
    code: bytes,
    args: list[str],
    status: int,
    words: bytes,
) -> None:
    done = pykvm("run", flat(code), *args)
    assert done.returncode == status, done.stderr
    assert words in done.stderr
    assert b"Traceback" not in done.stderr


def test_a_triple_fault_comes_with_its_explanation(
    pykvm: Pykvm, flat: Callable[[bytes], str]
) -> None:
    stderr = pykvm("run", flat(b"\x0f\x0b")).stderr.decode()
    assert "triple-faulted" in stderr
    assert "code at CS:RIP" in stderr  # where SVM has reset the vCPU by now, it is not the guest's


# ---- options -----------------------------------------------------------------------------------


def test_json_has_the_result_and_the_output(pykvm: Pykvm) -> None:
    done = pykvm("run", "hello", "--json")
    data = json.loads(done.stdout)
    assert done.stderr == b""
    assert data.pop("seconds") > 0
    assert data == {
        "guest": "hello", "reason": "halted", "code": None, "exit_code": 0, "exits": 13, "cpu": 0,
        "exit": "HltExit()", "cpus": [], "devices": {}, "error": None, "console": "Hello, KVM!\n",
    }  # fmt: skip


def test_json_keeps_bytes_that_are_no_text(pykvm: Pykvm, flat: Callable[[bytes], str]) -> None:
    code = flat(mov_al(0xFF) + OUT + mov_al(0x41) + OUT + LOOP)
    done = pykvm("run", code, "--json", "--timeout", "0.05")
    data = json.loads(done.stdout)
    assert data["console"].encode("utf-8", "surrogateescape") == b"\xffA"
    assert (data["reason"], data["exit_code"]) == ("timeout", done.returncode)
    assert data["cpus"] == [
        {"index": 0, "rip": 0x8008, "code": data["cpus"][0]["code"], "halted": False,
         "interrupts": False}
    ]  # fmt: skip
    assert data["cpus"][0]["code"].startswith(LOOP.hex())


def test_ioctls_go_to_standard_error_or_into_a_file(pykvm: Pykvm, tmp_path: Path) -> None:
    shown = pykvm("run", "--ioctls", "hello")
    assert shown.stdout == b"Hello, KVM!\n"
    assert b"KVM_CREATE_VM" in shown.stderr
    assert b"KVM_SET_USER_MEMORY_REGION, {slot=0" in shown.stderr
    file = tmp_path / "trace"
    written = pykvm("run", f"--ioctls={file}", "hello")
    assert written.stderr.count(b"\n") == 1
    lines = file.read_text().splitlines()
    assert sum("KVM_RUN" in line for line in lines) == 13
    assert "HltExit" in lines[-1]


@pytest.mark.parametrize(("ring", "status"), [("0", 0), ("3", 203)])
def test_ring_sets_the_privilege_level_and_what_it_needs_to_end(
    pykvm: Pykvm, flat: Callable[[bytes], str], ring: str, status: int
) -> None:
    # mov eax, cs; and al, 3; out 0xf4, al
    done = pykvm("run", flat(bytes.fromhex("8cc8 2403") + EXIT), "--ring", ring)
    assert done.returncode == status, done.stderr


def test_a_flat_image_is_loaded_and_entered_where_at_says(
    pykvm: Pykvm, flat: Callable[[bytes], str]
) -> None:
    # lea rax, [rip]; shr eax, 12; out 0xf4, al
    code = flat(bytes.fromhex("488d0500000000 c1e80c") + EXIT)
    assert pykvm("run", code).returncode == 208
    assert pykvm("run", code, "--at", "0x12000").returncode == 218
    assert pykvm("run", code, "--at", "64K").returncode == 216


def test_mode_chooses_how_the_code_is_read(pykvm: Pykvm, flat: Callable[[bytes], str]) -> None:
    # 48: dec eax in 16 and 32 bits, a prefix in 64; ff c0: inc eax, or with the prefix inc rax
    code = flat(bytes.fromhex("b000") + bytes.fromhex("48ffc0") + EXIT)
    assert pykvm("run", code, "--mode", "prot32").returncode == 0
    assert pykvm("run", code, "--mode", "real16").returncode == 0
    assert pykvm("run", code, "--mode", "long64").returncode == 201


def test_cpus_and_memory_are_what_was_asked_for(pykvm: Pykvm, flat: Callable[[bytes], str]) -> None:
    done = pykvm("run", "smp", "--cpus", "1", "--timeout", "60")
    assert b"processor 0" in done.stdout
    assert b"processor 1" not in done.stdout
    code = flat(b"\xa0" + (0x2FFFFF).to_bytes(8, "little") + HALT)  # mov al, [0x2fffff]
    assert pykvm("run", code).returncode == exitcodes.UNCLAIMED
    assert pykvm("run", code, "--memory", "3M").returncode == 0


# ---- images that are none ----------------------------------------------------------------------


def test_a_malformed_elf_file_is_one_message_that_names_it(pykvm: Pykvm, tmp_path: Path) -> None:
    file = tmp_path / "broken"
    image = (guestlib.find("c-guest").path / "c-guest.elf").read_bytes()
    file.write_bytes(image[:200])
    done = pykvm("run", str(file))
    assert done.returncode == exitcodes.ERROR
    assert done.stderr.startswith(b"pykvm: broken: ")
    assert b"expected" in done.stderr
    assert b"Traceback" not in done.stderr


def test_an_elf_file_runs_by_its_path(pykvm: Pykvm) -> None:
    file = guestlib.find("c-guest").path / "c-guest.elf"
    done = pykvm("run", str(file), "--ring", "3", "--memory", "4M", "--timeout", "60")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"Hello from C!\n")


@pytest.mark.skipif(shutil.which("as") is None, reason="needs as (binutils)")
def test_a_source_is_assembled_and_run_and_its_errors_are_told(
    pykvm: Pykvm, tmp_path: Path
) -> None:
    file = tmp_path / "mine.S"
    file.write_text("mov al, 5\nout 0xf4, al\n")
    assert pykvm("run", str(file)).returncode == 205
    file.write_text("mov al, 5\nfrobnicate al\n")
    done = pykvm("run", str(file))
    assert done.returncode == exitcodes.ERROR
    assert b"pykvm: mine.S: line 2: " in done.stderr
    assert b"frobnicate al" in done.stderr


def test_a_source_without_an_assembler_says_what_to_install(
    pykvm: Pykvm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mine.S"
    file.write_text("hlt\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    done = pykvm("run", str(file))
    assert done.returncode == exitcodes.ERROR
    assert b"binutils" in done.stderr


def test_an_image_that_does_not_fit_says_where_the_memory_ends(pykvm: Pykvm) -> None:
    done = pykvm("run", "hello", "--at", "0x1ffff0")
    assert done.returncode == exitcodes.ERROR
    assert b"0x1fffff" in done.stderr


@pytest.mark.parametrize("args", [["--ring", "3"], ["--memory", "5000"], ["--cpus", "100000"]])
def test_what_the_machine_refuses_is_wrong_usage(pykvm: Pykvm, args: list[str]) -> None:
    done = pykvm("run", "hello", *args)  # hello runs in real mode
    assert done.returncode == exitcodes.USAGE
    assert b"Error: " in done.stderr
    assert b"Traceback" not in done.stderr


# ---- doctor ------------------------------------------------------------------------------------


def test_doctor_finds_this_kvm_usable(pykvm: Pykvm) -> None:
    done = pykvm("doctor")
    assert done.returncode == 0
    text = done.stdout.decode()
    assert "KVM can be used here." in text
    assert "port write, served in C" in text
    assert "an instruction" in text
    assert "Not found out" not in text


def test_doctor_as_json_is_complete(pykvm: Pykvm) -> None:
    done = pykvm("doctor", "--json")
    data = json.loads(done.stdout)
    assert data["usable"] is True
    assert data["failed"] == {}
    assert data["ring0"]["verdict"] in ("native", "emulated")
    assert data["costs"]["pio_c"]["ns"] > 0
    assert "KVM_CAP_USER_MEMORY" in data["capabilities"]["present"]
