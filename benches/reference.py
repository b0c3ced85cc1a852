"""The C references: compiled beside the benches when one is run, and called in this process.

In this process, so that ours and the reference meet the same clock frequency, the same cache and
the same neighbours; ctypes releases the GIL around each batch.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from benches.measure import BenchError, Sampler
from pykvm import Machine
from pykvm._abi import ffi
from pykvm.kvm.handle import Closing

HERE = Path(__file__).parent
FLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-shared", "-fPIC")


@cache
def build(source: str) -> ctypes.CDLL:
    """Compile ``benches/<source>`` (unless that was done before) and load it.

    Environment: ``CC`` (gcc). The result is kept under ``XDG_CACHE_HOME``, named by its contents,
    where that can be written.
    """
    compiler = shlex.split(os.environ.get("CC", "gcc"))
    texts = [path.read_bytes() for path in (HERE / source, HERE / "raw.h")]
    key = hashlib.sha256(b"\0".join([*texts, repr((compiler, FLAGS)).encode()])).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pykvm" / "benches"
    target = folder / f"{Path(source).stem}-{key}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory() as scratch:
            made = Path(scratch) / target.name
            _compile(compiler, source, made)
            with suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True)
                beside = target.with_suffix(f".{os.getpid()}")
                shutil.copy(made, beside)
                beside.replace(target)
            if not target.exists():
                return ctypes.CDLL(str(made))  # it stays mapped
    return ctypes.CDLL(str(target))


def _compile(compiler: list[str], source: str, target: Path) -> None:
    command = [*compiler, *FLAGS, "-o", str(target), str(HERE / source)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BenchError(f"no C compiler: {shlex.join(command)}: {error.strerror}") from error
    if done.returncode:
        raise BenchError(f"{shlex.join(command)}\n{done.stderr}")


def pointer(cdata: Any) -> int:
    """The address in a cffi pointer."""
    return int(ffi.cast("uintptr_t", cdata))


class Guest(ctypes.Structure):
    """``struct raw_guest``: the guest of a machine that has not run yet, for the C reference.

    Args:
        machine: the machine.
        file: a file that has its memory, and from where on; else it is copied.
    """

    _fields_ = (
        ("memory_size", ctypes.c_uint64),
        ("used", ctypes.c_uint64),
        ("image", ctypes.c_char_p),
        ("regs", ctypes.c_void_p),
        ("sregs", ctypes.c_void_p),
        ("path", ctypes.c_char_p),
        ("offset", ctypes.c_uint64),
    )

    def __init__(self, machine: Machine, file: tuple[Path, int] | None = None) -> None:
        (region,) = machine.memory.regions
        size = region.memory_size
        image = b"" if file else bytes(machine.memory[0:size]).rstrip(b"\0")
        vcpu = machine.cpu.vcpu
        self._keep = vcpu.get_regs(), vcpu.get_sregs()
        path, offset = (bytes(file[0]), file[1]) if file else (None, 0)
        super().__init__(size, len(image), image, *map(pointer, self._keep), path, offset)


def in_c(guest: Guest) -> tuple[Sampler, Sampler]:
    """From nothing to a guest's first exit, an OUT or HLT, in µs; and with closing."""
    library = build("first_exit.c")
    library.first_exit.restype = ctypes.c_int64
    if error := library.prepare():
        raise BenchError(f"the C reference: {os.strerror(-error)}")

    def both() -> tuple[float, float]:
        whole = ctypes.c_int64()
        first: int = library.first_exit(ctypes.byref(guest), ctypes.byref(whole))
        if first < 0:
            raise BenchError(f"the C reference: {os.strerror(-first)}")
        return first / 1000, whole.value / 1000

    return lambda: both()[0], lambda: both()[1]


class RawVm(Closing):
    """The reference for a machine: the same guest, set up and driven by C alone."""

    def __init__(self, machine: Machine) -> None:
        self._c = c = build("raw.c")
        c.raw_new.restype = ctypes.c_void_p
        c.raw_run.restype = ctypes.c_int64
        c.raw_sum.restype = c.raw_run_size.restype = ctypes.c_uint64
        error = ctypes.c_int()
        self._raw = ctypes.c_void_p(c.raw_new(ctypes.byref(Guest(machine)), ctypes.byref(error)))
        if not self._raw:
            raise BenchError(f"the C reference: {os.strerror(error.value)}")

    def run(self, exits: int) -> float:
        """Take so many exits; nanoseconds for each."""
        elapsed: int = self._c.raw_run(self._raw, ctypes.c_uint64(exits))
        if elapsed < 0:
            raise BenchError(f"the C reference's loop: {os.strerror(-elapsed)}")
        return elapsed / exits

    @property
    def sum(self) -> int:
        """The sum of all that the guest wrote."""
        return int(self._c.raw_sum(self._raw))

    @property
    def vcpu_fd(self) -> int:
        """The vCPU, for another loop around it."""
        return int(self._c.raw_vcpu_fd(self._raw))

    @property
    def run_size(self) -> int:
        """Bytes to map of it."""
        return int(self._c.raw_run_size(self._raw))

    def sampler(self, exits: int) -> Callable[[], float]:
        """Batches of ``exits``, in ns each."""
        return lambda: self.run(exits)

    def close(self) -> None:
        """Give the VM back."""
        raw, self._raw = self._raw, ctypes.c_void_p()
        if raw:
            self._c.raw_delete(raw)
