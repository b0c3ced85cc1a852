"""``pykvm boot`` as a shell sees it: how it ends, and that its ends are never confused."""

from __future__ import annotations

import fcntl
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from pykvm import guestlib, suitability
from pykvm import result as reasons
from pykvm.cli import exitcodes
from pykvm.cli.main import cli
from pykvm.result import RunResult
from tests.support import linux_guest, tiny_kernel

GENEROUS = "60"
"""Seconds; a run that needs them hangs."""


class Done(NamedTuple):
    """What came of a command."""

    code: int
    out: bytes
    err: str


Boot = Callable[..., Done]


@pytest.fixture
def boot(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> Boot:
    """``boot(image, …)``: the command in this process (another takes seconds in the rig)."""

    def run(image: bytes | Path, *args: str) -> Done:
        path = image
        if isinstance(image, bytes):
            path = tmp_path / "kernel"
            path.write_bytes(image)
        words = ["boot", str(path), "--no-cache", "--memory", "16M", *args]
        with pytest.raises(SystemExit) as end:
            cli.main(words, prog_name="pykvm")
        assert isinstance(end.value.code, int)
        out, err = capfdbinary.readouterr()
        return Done(end.value.code, out, err.decode())

    return run


Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """``start(image, …)``: the command in a process of its own, running and killed at the end."""
    started: list[subprocess.Popen[bytes]] = []

    def popen(image: bytes, *args: str) -> subprocess.Popen[bytes]:
        (tmp_path / "kernel").write_bytes(image)
        words = [sys.executable, "-m", "pykvm", "boot", str(tmp_path / "kernel"), "--no-cache"]
        process = subprocess.Popen(
            [*words, "--memory", "16M", *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        started.append(process)
        return process

    yield popen
    for process in started:
        process.kill()
        process.communicate(timeout=60)


# ---- each end has a reason and an exit code of its own ----------------------------------------


@pytest.mark.parametrize("reason", tiny_kernel.ENDS)
def test_every_end_is_told_by_its_word_and_its_exit_code(boot: Boot, reason: str) -> None:
    seconds = "0.3" if reason == reasons.TIMEOUT else GENEROUS
    text = tiny_kernel.PRINT.format("hello\\n") + tiny_kernel.ENDS[reason]
    done = boot(tiny_kernel.elf(text), "--timeout", seconds)
    assert done.code == exitcodes.exit_code(RunResult(reason)), done.err
    assert done.err.startswith(f"pykvm: kernel: {reason} after ")
    assert done.out == b"hello\n"  # piped, it is what the guest wrote
    assert "Traceback" not in done.err


def test_a_triple_fault_after_a_panic_is_the_panic(boot: Boot) -> None:
    text = tiny_kernel.PRINT.format("Kernel panic - not syncing: no\\n")
    done = boot(tiny_kernel.elf(text + tiny_kernel.ENDS["shutdown"]), "--timeout", GENEROUS)
    assert done.code == exitcodes.PANIC
    assert "Kernel panic - not syncing: no" in done.err


def test_an_image_that_is_none_is_the_hosts_error(boot: Boot) -> None:
    done = boot(b"not a kernel at all" * 100)
    assert done.code == exitcodes.ERROR
    assert done.err.startswith("pykvm: ")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_reader_that_never_reads_does_not_keep_it(start: Start, number: int, code: int) -> None:
    """The pipe is full and the console's thread waits for room in it: the signal still ends it."""
    process = start(tiny_kernel.elf("mov al,'x'; mov dx,0x3f8; l: out dx,al; jmp l"))
    assert process.stdout is not None
    fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, 4096)  # one write fills it, of any length
    select.select([process.stdout], [], [])
    process.send_signal(number)
    assert process.wait(60) == code


def test_a_reader_that_has_left_ends_it_in_silence(start: Start) -> None:
    process = start(tiny_kernel.elf("mov al,'x'; mov dx,0x3f8; l: out dx,al; jmp l"))
    assert process.stdout is not None and process.stderr is not None
    assert os.read(process.stdout.fileno(), 1) == b"x"
    process.stdout.close()
    assert process.wait(60) == exitcodes.BROKEN_PIPE
    assert process.stderr.read() == b""


def test_piped_input_is_the_guests_and_its_end_is_not_the_guests_end(start: Start) -> None:
    process = start(tiny_kernel.elf(tiny_kernel.ECHO))
    out, err = process.communicate(b"a\x01x\x03b.", timeout=60)  # no key of ours among them
    assert out == b"ready\na\x01x\x03b"
    assert process.returncode == exitcodes.OK, err


# ---- a hang is told with its place ------------------------------------------------------------


def test_a_timeout_names_the_place_by_the_system_map(boot: Boot, tmp_path: Path) -> None:
    system_map = tmp_path / "System.map"
    system_map.write_text("0000000000200000 T startup_64\n0000000000300000 T far_away\n")
    text = "nop; " + tiny_kernel.PRINT.format("one\\ntwo\\n") + tiny_kernel.ENDS["timeout"]
    done = boot(tiny_kernel.elf(text), "--timeout", "0.3", "--system-map", str(system_map))
    assert done.code == exitcodes.TIMEOUT
    assert "<startup_64+0x" in done.err
    assert "IF=0 [eb fe" in done.err
    assert "  | one\n  | two\n" in done.err


def test_a_timeout_names_the_place_by_the_elf_files_own_symbols(boot: Boot) -> None:
    done = boot(guestlib.find("c-guest").path / "c-guest.elf", "--timeout", "0.3")
    assert done.code == exitcodes.TIMEOUT
    assert re.search(r"rip 0x10[0-9a-f]+ <\w+(\+0x[0-9a-f]+)?> ", done.err)


def test_a_system_map_that_is_none_is_told_before_anything_runs(boot: Boot, tmp_path: Path) -> None:
    (tmp_path / "System.map").write_text("this is none\n")
    kernel = tiny_kernel.elf(tiny_kernel.ENDS["timeout"])
    done = boot(kernel, "--timeout", "0.1", "--system-map", str(tmp_path / "System.map"))
    assert done.code in (exitcodes.ERROR, exitcodes.USAGE)
    assert "line 1 is no symbol" in done.err


def test_a_system_map_that_is_bad_further_down_does_not_lose_the_result(
    boot: Boot, tmp_path: Path
) -> None:
    (tmp_path / "System.map").write_text("0000000000200000 T startup_64\nnone\n")
    kernel = tiny_kernel.elf(tiny_kernel.ENDS["timeout"])
    done = boot(kernel, "--timeout", "0.1", "--system-map", str(tmp_path / "System.map"))
    assert done.code == exitcodes.TIMEOUT
    assert "rip 0x200000 IF=0" in done.err


def test_a_halt_with_interrupts_off_is_told(boot: Boot) -> None:
    done = boot(tiny_kernel.elf("cli; hlt"), "--timeout", "0.3", "--json")
    (cpu,) = json.loads(done.out)["cpus"]
    assert (cpu["halted"], cpu["interrupts"]) == (True, False)


def test_a_processor_that_nobody_has_started_is_told_apart_from_one_that_runs(boot: Boot) -> None:
    done = boot(tiny_kernel.elf(tiny_kernel.ENDS["timeout"]), "--timeout", "0.2", "--cpus", "2")
    assert "cpu 0 running at rip 0x200000 IF=0" in done.err
    assert "cpu 1 not started: it waits for its start-up IPI" in done.err


def test_verbose_tells_the_phases(boot: Boot) -> None:
    text = tiny_kernel.PRINT.format("x") + tiny_kernel.POWER_OFF
    done = boot(tiny_kernel.bzimage(text), "--verbose", "--timeout", GENEROUS)
    for phase in ("read", "unpack", "load", "first_instruction", "first_byte"):
        assert f"{phase} 0." in done.err.splitlines()[-1]


# ---- a KVM that cannot run stock kernels ------------------------------------------------------


@pytest.fixture
def emulated() -> None:
    if not suitability.ring0_is_emulated():
        pytest.skip(f"{suitability.PROBE} ran in ring 0: it is native, and stock kernels boot")


def test_the_probe_agrees_with_the_speed_of_ring_0() -> None:
    assert suitability.ring0_is_emulated() != linux_guest.ring0_is_native()


def test_where_ring_0_is_emulated_a_stock_kernel_is_given_up_soon_and_told_why(
    emulated: None, boot: Boot
) -> None:
    began = time.monotonic()
    done = boot(_debian(), "--memory", "256M")
    assert time.monotonic() - began < 30  # and not its timeout: it has none
    assert done.code == exitcodes.UNSUPPORTED
    assert "this KVM cannot run stock kernels: ring 0, where they run, is emulated (" in done.err
    assert "CMPXCHG16B" in done.err
    assert "`pykvm doctor`" in done.err
    assert "cpu 0 running at rip 0x" in done.err


def _debian() -> Path:
    from tests.rig import host

    found = linux_guest.kernels() or linux_guest.kernels(host.default_cache())
    if "cloud" not in found:
        pytest.skip("no Debian kernel: python -m tests.rig --setup-only fetches them")
    return found["cloud"]


def test_a_kernel_that_spins_is_given_up_only_where_ring_0_is_emulated(boot: Boot) -> None:
    done = boot(tiny_kernel.bzimage("spin: jmp spin"), "--timeout", "3")
    native = not suitability.ring0_is_emulated()
    assert done.code == (exitcodes.TIMEOUT if native else exitcodes.UNSUPPORTED), done.err
    assert ("cannot run stock kernels" in done.err) != native


def test_force_goes_on_and_the_failure_still_tells_why(emulated: None, boot: Boot) -> None:
    spinning = tiny_kernel.bzimage("spin: jmp spin")
    done = boot(spinning, "--force", "--timeout", "1.5")
    assert done.code == exitcodes.TIMEOUT
    assert "this KVM cannot run stock kernels" in done.err
    done = boot(tiny_kernel.bzimage("lock cmpxchg16b [rsp]; hlt"), "--force", "--timeout", GENEROUS)
    assert done.code == exitcodes.INTERNAL_ERROR
    assert done.err.index("cannot run stock kernels") < done.err.index("(CMPXCHG16B)")


def test_a_small_kernel_made_by_hand_is_nobodys_doubt(boot: Boot) -> None:
    done = boot(tiny_kernel.elf("spin: jmp spin"), "--timeout", "1.5")
    assert done.code == exitcodes.TIMEOUT
    assert "stock" not in done.err
