"""What the benches of booting share: Debian's cloud kernel, a busybox to boot, and QEMU beside us.

They need a KVM that runs ring 0 natively and the kernels that ``tests/rig`` fetches, so they are
run there: ``python -m tests.rig -- python benches/run.py boot-warm``.
"""

from __future__ import annotations

import gzip
import os
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

from benches.measure import BenchError, NotHere
from pykvm.suitability import ring0_is_emulated
from tests.rig.initramfs import cpio

MARKER = b"MARKER: user space"
END = b"MARKER: end"
CMDLINE = "console=ttyS0 panic=-1 quiet"
MEMORY = "256M"
PATIENCE = 180.0
"""Seconds that one boot may take."""

INIT = f"""\
#!/bin/busybox sh
echo "{MARKER.decode()}"
[ -f /blob ] && busybox cat /blob && echo "{END.decode()}"
exec busybox poweroff -f
"""

PLAIN = "microvm"
"""As it comes. It has no clock in CMOS then, and Linux spends seconds on looking for one."""
TUNED = "microvm,pit=on,pic=off,rtc=on,auto-kernel-cmdline=off"
"""The best found: with PIT and RTC, so that Linux waits for neither, and without the PIC; of
x-option-roms=off, acpi=off and pit=off the first makes no difference, the second hangs Debian's
kernel, the third costs seconds."""


def qemu(machine: str, kernel: Path, initrd: Path) -> list[str]:
    """QEMU's whole command line."""
    return [
        *("qemu-system-x86_64", "-accel", "kvm", "-M", machine, "-cpu", "host", "-m", MEMORY),
        *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio"),
        *("-kernel", str(kernel), "-initrd", str(initrd), "-append", CMDLINE),
    ]


def pykvm_boot(kernel: Path, *more: str) -> list[str]:
    """``pykvm boot``, started as its console script would be."""
    start = "from pykvm.cli.quick import main; main()"
    return [sys.executable, "-c", start, "boot", str(kernel), "--memory", MEMORY, *more]


def pykvm(kernel: Path, initrd: Path) -> list[str]:
    """``pykvm boot`` of the same."""
    return pykvm_boot(kernel, "--initrd", str(initrd), "--append", CMDLINE)


@contextmanager
def folder() -> Iterator[Path]:
    """A scratch folder; gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="pykvm-bench-") as made:
        yield Path(made)


def environment(scratch: Path) -> dict[str, str]:
    """This checkout's pykvm with its bytecode kept, as where it is installed; caches in a folder of
    ours."""
    checkout = str(Path(__file__).resolve().parents[1])
    paths = [checkout, *filter(None, [os.environ.get("PYTHONPATH")])]
    made = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONPYCACHEPREFIX": str(scratch / "bytecode"),
        "XDG_CACHE_HOME": str(scratch / "cache"),
    }
    made.pop("PYTHONDONTWRITEBYTECODE", None)
    return made


def cloud_kernel(native: bool = True) -> Path:
    """The image that the rig fetched.

    Args:
        native: it is to run, which takes a KVM that does not emulate ring 0.

    Raises:
        NotHere: ``PYKVM_KERNELS`` names none, or this KVM is too slow, or there is no QEMU.
    """
    images = sorted(
        Path(os.environ.get("PYKVM_KERNELS", "/nowhere")).glob("*/boot/vmlinuz-*cloud*")
    )
    if not images:
        raise NotHere("PYKVM_KERNELS names no folder with a cloud kernel: run it in tests/rig")
    for program in ("qemu-system-x86_64", "busybox"):
        if not shutil.which(program):
            raise NotHere(f"{program} is not installed")
    if native and ring0_is_emulated():
        raise NotHere("this KVM emulates ring 0, which takes minutes over a stock kernel")
    return images[-1]


def forget_unpacked(scratch: Path) -> None:
    """Empty the cache of unpacked kernels."""
    shutil.rmtree(scratch / "cache", ignore_errors=True)


def make_initrd(path: Path, blob: bytes = b"") -> Path:
    """A gzipped cpio of busybox and an init that prints the marker, the blob, and powers off."""
    busybox = shutil.which("busybox")
    assert busybox is not None
    entries = [
        ("bin", 0o040755, b""),
        ("bin/busybox", 0o100755, Path(busybox).read_bytes()),
        ("init", 0o100755, INIT.encode()),
    ]
    if blob:
        entries.append(("blob", 0o100644, blob))
    path.write_bytes(gzip.compress(b"".join(cpio(entries)), 1))
    return path


def watch(
    command: Sequence[str],
    environment: Mapping[str, str],
    marks: Sequence[bytes],
    *,
    to_end: bool = True,
    errors_too: bool = False,
) -> list[tuple[float, int]]:
    """Run a program, and note when each mark came through the pipe.

    Args:
        command: what to run.
        environment: its environment.
        marks: what to look for in its output, in this order.
        to_end: let it end by itself; else it is killed at the last mark.
        errors_too: its standard error is output, too.

    Returns:
        Of each mark, in order: seconds since the process was started, and where in the output.
    """
    start = perf_counter()
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if errors_too else subprocess.PIPE,
        env=environment,
        bufsize=0,
    )
    with child:
        assert child.stdout is not None
        try:
            found, output = _follow(child.stdout.fileno(), start, marks, to_end)
        finally:
            child.kill()
        errors = child.stderr.read().decode(errors="replace") if child.stderr else ""
    if len(found) < len(marks):
        tail = output[-500:].decode(errors="replace")
        raise BenchError(f"{' '.join(command)}: no {marks[len(found)]!r} in:\n{tail}\n{errors}")
    return found


def _follow(
    fd: int, start: float, marks: Sequence[bytes], to_end: bool
) -> tuple[list[tuple[float, int]], bytes]:
    output = bytearray()
    found: list[tuple[float, int]] = []
    while (left := start + PATIENCE - perf_counter()) > 0 and (to_end or len(found) < len(marks)):
        if not select.select([fd], [], [], left)[0]:
            break
        data = os.read(fd, 1 << 16)
        now = perf_counter() - start
        if not data:
            break
        output += data
        while len(found) < len(marks):
            at = output.find(marks[len(found)], found[-1][1] if found else 0)
            if at < 0:
                break
            found.append((now, at))
    return found, bytes(output)
