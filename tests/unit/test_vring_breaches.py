"""The split virtqueue in C: what a driver must not do is told, and nothing is taken."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pykvm.devices.virtio.queue import Queue
from pykvm.errors import GuestError
from pykvm.memory import GuestMemory
from tests.support.vring_driver import INDIRECT, NEXT, WRITE, Driver
from tests.support.vring_small import BUFFER, HOLE, ROM, SIZE, make, place

pytestmark = pytest.mark.sanitize

Break = Callable[[GuestMemory, Driver], None]


def _send(*buffers: tuple[int, int, int]) -> Break:
    return lambda memory, driver: driver.send(*buffers)


def _loop(memory: GuestMemory, driver: Driver) -> None:
    driver.descriptor(0, BUFFER, 1, NEXT, 1)
    driver.descriptor(1, BUFFER, 1, NEXT, 0)
    driver.offer(0)


def _next(memory: GuestMemory, driver: Driver) -> None:
    driver.descriptor(0, BUFFER, 1, NEXT, SIZE)
    driver.offer(0)


def _index(memory: GuestMemory, driver: Driver) -> None:
    memory.u16[driver.driver + 2] = SIZE + 1


def _indirect(*buffers: tuple[int, int, int], length: int = 0) -> Break:
    def broken(memory: GuestMemory, driver: Driver) -> None:
        driver.chain(buffers, table=0x5000)
        driver.send((0x5000, length or 16 * len(buffers), INDIRECT))

    return broken


def _indirect_loop(memory: GuestMemory, driver: Driver) -> None:
    driver.descriptor(0, BUFFER, 0, NEXT, 0, table=0x5000)
    driver.send((0x5000, 16, INDIRECT))


def _indirect_next(memory: GuestMemory, driver: Driver) -> None:
    driver.descriptor(0, BUFFER, 0, NEXT, 2, table=0x5000)
    driver.send((0x5000, 32, INDIRECT))


BREACHES: dict[str, tuple[Break, str]] = {
    "outside RAM": (_send((HOLE, 1, 0)), "not in RAM"),
    "across the end": (_send((HOLE - 1, 2, 0)), "not in RAM"),
    "beyond 2**64": (_send((2**64 - 1, 2, 0)), "not in RAM"),
    "written ROM": (_send((ROM, 1, WRITE)), "in ROM"),
    "order": (_send((BUFFER, 1, WRITE), (BUFFER, 1, 0)), "follows"),
    "order, empty": (_send((BUFFER, 0, WRITE), (BUFFER, 0, 0)), "follows"),
    "loop": (_loop, "loop"),
    "next": (_next, "outside its table"),
    "head": (lambda memory, driver: driver.offer(SIZE), "begins outside"),
    "index": (_index, "than the ring has"),
    "total": (
        _indirect(*[(0, HOLE, 0)] * (2**32 // HOLE // 64), (0, HOLE, 0)),
        "",
    ),
    "table's length": (_indirect((BUFFER, 1, 0), length=17), "wrong length"),
    "table of nothing": (_send((0x5000, 0, INDIRECT)), "wrong length"),
    "table too large": (_send((0x5000, 16 * 1025, INDIRECT)), "wrong length"),
    "table outside": (_send((HOLE - 16, 32, INDIRECT)), "not in RAM"),
    "table in a table": (_indirect((0x5000, 16, INDIRECT)), "none may be"),
    "table and next": (_send((0x5000, 16, INDIRECT), (0, 1, 0)), "none may be"),
    "order in a table": (_indirect((BUFFER, 1, WRITE), (BUFFER, 1, 0)), "follows"),
    "loop in a table": (_indirect_loop, "loop"),
    "next in a table": (_indirect_next, "outside its table"),
}
del BREACHES["total"]  # needs gigabytes of RAM in the map: see below


@pytest.mark.parametrize("name", BREACHES)
def test_a_breach_is_told_and_nothing_is_taken(name: str) -> None:
    memory, queue, driver = make()
    broken, why = BREACHES[name]
    broken(memory, driver)
    for _ in range(2):  # the same the next time
        with pytest.raises(GuestError, match=why):
            queue.pop()
    assert queue.in_flight == 0 and not driver.used()


def test_four_gigabytes_are_the_most_of_a_chain() -> None:
    memory = GuestMemory()
    memory.add(0, "1G")
    driver = Driver(memory)
    queue = Queue(0, 16, memory)
    place(queue, driver)
    queue.enable()
    driver.send(*[(0, 1 << 30, 0)] * 4)
    chain = queue.pop()
    assert chain is not None and chain.read_bytes == 1 << 32
    driver.send(*[(0, 1 << 30, 0)] * 4, (0, 1, WRITE))
    with pytest.raises(GuestError, match="2\\*\\*32"):
        queue.pop()


def test_an_indirect_table_without_the_feature_is_a_breach() -> None:
    _, queue, driver = make(indirect=False)
    driver.send((0x5000, 16, INDIRECT))
    with pytest.raises(GuestError, match="none may be"):
        queue.pop()


def test_a_rom_may_be_read() -> None:
    memory, queue, driver = make()
    memory.load(ROM, b"rom")
    driver.send((ROM, 3, 0))
    chain = queue.pop()
    assert chain is not None and chain.read() == b"rom"
    assert chain.readable[0].readonly


def test_more_than_the_queue_has_are_never_in_flight() -> None:
    _, queue, driver = make(size=2)
    for _ in range(2):
        driver.send((BUFFER, 1, 0))
        assert queue.pop() is not None
    driver.offer(0)
    with pytest.raises(GuestError, match="in use"):
        queue.pop()


@pytest.mark.parametrize(
    ("part", "gpa", "why"),
    [
        ("desc", 0x1008, "aligned"),
        ("driver", 0x2001, "aligned"),
        ("device", 0x3002, "aligned"),
        ("desc", HOLE - 16, "not in RAM"),
        ("driver", HOLE - 8, "not in RAM"),
        ("device", HOLE - 8, "not in RAM"),
        ("device", ROM, "not in RAM"),
        ("desc", 2**64 - 16, "not in RAM"),
        ("desc", 2**64 - 16 * SIZE, "not in RAM"),
    ],
)
def test_a_ring_that_cannot_be_used_is_refused(part: str, gpa: int, why: str) -> None:
    _, queue, _ = make()
    queue.disable()
    queue.set_address(part, gpa)
    with pytest.raises(GuestError, match=why):
        queue.enable()
    assert not queue.ready and queue.pop() is None


@pytest.mark.parametrize("size", [0, 3, 32, 65536, 2**32 - 1])
def test_a_wrong_size_is_refused(size: int) -> None:
    _, queue, _ = make()
    queue.disable()
    queue.set_size(size)
    with pytest.raises(GuestError, match="size"):
        queue.enable()


def test_parts_that_end_where_ram_ends_are_fine() -> None:
    _, queue, _ = make()
    queue.disable()
    for part, length in (("desc", 16 * SIZE), ("driver", 6 + 2 * SIZE), ("device", 8 * SIZE + 8)):
        queue.set_address(part, HOLE - length)
    queue.enable()
    assert queue.ready


def test_a_queue_in_use_stays_where_it_is() -> None:
    _, queue, _ = make()
    queue.set_address("desc", 0)
    queue.set_size(2)
    assert queue.address("desc") == 0x1000 and queue.size == SIZE
