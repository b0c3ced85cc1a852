"""A driver that knows how rings look, but not what is allowed."""

from __future__ import annotations

from random import Random
from struct import pack

from tests.support.twin_memory import ABOVE, PAGE, RAM, ROM, Twins
from tests.support.vring_model import ModelRing


def _packed(gpa: int, length: int, flags: int, following: int) -> bytes:
    """A descriptor; 2.7.5."""
    return pack("<QIHH", gpa % (1 << 64), length, flags & 0xFFFF, following & 0xFFFF)


class RingWriter:
    """Writes into both memories what a driver of one ring might, right but for some details.

    Attributes:
        model: the ring; where its parts are.
        index: the next to be made available.
    """

    def __init__(self, random: Random, twins: Twins, model: ModelRing) -> None:
        self.random = random
        self.twins = twins
        self.poke = twins.poke
        self.model = model
        self.max_size = model.max_size
        self.index = 0

    def choose(self, sane: bool, base: int = 0x100) -> tuple[int, int, int, int]:
        """Size and addresses of another ring, zeroed: 0x700 bytes from ``base`` on, or odd."""
        random = self.random
        self.index = 0
        if sane:
            size, desc = self.max_size, base
            driver, device = base + 16 * size, base + 0x500
            if random.random() < 0.3:  # across the border of two regions
                desc = RAM // 2 - 16 * random.randrange(1, size + 1)
            if random.random() < 0.3:
                driver = RAM // 2 - 2 * random.randrange(1, size + 4)
                desc = base
        else:
            size = random.choice((0, 1, 2, 3, 4, 8, 16, 32, 1 << 15, 1 << 16, (1 << 32) - 1))
            desc, driver, device = self.place(16), self.place(2), self.place(4)
        for gpa, length in ((driver, 64), (device, 160)):
            self.poke(gpa, bytes(length))
        return size, desc, driver, device

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
        self.poke(table + 16 * number, _packed(gpa, length, flags, following))

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
            self.poke(table + 16 * number, _packed(gpa, size, flags, number + 1))
        return head if table == self.model.desc else random.randrange(self.max_size)

    def write_table(self) -> int:
        """An indirect table that is right but for a detail, and a descriptor of it; the head."""
        random = self.random
        table = random.choice((0x2000, 0x2001, RAM // 2 - 40, 0x2000, self.place(1)))
        count = random.randrange(1, 7)
        writes, wrong = random.randrange(count + 1), random.random() < 0.4
        odd = random.randrange(count)
        for number in range(count):
            flags = (2 if number >= writes else 0) | (1 if number < count - 1 else 0)
            gpa, size, to = random.randrange(0x3000, 0x6000), random.randrange(64), number + 1
            if wrong and number == odd:
                kind = random.randrange(4)
                flags |= (4, 1, 1, 0)[kind]
                to = random.choice((0, number, count, count + 1, 0xFFFF)) if kind < 3 else to
                gpa = self.place(1) if kind == 3 else gpa
            self.poke(table + 16 * number, _packed(gpa, size, flags, to))
        head = random.randrange(self.max_size)
        length = 16 * count + (random.choice((-16, 16, 1, 8)) if random.random() < 0.1 else 0)
        flags = 4 | random.choice((0, 0, 0, 1, 2))
        self.poke(self.model.desc + 16 * head, _packed(table, length, flags, head + 1))
        return head

    def offer(self) -> None:
        random, model = self.random, self.model
        size = max(min(model.size, 32), 1)
        head = self.write_table() if random.random() < 0.2 else self.write_chain()
        if random.random() < 0.05:
            head = random.choice((size, size - 1, 0xFFFF))
        self.poke(model.driver + 4 + 2 * (self.index % size), head.to_bytes(2, "little"))
        self.index += 1
        if random.random() < 0.03:
            self.index += random.choice((1, size, size + 1, 0x8000))
        self.index %= 65536
        self.poke(model.driver + 2, self.index.to_bytes(2, "little"))

    def scribble(self) -> None:
        """The guest changes its mind about something in the ring, or anywhere."""
        random, model = self.random, self.model
        gpa = random.choice((model.desc, model.driver, model.device, 0x2000, self.place(1)))
        data = random.randbytes(random.choice((1, 2, 8)))
        self.poke((gpa + random.randrange(64)) % (1 << 64), data)
