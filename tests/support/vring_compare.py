"""The queue in C and the model side by side, over two memories that start alike.

A step is what a driver or a device might do; after each one both must have said the same and
written the same. Whatever the driver does is allowed: it is the guest.
"""

from __future__ import annotations

from random import Random
from typing import Any

from pykvm._abi import lib
from pykvm.devices.virtio.queue import BREACHES, Chain, Queue
from pykvm.errors import GuestError
from pykvm.memory import GuestMemory
from tests.support.vring_model import Breach, ModelChain, ModelRing

RAM, ROM, ABOVE = 0x8000, 0x10000, 0x40_0000_0000
"""RAM from 0 to RAM, in regions that adjoin at half of it; a ROM; RAM at ABOVE."""
PAGE = 0x1000

NAMES = {
    BREACHES[getattr(lib, name)]: name for name in dir(lib) if name.startswith("PYKVM_BREACH_")
}
"""The constant's name, of what an error says."""


class Mismatch(AssertionError):
    """The two disagree."""


class PlainMemory:
    """The model's memory: byte strings, and a list of what is where."""

    def __init__(self) -> None:
        self.regions = [
            (0, bytearray(RAM // 2), True),
            (RAM // 2, bytearray(RAM // 2), True),
            (ROM, bytearray(PAGE), False),
            (ABOVE, bytearray(PAGE), True),
        ]

    def pieces(self, gpa: int, length: int) -> list[tuple[int, int]]:
        """Split at the borders of regions; AssertionError outside all."""
        found = []
        while length:
            base, data, _ = self._region(gpa)
            piece = min(length, base + len(data) - gpa)
            found.append((gpa, piece))
            gpa += piece
            length -= piece
        return found

    def _region(self, gpa: int) -> tuple[int, bytearray, bool]:
        for base, data, writable in self.regions:
            if base <= gpa < base + len(data):
                return base, data, writable
        raise AssertionError(f"{gpa:#x} is not in RAM")

    def covers(self, gpa: int, length: int, writable: bool) -> bool:
        """Whether a range is RAM, and may be written if asked."""
        try:
            pieces = self.pieces(gpa, length)
        except AssertionError:
            return False
        return not writable or all(self._region(at)[2] for at, _ in pieces)

    def read(self, gpa: int, length: int) -> bytes:
        """Read within RAM."""
        found = b""
        for at, size in self.pieces(gpa, length):
            base, data, _ = self._region(at)
            found += data[at - base : at - base + size]
        return bytes(found)

    def write(self, gpa: int, data: bytes) -> None:
        """Write within RAM."""
        for at, size in self.pieces(gpa, len(data)):
            base, there, _ = self._region(at)
            there[at - base : at - base + size] = data[:size]
            data = data[size:]


class Pair:
    """Both, and a driver that knows how rings look but not what is allowed."""

    def __init__(self, random: Random, lib_: Any = lib) -> None:
        self.random = random
        self.plain = PlainMemory()
        self.memory = GuestMemory()
        for base, data, writable in self.plain.regions:
            self.memory.add(base, len(data), readonly=not writable)
        self.max_size = random.choice((1, 2, 4, 8, 16))
        self.queue = Queue(0, self.max_size, self.memory, lib_)
        self.model = ModelRing(self.plain, self.max_size)
        self.flying: list[tuple[Chain, ModelChain]] = []
        self.stale: list[Chain] = []
        self.index = 0
        self.breaches = 0
        self.set_up(sane=True)

    # ---- what differs ----------------------------------------------------------------------------

    def same(self, what: str, ours: object, theirs: object) -> None:
        if ours != theirs:
            raise Mismatch(f"{what}: {ours!r}, and the model says {theirs!r}")

    def check_memory(self) -> None:
        for (base, data, _), region in zip(self.plain.regions, self.memory.regions, strict=True):
            if region.cells(1) != data:
                at = next(i for i, (a, b) in enumerate(zip(region.cells(1), data)) if a != b)  # noqa: B905
                raise Mismatch(f"memory at {base + at:#x}: the model wrote another byte")

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
            self.breaches += 1
            return None
        return a, b

    # ---- steps -----------------------------------------------------------------------------------

    def poke(self, gpa: int, data: bytes) -> None:
        """The guest writes; where it cannot, nothing happens."""
        if self.plain.covers(gpa, len(data), True):
            self.plain.write(gpa, data)
            self.memory.write(gpa, data)

    def place(self, align: int) -> int:
        """An address: mostly one that will do."""
        random = self.random
        kind = random.random()
        if kind < 0.75:
            return random.randrange(0, RAM - 0x400) // align * align
        if kind < 0.85:
            return ABOVE + random.randrange(0, PAGE - 0x200) // align * align
        borders = (RAM // 2, RAM, ROM, ROM + PAGE, ABOVE, ABOVE + PAGE, 1 << 64, 1 << 52)
        near = random.choice(borders) + random.randrange(-64, 64)
        return near % (1 << 64) // random.choice((1, align)) * random.choice((1, align)) % (1 << 64)

    def set_up(self, sane: bool = False) -> None:
        """Disable, choose another ring, enable."""
        random = self.random
        self.queue.disable()
        self.model.enabled = False
        self.stale += [chain for chain, _ in self.flying]
        del self.stale[:-8]
        self.flying.clear()
        self.index = 0
        if sane or random.random() < 0.7:
            size, desc = self.max_size, 0x100
            driver, device = 0x100 + 16 * size, 0x600
            if random.random() < 0.3:  # across the border of two regions
                desc = RAM // 2 - 16 * random.randrange(1, size + 1)
            if random.random() < 0.3:
                driver = RAM // 2 - 2 * random.randrange(1, size + 4)
                desc = 0x100
        else:
            size = random.choice((0, 1, 2, 3, 4, 8, 16, 32, 1 << 15, 1 << 16, (1 << 32) - 1))
            desc, driver, device = self.place(16), self.place(2), self.place(4)
        for gpa, length in ((driver, 64), (device, 160)):
            self.poke(gpa, bytes(length))
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

    def descriptor(self, table: int, number: int, count: int, last: bool) -> None:
        random = self.random
        gpa, length, flags = self.place(1), random.choice((0, 1, 16, 100, 700)), 0
        if random.random() < 0.5:
            flags |= 2
        if not last:
            flags |= 1
        following = number + 1
        if random.random() < 0.15:
            following = random.randrange(0, count + 2)
        if random.random() < 0.1:
            flags ^= random.choice((1, 2, 3, 8, 0x8000))
        if random.random() < 0.04:
            length = random.choice((0xFFFFFFFF, 0x80000000, RAM, RAM + 1))
        if random.random() < 0.1:
            flags |= 4
            gpa = random.choice((0x2000, 0x2001, RAM // 2 - 40, self.place(1)))
            length = random.choice((16, 32, 48, 160, 17, 0, 16 * 1024, 16 * 1025))
            if random.random() < 0.7:
                flags &= ~1
        data = gpa.to_bytes(8, "little") + length.to_bytes(4, "little")
        data += (flags & 0xFFFF).to_bytes(2, "little") + following.to_bytes(2, "little")
        self.poke(table + 16 * number, data)

    def write_chain(self) -> int:
        """Some descriptors in order, writable ones last as a rule; the head."""
        random, count = self.random, self.max_size
        head = random.randrange(count)
        table = self.model.desc
        if random.random() < 0.2:
            table = random.choice((0x2000, 0x2001, RAM // 2 - 40))
            head, count = 0, 10
        length = random.randrange(1, 5)
        writes = False
        for number in range(head, min(head + length, count)):
            last = number in (head + length - 1, count - 1)
            if random.random() < 0.4:
                self.descriptor(table, number, count, last)
                continue
            writes = writes or random.random() < 0.4
            flags = (2 if writes else 0) | (0 if last else 1)
            gpa, size = random.randrange(0x3000, 0x6000), random.choice((0, 1, 5, 64))
            self.poke(
                table + 16 * number,
                gpa.to_bytes(8, "little")
                + size.to_bytes(4, "little")
                + flags.to_bytes(2, "little")
                + (number + 1).to_bytes(2, "little"),
            )
        return head if table == self.model.desc else random.randrange(self.max_size)

    def offer(self) -> None:
        random, model = self.random, self.model
        size = max(min(model.size, 32), 1)
        head = self.write_chain()
        if random.random() < 0.05:
            head = random.choice((size, size - 1, 0xFFFF))
        self.poke(model.driver + 4 + 2 * (self.index % size), head.to_bytes(2, "little"))
        self.index += 1
        if random.random() < 0.03:
            self.index += random.choice((1, size, size + 1, 0x8000))
        self.index %= 65536
        self.poke(model.driver + 2, self.index.to_bytes(2, "little"))

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
            self.same("a stale push", self.queue.push(random.choice(self.stale), 1), False)
        if not self.flying:
            return
        ours, theirs = self.flying.pop(random.randrange(len(self.flying)))
        written = random.choice((0, 1, ours.write_bytes)) & 0xFFFFFFFF
        self.model.push(theirs.head, written)
        self.same("push", self.queue.push(ours, written), True)

    def interrupt(self) -> None:
        if self.random.random() < 0.5:
            at = self.model.driver + 4 + 2 * self.model.size
            event = (self.model.used + self.random.randrange(-3, 3)) % 65536
            if self.model.enabled:
                self.poke(at, event.to_bytes(2, "little"))
        self.same("should_interrupt", self.queue.should_interrupt(), self.model.should_interrupt())

    def scribble(self) -> None:
        """The guest changes its mind about something in the ring, or anywhere."""
        random, model = self.random, self.model
        gpa = random.choice((model.desc, model.driver, model.device, 0x2000, self.place(1)))
        data = random.randbytes(random.choice((1, 2, 8)))
        self.poke((gpa + random.randrange(64)) % (1 << 64), data)

    def step(self) -> str:
        """One step of a random kind; its name. Raises Mismatch."""
        kinds = (
            ("offer", 34), ("pop", 34), ("push", 16), ("interrupt", 8), ("waiting", 3),
            ("scribble", 3), ("set_up", 2),
        )  # fmt: skip
        names, shares = zip(*kinds, strict=True)
        name: str = self.random.choices(names, shares)[0]
        if name == "waiting":
            self.same("has_work", self.queue.has_work(), self.model.waiting())
        else:
            getattr(self, name)()
        self.same("in flight", self.queue.in_flight, len(self.flying))
        if name in ("pop", "push", "waiting", "interrupt"):
            self.check_memory()
        return name

    def state(self) -> tuple[object, ...]:
        """What tells situations apart, for counting how many were met."""
        model = self.model
        return (
            model.enabled, model.event_idx, model.indirect, model.size, model.quiet,
            len(self.flying), (model.seen - model.next_avail) % 65536 if model.enabled else 0,
            model.used % max(model.size, 1),
        )  # fmt: skip
