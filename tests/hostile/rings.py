"""The queue in C beside the model: every access is watched, and memory changes meanwhile."""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

from pykvm._abi import ffi
from tests.hostile.build import READS, Variant
from tests.support.twin_memory import Mismatch
from tests.support.vring_compare import Pair


class WatchedPair(Pair):
    """A pair whose queue runs in a watched vring.c.

    Beyond what :class:`Pair` compares: C reads no byte of guest memory more often than the model,
    touches nothing but guest memory and what is the queue's own, and comes to an end. Now and then
    the guest writes in the middle of a call, at the same moment for both.
    """

    def __init__(self, random: Random, variant: Variant) -> None:
        self.variant = variant
        self.watch: Any = variant.watch
        self.races = 0
        self._spans_set = False
        super().__init__(random, variant)

    def _set_spans(self) -> None:
        watch, queue = self.watch, self.queue
        watch.region_count = len(self.memory.regions)
        for span, region in zip(watch.regions, self.memory.regions, strict=False):
            span.host, span.size = region.userspace_addr, region.memory_size
            span.gpa = region.guest_phys_addr
        table = queue._table
        ram_map = table.c.map
        known = [
            (queue.c, ffi.sizeof("struct pykvm_vring")),
            (queue._chain, ffi.sizeof("struct pykvm_chain")),
            (queue._segments, ffi.sizeof(queue._segments)),
            (table.c, ffi.sizeof("struct pykvm_ram")),
            (ram_map, ffi.sizeof("struct pykvm_ram_map")),
            (ram_map.regions, ram_map.count * ffi.sizeof("struct pykvm_ram_region")),
        ]
        watch.known_count = len(known)
        for span, (pointer, size) in zip(watch.known, known, strict=False):
            span.host, span.size = int(ffi.cast("uintptr_t", pointer)), size
        self._spans_set = True

    def _arm(self) -> None:
        """Have the guest write within the next call: after a read of a byte, or after a write."""
        random, model, plain, watch = self.random, self.model, self.plain, self.watch
        part = random.choice(("desc", "driver", "device", "table"))
        base = 0x2000 if part == "table" else getattr(model, part)
        gpa = base + random.choice((0, 2, 4, random.randrange(64)))
        data = random.randbytes(random.choice((1, 2, 4, 8)))
        if random.random() < 0.4:  # one more is made available
            gpa, data = model.driver + 2, ((self.writer.index + 1) % 65536).to_bytes(2, "little")
        if not plain.covers(gpa, len(data), True) or len(plain.pieces(gpa, len(data))) > 1:
            return
        trigger = random.choice((model.driver + 2, base + random.randrange(64), gpa))
        plain.poke, plain.trigger = (gpa, data), trigger
        plain.armed = watch.armed = random.choice((1, 2))
        watch.trigger = trigger % (1 << 64)
        watch.poke_bytes = len(data)
        watch.poke[: len(data)] = list(data)
        region = self.memory.region_at(gpa)
        watch.poke_host = region.userspace_addr + gpa - region.guest_phys_addr
        self.races += 1

    def both(self, what: str, ours: Any, theirs: Any) -> tuple[Any, Any] | None:
        if not self._spans_set:
            self._set_spans()
        plain, watch = self.plain, self.watch
        if self.random.random() < 0.3:
            self._arm()

        watch.reads = watch.strays = watch.runaway = 0  # a call may end before it is in C

        def logged() -> Any:
            plain.log = []
            try:
                return theirs()
            finally:
                plain.armed = 0

        try:
            result = super().both(what, ours, logged)
        finally:
            self._look(what)
        return result

    def _look(self, what: str) -> None:
        """What was seen of the call; it comes before any other difference, as it explains it."""
        watch, log = self.watch, self.plain.log or []
        self.plain.log = None
        self.plain.armed = watch.armed = 0
        if watch.runaway:
            raise Mismatch(f"{what}: it does not end")
        if watch.strays:
            raise Mismatch(f"{what}: {watch.strays} accesses outside, first at {watch.stray:#x}")
        if not watch.reads:
            return
        if watch.reads >= READS:
            raise Mismatch(f"{what}: {watch.reads} reads of guest memory")
        ours: Counter[int] = Counter()
        for read in watch.read[: watch.reads]:
            ours.update(range(read.gpa, read.gpa + read.size))
        theirs: Counter[int] = Counter()
        for gpa, size in log:
            theirs.update(range(gpa, gpa + size))
        more = ours - theirs
        if more:
            at = min(more)
            raise Mismatch(
                f"{what}: the byte at {at:#x} was read {ours[at]} times, where the model reads it"
                f" {theirs[at]} times"
            )
