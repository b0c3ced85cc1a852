"""A guest's disk beside QEMU's: random reads, sequential reads, and writes that are flushed?

Three guests take turns, each stopped but for when it is its turn: ours with virtio-blk over
PCI, QEMU's microvm with virtio-blk-device, QEMU's q35 with virtio-blk-pci; same kernel, initrd and
kernel command line, an image of its own each, opened with O_DIRECT. The images are on ext4 on a RAM
disk, so that what the VMM adds is not lost in what a disk takes. A program in the guest
(``blk_guest.c``) does the reads and writes on /dev/vda with O_DIRECT, one after the other, and
takes the time. It runs in the rig: ``python -m tests.rig -- python benches/run.py blk-qemu``.
"""

from __future__ import annotations

import gzip
import os
import select
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import Self

from benches import boot_guest
from benches.measure import BenchError, Goal, NotHere, Result, Sampler, compare, take_turns
from tests.rig.initramfs import ModuleTree, cpio

C_ONLY = False

HERE = Path(__file__).parent
IMAGE_SIZE = 64 << 20
DISK_KIB = 400 << 10
"""Of the RAM disk: three images and a file system."""
MODULES = ("virtio_mmio", "virtio_pci", "virtio_blk")

MACHINES = {
    "microvm": (boot_guest.TUNED, "virtio-blk-device"),
    "q35": ("q35", "virtio-blk-pci"),
}
"""QEMU's machines, and how its disk is attached."""

WORK = {"random": 200, "sequential": 20, "flushed": 50}
"""What a guest does, and how often in a sample."""
RANDOM_MICROVM, RANDOM_Q35, OTHERS = 0.35, 1.0, 1.0
"""Goals, as ratios of times."""


def qemu(machine: str, kernel: Path, initrd: Path, image: Path) -> list[str]:
    """QEMU's whole command line."""
    kind, device = MACHINES[machine]
    return [
        *("qemu-system-x86_64", "-accel", "kvm", "-M", kind, "-cpu", "host"),
        *("-m", boot_guest.MEMORY, "-nodefaults", "-no-user-config", "-no-reboot"),
        *("-display", "none", "-serial", "stdio"),
        *("-kernel", str(kernel), "-initrd", str(initrd), "-append", boot_guest.CMDLINE),
        *("-drive", f"id=disk,if=none,file={image},format=raw,cache=none,aio=threads"),
        *("-device", f"{device},drive=disk"),
    ]


def pykvm(kernel: Path, initrd: Path, image: Path) -> list[str]:
    """``pykvm boot`` of the same."""
    return [*boot_guest.pykvm(kernel, initrd), "--disk", f"{image},cache=none"]


class Guest:
    """A VMM with a guest in it that waits for work."""

    def __init__(self, command: Sequence[str], environment: dict[str, str]) -> None:
        self._command = command
        self._output = b""
        self._child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            bufsize=0,
        )
        try:
            self._answer("READY")
            self._child.send_signal(signal.SIGSTOP)
        except BaseException:
            self.close()
            raise

    def _answer(self, word: str) -> list[str]:
        """The rest of the next line that begins with the word."""
        assert self._child.stdout is not None
        fd, end = self._child.stdout.fileno(), monotonic() + boot_guest.PATIENCE
        while True:
            *lines, rest = self._output.split(b"\n")
            for number, line in enumerate(lines):
                found = line.decode(errors="replace").split()
                if found[:1] == [word]:
                    self._output = b"\n".join([*lines[number + 1 :], rest])
                    return found[1:]
            ready = select.select([fd], [], [], max(end - monotonic(), 0))[0]
            data = os.read(fd, 4096) if ready else b""
            if not data:
                text = self._output.decode(errors="replace")[-2000:]
                raise BenchError(f"{' '.join(self._command)}: no {word} in:\n{text}")
            self._output += data

    def sampler(self, kind: str, count: int) -> Sampler:
        """Batches of one kind of work, in µs each."""

        def sample() -> float:
            assert self._child.stdin is not None
            self._child.send_signal(signal.SIGCONT)
            self._child.stdin.write(f"{kind} {count}\n".encode())
            done, ns = self._answer("DONE")
            self._child.send_signal(signal.SIGSTOP)
            assert done == kind
            return int(ns) / 1000

        return sample

    def close(self) -> None:
        self._child.kill()
        self._child.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def make_initrd(folder: Path, kernel: Path) -> Path:
    """The program, compiled, and the modules for its disk."""
    program, path = folder / "init", folder / "initrd.gz"
    command = ["gcc", "-O2", "-Wall", "-static", "-o", str(program), str(HERE / "blk_guest.c")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"{' '.join(command)}\n{done.stderr}")
    release = kernel.name.removeprefix("vmlinuz-")
    tree = ModuleTree(kernel.parents[1] / "lib" / "modules" / release)
    entries = [(name, 0o040755, b"") for name in ("dev", "modules")]
    entries.append(("init", 0o100755, program.read_bytes()))
    for number, name in enumerate(tree.closure(MODULES)):
        entries.append((f"modules/{number:03}.ko", 0o100644, tree.read(name)))
    path.write_bytes(gzip.compress(b"".join(cpio(entries)), 1))
    return path


