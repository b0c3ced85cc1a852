"""How long does a byte take that a booted Linux prints on its serial console?

A file of the initrd is sent to ttyS0 by ``cat``, the driver's way: bytes into the FIFO, by
interrupts. From the first to the last byte as they come through the pipe; the reference is QEMU's
microvm.
"""

from __future__ import annotations

from collections.abc import Iterator

from benches import boot_guest as guest
from benches.measure import BenchError, Goal, Result, Sampler, compare, take_turns

C_ONLY = False

SIZE = 4 << 10
LINE = b"0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcde\n"


def measure(pairs: int) -> Iterator[Result]:
    """A boot each, in turn; only the printing counts."""
    kernel = guest.cloud_kernel()
    blob = LINE * (SIZE // len(LINE))
    with guest.folder() as folder:
        initrd = guest.make_initrd(folder / "initrd.gz", blob)
        environment = guest.environment(folder)

        def sampler(command: list[str]) -> Sampler:
            def sample() -> float:
                marks = guest.watch(command, environment, [guest.MARKER, guest.END])
                (start, first), (end, last) = marks
                if last - first < SIZE:
                    raise BenchError(f"{last - first} bytes came, not {SIZE}")
                return (end - start) / (last - first) * 1e6

            return sample

        commands = guest.pykvm(kernel, initrd), guest.qemu(guest.TUNED, kernel, initrd)
        ours, theirs = take_turns([sampler(command) for command in commands], pairs)
        note = f"{SIZE >> 10} KiB by cat; QEMU: -M {guest.TUNED}"
        yield compare("console-bytes/cat", "µs/byte", ours, theirs, goal=Goal(1.0), note=note)
