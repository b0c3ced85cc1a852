"""One boot of the rig: QEMU emulating a machine with SVM, a command inside, its result outside."""

from __future__ import annotations

import codecs
import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .host import KernelImage, RigError

#: The time from the command's end to QEMU's own, after which it is killed, in seconds.
POWEROFF_PATIENCE = 15.0
#: The time that a killed QEMU may take to go.
KILL_PATIENCE = 30.0
_POLL = 0.05

#: Folders that are fresh tmpfs inside; what is needed from below them is bound back.
_COVERED = ("/tmp", "/run", "/dev/shm")

STAGE2 = Path(__file__).with_name("stage2.sh")


@dataclass(frozen=True)
class Machine:
    """The emulated hardware."""

    # QEMU serves several emulated CPUs one after the other here, so more are not faster.
    cpus: int = 1
    memory: str = "3G"
    # "max" has SVM and nested paging; five-level paging would only lengthen every emulated walk.
    # ERMS says that REP MOVSB is the fastest way to copy; emulated it goes byte by byte, and what
    # kernel and libc choose without it copies five times faster.
    cpu: str = "max,la57=off,erms=off"
    append: str = ""  # to the kernel's command line
    more: tuple[str, ...] = ()  # further arguments for QEMU


@dataclass(frozen=True)
class Outcome:
    """How a command inside the rig ended."""

    status: int  # of the command, as a shell gives it
    boot_seconds: float
    seconds: float


class TimedOut(RigError):
    """The time limit was over before the command."""


def binds(folders: Iterable[Path]) -> list[tuple[str, str]]:
    """What of ``folders`` a tmpfs would cover inside: real path and the path it is known by."""
    names = {name for folder in folders for name in (folder.absolute(), folder.resolve())}
    kept: list[Path] = []
    for name in sorted(names):  # an outer folder comes before what is in it
        covered = any(name.is_relative_to(top) for top in _COVERED)
        if covered and name.is_dir() and not any(name.is_relative_to(outer) for outer in kept):
            kept.append(name)
    return [(str(name.resolve()), str(name)) for name in kept]


def guest_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """The environment inside: little of the host's, nothing that writes beside the sources."""
    return {
        "PATH": f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin"
        ":/sbin:/bin",
        "HOME": "/tmp/home",
        "LANG": "C.UTF-8",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTEST_ADDOPTS": "-p no:cacheprovider",
        "HYPOTHESIS_STORAGE_DIRECTORY": "/tmp/hypothesis",
        "PYKVM_RIG": "1",
        "PYKVM_RIG_RESULTS": "/run/rig/results",
        # Python is some twenty times slower inside; less than the whole run may take, to be heard.
        "PYKVM_TEST_WATCHDOG": "240",
        **extra,
    }


def _command_script(command: Sequence[str], cwd: Path, environment: Mapping[str, str]) -> str:
    exports = "".join(
        f"export {name}={shlex.quote(value)}\n" for name, value in environment.items()
    )
    enter = f'mkdir -p "$HOME"\ncd {shlex.quote(str(cwd))} || exit 126\n'
    return f"{exports}{enter}{shlex.join(command)}\n"


def qemu_command(machine: Machine, kernel: KernelImage, initramfs: Path, run: Path) -> list[str]:
    """QEMU's command line: TCG, two 9p folders, a console into a file, no network."""
    share = "local,security_model=none,multidevs=remap"
    return [
        "qemu-system-x86_64",
        *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-monitor", "none"),
        # One thread for all CPUs. KVM patches the kernel's code (jump labels) whenever the first VM
        # comes or the last goes, and with a thread a CPU QEMU 7.2 now and then keeps a stale int3
        # of such a patch: both CPUs then trap for ever. Python inside is not slower for it.
        *("-machine", "q35", "-accel", "tcg,thread=single", "-cpu", machine.cpu),
        *("-smp", str(machine.cpus), "-m", machine.memory),
        *("-kernel", str(kernel.vmlinuz), "-initrd", str(initramfs)),
        "-append",
        # No watchdog may take a slow emulated CPU for a stuck one; a panic ends QEMU.
        "console=ttyS0 loglevel=6 panic=-1 nowatchdog mitigations=off no_timer_check "
        # And the tick never stops: without it all of it stood still now and then, no timer fired.
        "nohz=off highres=off "
        f"tsc=reliable random.trust_cpu=on rcupdate.rcu_expedited=1 {machine.append}".rstrip(),
        *("-chardev", f"file,id=console,path={_qemu_value(run / 'console.log')}"),
        *("-serial", "chardev:console"),
        *("-fsdev", f"{share},id=host,path=/,readonly=on"),
        *("-device", "virtio-9p-pci,fsdev=host,mount_tag=host"),
        *("-fsdev", f"{share},id=run,path={_qemu_value(run)}"),
        *("-device", "virtio-9p-pci,fsdev=run,mount_tag=run"),
        *machine.more,
    ]


