"""The queue in C and the model side by side, over two memories that start alike.

A step is what a driver or a device might do; after each one both must have said the same and
written the same. Whatever the driver does is allowed: it is the guest.
"""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

from pykvm._abi import lib
from pykvm.devices.virtio.queue import BREACHES, Chain, Queue
from pykvm.errors import GuestError
from tests.support.ring_writer import RingWriter
from tests.support.twin_memory import Mismatch, Twins
from tests.support.vring_model import Breach, ModelChain, ModelRing

NAMES = {
    BREACHES[getattr(lib, name)]: name for name in dir(lib) if name.startswith("PYKVM_BREACH_")
}
"""The constant's name, of what an error says."""


class Pair:
    """Both, and a driver that knows how rings look but not what is allowed."""

    def __init__(self, random: Random, lib_: Any = lib) -> None:
        self.random = random
        self.twins = Twins()
        self.plain, self.memory = self.twins.plain, self.twins.memory
        self.max_size = random.choice((1, 2, 4, 8, 16))
        self.queue = Queue(0, self.max_size, self.memory, lib_)
        self.model = ModelRing(self.plain, self.max_size)
        self.flying: list[tuple[Chain, ModelChain]] = []
        self.stale: list[Chain] = []
        self.writer = RingWriter(random, self.twins, self.model)
        self.offer, self.scribble = self.writer.offer, self.writer.scribble
        self.breaches: Counter[str] = Counter()
        self.set_up(sane=True)

    # ---- what differs ----------------------------------------------------------------------------

    def same(self, what: str, ours: object, theirs: object) -> None:
        if ours != theirs:
            raise Mismatch(f"{what}: {ours!r}, and the model says {theirs!r}")

    def both(self, what: str, ours: Any, theirs: Any) -> tuple[Any, Any] | None:
        """Call both; None if both say that it was the same breach."""
        a = b = None
        left = right = ""
        try:
            a = ours()
        except GuestError as error:
            left = NAMES.get(str(error).partition(": ")[2], str(error))
        try:
            b = theirs()
        except Breach as error:
            right = f"PYKVM_BREACH_{error}"
        self.same(what, left, right)
        if left:
            self.breaches[left] += 1
            return None
        return a, b

    def agree(self, what: str, ours: Any, theirs: Any) -> None:
        """Call both; they are to return the same."""
        found = self.both(what, ours, theirs)
        if found is not None:
            self.same(what, *found)

    # ---- steps -----------------------------------------------------------------------------------

    def set_up(self, sane: bool = False) -> None:
        """Disable, choose another ring, enable."""
        random = self.random
        self.queue.disable()
        self.model.enabled = False
        self.stale += [chain for chain, _ in self.flying]
        del self.stale[:-8]
        self.flying.clear()
        sane = sane or random.random() < 0.7
        size, desc, driver, device = self.writer.choose(sane)
        event_idx, indirect = random.random() < 0.5, random.random() < 0.7
        model = self.model
        model.size, model.desc, model.driver, model.device = size, desc, driver, device
        model.event_idx, model.indirect = event_idx, indirect
        self.queue.set_size(size)
        for part, gpa in (("desc", desc), ("driver", driver), ("device", device)):
            self.queue.set_address(part, gpa)
        self.both(
            "enable",
            lambda: self.queue.enable(event_idx=event_idx, indirect=indirect),
            model.enable,
        )
        self.same("ready", self.queue.ready, model.enabled)

    def pop(self) -> None:
        found = self.both("pop", self.queue.pop, self.model.pop)
        if found is None:
            if self.random.random() < 0.5:  # a device would have asked for a reset
                self.set_up()
            return
        ours, theirs = found
        self.same("whether there is a chain", ours is None, theirs is None)
        if ours is None:
            return
        self.same("head", ours.head, theirs.head)
        for what in ("readable", "writable"):
            views, pieces = getattr(ours, what), getattr(theirs, what)
            self.same(f"{what} lengths", [len(v) for v in views], [n for _, n in pieces])
            for view, (gpa, length) in zip(views, pieces, strict=True):
                self.same(f"{what} at {gpa:#x}", bytes(view), self.plain.read(gpa, length))
        self.same("bytes to read", ours.read_bytes, sum(n for _, n in theirs.readable))
        self.same("bytes to write", ours.write_bytes, sum(n for _, n in theirs.writable))
        if theirs.writable and self.random.random() < 0.5:
            data = self.random.randbytes(min(ours.write_bytes, 64))
            ours.write(data)
            for gpa, length in theirs.writable:
                self.plain.write(gpa, data[:length])
                data = data[length:]
        self.flying.append((ours, theirs))

    def push(self) -> None:
        random = self.random
        if self.stale and random.random() < 0.2:
            stale = random.choice(self.stale)
            self.agree("a stale push", lambda: self.queue.push(stale, 1), lambda: False)
        if not self.flying:
            return
        ours, theirs = self.flying.pop(random.randrange(len(self.flying)))
        written = random.choice((0, 1, ours.write_bytes)) & 0xFFFFFFFF
        self.agree(
            "push",
            lambda: self.queue.push(ours, written),
            lambda: self.model.push(theirs.head, written),
        )

    def interrupt(self) -> None:
        if self.random.random() < 0.5:
            at = self.model.driver + 4 + 2 * self.model.size
            event = (self.model.used + self.random.randrange(-3, 3)) % 65536
            if self.model.enabled:
                self.twins.poke(at, event.to_bytes(2, "little"))
        self.agree("should_interrupt", self.queue.should_interrupt, self.model.should_interrupt)

    def step(self) -> str:
        """One step of a random kind; its name. Raises Mismatch."""
        kinds = (
            ("offer", 34), ("pop", 34), ("push", 16), ("interrupt", 8), ("waiting", 3),
            ("scribble", 3), ("set_up", 2),
        )  # fmt: skip
        names, shares = zip(*kinds, strict=True)
        name: str = self.random.choices(names, shares)[0]
        if name == "waiting":
            self.agree("has_work", self.queue.has_work, self.model.waiting)
        else:
            getattr(self, name)()
        self.same("in flight", self.queue.in_flight, len(self.flying))
        if name in ("pop", "push", "waiting", "interrupt"):
            self.twins.check_memory()
        return name

    def state(self) -> tuple[object, ...]:
        """What tells situations apart, for counting how many were met."""
        model = self.model
        return (
            model.enabled, model.event_idx, model.indirect, model.size, model.quiet,
            len(self.flying), (model.seen - model.next_avail) % 65536 if model.enabled else 0,
            model.used % max(model.size, 1),
        )  # fmt: skip
