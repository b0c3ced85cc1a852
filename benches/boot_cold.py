"""How long from ``pykvm boot`` to a busybox's first line, with the kernel still to be unpacked?

As ``boot-warm``, with an empty cache each time.
"""

from __future__ import annotations

from collections.abc import Iterator

from benches.boot_warm import against_qemu
from benches.measure import Result

C_ONLY = False


def measure(pairs: int) -> Iterator[Result]:
    """One process each, in turn."""
    yield from against_qemu("boot-cold", pairs, warm=False)
