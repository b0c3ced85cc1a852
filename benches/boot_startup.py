"""How much of a boot is ``pykvm boot`` itself: the interpreter, the modules, loading, the machine?

Two kernels: one of a few instructions, which prints a byte at once, until that byte comes through
the pipe; and, where there is one, a Linux image with its initrd, until ``--verbose`` says that it
is ready. The reference is ``python -c pass``.
"""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from time import perf_counter

from benches import boot_guest as guest
from benches.measure import BenchError, NotHere, Result, Sampler, compare, take_turns

C_ONLY = False

BASE = 0x100000
# mov edx, 0x3f8; mov al, '!'; out dx, al; mov edx, 0x604; mov eax, 0x3400; out dx, ax; jmp $
CODE = bytes.fromhex("baf8030000 b021 ee ba04060000 b800340000 66ef ebfe")
_MAGIC, _HAS_ADDRESSES = 0x1BADB002, 1 << 16


def tiny_kernel() -> bytes:
    """A multiboot kernel that prints one byte and turns the machine off."""
    code = BASE + 32
    magic = _MAGIC, _HAS_ADDRESSES, -(_MAGIC + _HAS_ADDRESSES) & 0xFFFFFFFF
    return struct.pack("<8I", *magic, BASE, BASE, 0, 0, code) + CODE


def measure(pairs: int) -> Iterator[Result]:
    """One process each, in turn."""
    with guest.folder() as folder:
        environment = guest.environment(folder)
        tiny = folder / "tiny"
        tiny.write_bytes(tiny_kernel())
        boot = guest.pykvm_boot(tiny)
        bare = [sys.executable, "-c", "pass"]

        def to_the_byte() -> float:
            return guest.watch(boot, environment, [b"!"])[0][0] * 1e3

        ours, reference = take_turns([to_the_byte, _whole(bare, environment)], pairs)
        note = "to the first byte; reference: python -c pass, to its end"
        yield compare("boot-startup/tiny", "ms", ours, reference, note=note)
        try:
            kernel = guest.cloud_kernel(native=False)
        except NotHere:
            return
        linux = [
            *guest.pykvm_boot(kernel, "--append", guest.CMDLINE, "--verbose"),
            *("--initrd", str(guest.make_initrd(folder / "initrd.gz")), "--timeout", "0"),
        ]

        def to_the_entry() -> float:
            ready = [b"ready after"]
            return guest.watch(linux, environment, ready, errors_too=True)[0][0] * 1e3

        ours, reference = take_turns([to_the_entry, _whole(bare, environment)], pairs)
        note = "unpacked before; ready to enter; reference: python -c pass, to its end"
        yield compare("boot-startup/linux", "ms", ours, reference, note=note)


def _whole(command: list[str], environment: Mapping[str, str]) -> Sampler:
    def sample() -> float:
        start = perf_counter()
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True
        )
        elapsed = perf_counter() - start
        if done.returncode:
            raise BenchError(f"{command} ended with {done.returncode}: {done.stderr.decode()}")
        return elapsed * 1e3

    return sample
