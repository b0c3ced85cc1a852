"""How long from ``pykvm boot`` to a busybox's first line, with the kernel unpacked before?

From starting the process until the marker line comes through the pipe; the reference is QEMU's
microvm with the same image, initrd and command line (``boot_guest.qemu`` is its command line), once
as ``-M microvm`` comes and once with the best options found.
"""

from __future__ import annotations

from collections.abc import Iterator

from benches import boot_guest as guest
from benches.measure import Goal, Result, Sampler, compare, take_turns

C_ONLY = False

GOAL = 0.40
NOTE = "to the marker line of a busybox initrd; same bzImage, initrd and command line"


def measure(pairs: int) -> Iterator[Result]:
    """One process each, in turn."""
    yield from against_qemu("boot-warm", pairs, warm=True)


def against_qemu(name: str, pairs: int, *, warm: bool) -> Iterator[Result]:
    """Ours against both of QEMU's machines, with a cache that is filled or empty."""
    kernel = guest.cloud_kernel()
    with guest.folder() as folder:
        initrd = guest.make_initrd(folder / "initrd.gz")
        environment = guest.environment(folder)

        def sampler(command: list[str]) -> Sampler:
            return lambda: guest.watch(command, environment, [guest.MARKER])[0][0]

        def ours() -> float:
            if not warm:
                guest.forget_unpacked(folder)
            return guest.watch(command, environment, [guest.MARKER])[0][0]

        command = guest.pykvm(kernel, initrd)
        machines = {"microvm": guest.PLAIN, "microvm-tuned": guest.TUNED}
        mine, *others = take_turns(
            [
                ours,
                *(sampler(guest.qemu(machine, kernel, initrd)) for machine in machines.values()),
            ],
            pairs,
        )
        for variant, theirs in zip(machines, others, strict=True):
            note = f"{NOTE}; QEMU: -M {machines[variant]}"
            yield compare(f"{name}/{variant}", "s", mine, theirs, goal=Goal(GOAL), note=note)