def _qemu_value(path: Path) -> str:
    """A path inside an option of QEMU's, where a comma is written twice."""
    return str(path).replace(",", ",,")


class _Tail:
    """What was added to a file since it was last asked."""

    def __init__(self, path: Path, sink: Callable[[str], None]) -> None:
        self._path, self._sink, self._offset = path, sink, 0
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def pump(self) -> None:
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return
        self._offset += len(data)
        if text := self._decode(data):
            self._sink(text)


def last_lines(path: Path, count: int = 25) -> str:
    """The end of a log, indented, or a word that it is empty."""
    try:
        text = path.read_bytes().decode("utf-8", "replace")
    except FileNotFoundError:
        text = ""
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    return "\n".join(f"    {line}" for line in lines[-count:]) or "    (nothing)"


@contextlib.contextmanager
def _process_group(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run in a process group of its own, which is killed as a whole on the way out."""
    if setpriv := shutil.which("setpriv"):  # ... also when this process is killed outright
        command = [setpriv, "--pdeathsig", "KILL", *command]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(KILL_PATIENCE)


def _prepare(
    run: Path,
    command: Sequence[str],
    cwd: Path,
    shared: Sequence[Path],
    environment: Mapping[str, str],
) -> None:
    """Lay out in ``run`` what the scripts inside look for."""
    (run / "results").mkdir()
    (run / "command.sh").write_text(_command_script(command, cwd, environment), encoding="utf-8")
    shutil.copy(STAGE2, run / "stage2.sh")
    python = (Path(sys.prefix), Path(sys.base_prefix), Path(sys.executable).parent)
    lines = [f"{path}\n" for pair in binds((cwd, *python, *shared)) for path in pair]
    (run / "binds").write_text("".join(lines), encoding="utf-8")


def run_folder(cache: Path, keep: int = 8) -> Path:
    """A new folder for one run; what runs before the last few left is removed.

    A run that is still going on is younger than a day, and left alone.
    """
    runs = cache / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    newest_first = sorted(runs.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    for old in newest_first[keep:]:
        if (old / "status").exists() or old.stat().st_mtime < time.time() - 86400:
            shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(dir=runs, prefix=time.strftime("%Y%m%d-%H%M%S-")))


def boot(
    command: Sequence[str],
    *,
    run: Path,
    kernel: KernelImage,
    initramfs: Path,
    cwd: Path,
    shared: Sequence[Path] = (),
    environment: Mapping[str, str],
    timeout: float,
    machine: Machine,
    output: Callable[[str], None],
    console: Callable[[str], None],
) -> Outcome:
    """Boot, run ``command`` inside, and wait for it; never longer than ``timeout`` seconds.

    Raises:
        TimedOut: the guest was killed at the limit; what it printed so far was passed on.
        RigError: it did not boot, or ended without a status: with the console's last lines.
    """
    _prepare(run, command, cwd, shared, environment)
    tails = _Tail(run / "output.log", output), _Tail(run / "console.log", console)
    start = time.monotonic()
    booted = ended = 0.0
    with _process_group(qemu_command(machine, kernel, initramfs, run), run / "qemu.log") as qemu:
        while qemu.poll() is None:
            time.sleep(_POLL)
            now = time.monotonic()
            if not booted and (run / "started").exists():
                booted = now
            if not ended and (run / "status").exists():
                ended = now
            for tail in tails:
                tail.pump()
            if ended and now > ended + POWEROFF_PATIENCE:
                break
            if not ended and now > start + timeout:
                where = "while it ran the command" if booted else "before it had booted"
                raise TimedOut(
                    f"killed after {timeout:g} s, {where}; the console's last lines:\n"
                    + last_lines(run / "console.log")
                )
    for tail in tails:
        tail.pump()
    status = run / "status"
    if not status.exists():
        raise RigError(
            f"the guest ended ({qemu.returncode}) without a status; the console's last lines:\n"
            + last_lines(run / "console.log")
            + "\nQEMU said:\n"
            + last_lines(run / "qemu.log", 5)
        )
    end = time.monotonic()
    return Outcome(int(status.read_text()), booted - start, end - start)
