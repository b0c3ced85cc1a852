"""How long from ``pykvm boot`` to a busybox's first line, with the kernel unpacked before?

From starting the process until the marker line comes through the pipe; the reference is QEMU's
microvm with the same image, initrd and command line (``boot_guest.qemu`` is its command line),
once as ``-M microvm`` comes and once with the best options found. ``guest-alone`` is the kernel's
own part of it, from its first instruction on, the same for both: no monitor gets below it.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from benches import boot_guest as guest
from benches.measure import BenchError, Goal, Result, Sampler, compare, take_turns

C_ONLY = False

GOAL = 0.40
NOTE = "to the marker line of a busybox initrd; same bzImage, initrd and command line"


ALONE = """\
import sys, time
import pykvm

seen, text = [], bytearray()

def output(data):
    text.extend(data)
    if not seen and sys.argv[5].encode() in text:
        seen.append(time.monotonic())

with pykvm.Machine(sys.argv[4], irqchip=True, pit=True) as m:
    m.boot(sys.argv[1], initrd=sys.argv[2], cmdline=sys.argv[3], output=output)
    began = time.monotonic()
    m.run(timeout=60).check()
    print(seen[0] - began)
"""
"""Prints the seconds from entering the guest to the marker."""


def measure(pairs: int) -> Iterator[Result]:
    """One process each, in turn."""
    yield from against_qemu("boot-warm", pairs, warm=True)


def _alone(kernel: Path, initrd: Path, environment: Mapping[str, str]) -> float:
    arguments = [str(kernel), str(initrd), guest.CMDLINE, guest.MEMORY, guest.MARKER.decode()]
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *arguments], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise BenchError(done.stderr)
    return float(done.stdout)


def against_qemu(name: str, pairs: int, *, warm: bool) -> Iterator[Result]:
    """Ours against both of QEMU's machines, with a cache that is filled or empty."""
    kernel = guest.cloud_kernel()
    with guest.folder() as folder:
        initrd = guest.make_initrd(folder / "initrd.gz")
        environment = guest.environment(folder)

        def sampler(command: list[str]) -> Sampler:
            # Killed at the marker; ours goes on to its end, for it may still write its cache.
            return lambda: guest.watch(command, environment, [guest.MARKER], to_end=False)[0][0]

        def ours() -> float:
            if not warm:
                guest.forget_unpacked(folder)
            return guest.watch(command, environment, [guest.MARKER])[0][0]

        command = guest.pykvm(kernel, initrd)
        machines = {"microvm": guest.PLAIN, "microvm-tuned": guest.TUNED}
        samplers = [ours]
        samplers += [sampler(guest.qemu(machine, kernel, initrd)) for machine in machines.values()]
        if warm:
            samplers.append(lambda: _alone(kernel, initrd, environment))
        mine, *others = take_turns(samplers, pairs)
        for variant, theirs in zip(machines, others, strict=False):
            note = f"{NOTE}; QEMU: -M {machines[variant]}"
            yield compare(f"{name}/{variant}", "s", mine, theirs, goal=Goal(GOAL), note=note)
        if warm:
            note = f"from the first instruction to the marker; QEMU, all of it: -M {guest.TUNED}"
            yield compare(f"{name}/guest-alone", "s", others[2], others[1], note=note)