@contextmanager
def scratch_disk(folder: Path) -> Iterator[Path]:
    """An ext4 file system on a RAM disk, which takes O_DIRECT."""
    kernels = Path(os.environ["PYKVM_KERNELS"])
    modules = next(kernels.glob(f"*/lib/modules/{os.uname().release}"), None)
    if modules is None or os.geteuid():
        raise NotHere("a RAM disk needs root, and the modules of the kernel that runs")
    tree = ModuleTree(modules)
    for name in tree.closure(("brd", "ext4")):
        file = folder / f"{name}.ko"
        file.write_bytes(tree.read(name))
        more = ["rd_nr=1", f"rd_size={DISK_KIB}"] if name == "brd" else []
        # It may be there already.
        subprocess.run(["busybox", "insmod", str(file), *more], capture_output=True, check=False)
    place = folder / "disk"
    place.mkdir()
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    mkfs = shutil.which("mke2fs", path=path) or "mke2fs"
    for command in (
        [mkfs, "-q", "-t", "ext4", "-O", "^has_journal", "/dev/ram0"],
        ["busybox", "mount", "-t", "ext4", "/dev/ram0", str(place)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise NotHere(f"{' '.join(command)}: {done.stderr.strip()}")
    try:
        yield place
    finally:
        with suppress(OSError):
            subprocess.run(["busybox", "umount", str(place)], check=False)


def make_image(path: Path) -> Path:
    """An image whose blocks are all there."""
    with path.open("wb") as file:
        for _ in range(IMAGE_SIZE >> 20):
            file.write(b"\xa5" * (1 << 20))
        os.fsync(file.fileno())
    return path


def measure(pairs: int) -> Iterator[Result]:
    """Three guests in turn, one kind of work after the other."""
    kernel = boot_guest.cloud_kernel()
    with ExitStack() as stack:
        folder = stack.enter_context(boot_guest.folder())
        disk = stack.enter_context(scratch_disk(folder))
        initrd = make_initrd(folder, kernel)
        environment = boot_guest.environment(folder)
        images = {name: make_image(disk / name) for name in ("ours", *MACHINES)}
        commands = [pykvm(kernel, initrd, images["ours"])]
        commands += [qemu(name, kernel, initrd, images[name]) for name in MACHINES]
        guests = [stack.enter_context(Guest(command, environment)) for command in commands]
        for kind, count in WORK.items():
            mine, *others = take_turns([each.sampler(kind, count) for each in guests], pairs)
            yield from _results(kind, mine, dict(zip(MACHINES, others, strict=True)))


def _results(kind: str, mine: list[float], others: dict[str, list[float]]) -> Iterator[Result]:
    note = "images on ext4 on a RAM disk, cache=none; QEMU: aio=threads"
    if kind == "random":
        goals = {"microvm": Goal(RANDOM_MICROVM), "q35": Goal(RANDOM_Q35)}
        for name, theirs in others.items():
            yield compare(
                f"blk-qemu/{kind}/{name}", "µs", mine, theirs, goal=goals[name], note=note
            )
        return
    for name, theirs in others.items():  # to beat the better one is to beat both
        yield compare(f"blk-qemu/{kind}/{name}", "µs", mine, theirs, goal=Goal(OTHERS), note=note)
