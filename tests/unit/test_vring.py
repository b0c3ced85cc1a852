"""The split virtqueue in C: what a driver may do, what it may not, and the reference model."""

from __future__ import annotations

import threading
from collections.abc import Callable
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pykvm.devices.virtio.queue import MAX_PIECES, Queue
from pykvm.errors import GuestError
from pykvm.memory import GuestMemory
from tests.support.vring_compare import Pair
from tests.support.vring_driver import INDIRECT, NEXT, WRITE, Driver
from tests.support.waiting import join

pytestmark = pytest.mark.sanitize

SIZE = 8
ROM = 0x80000
HOLE = 0x40000
BUFFER = 0x10000


def make(
    size: int = SIZE, *, event_idx: bool = False, indirect: bool = True, max_size: int = 16
) -> tuple[GuestMemory, Queue, Driver]:
    """RAM from 0 to HOLE, in two regions that adjoin at half of it; a ROM."""
    memory = GuestMemory()
    memory.add(0, HOLE // 2)
    memory.add(ROM, 0x1000, readonly=True)
    memory.add(HOLE // 2, HOLE // 2)
    queue = Queue(0, max_size, memory)
    driver = Driver(memory, size, event_idx=event_idx)
    place(queue, driver)
    queue.enable(event_idx=event_idx, indirect=indirect)
    return memory, queue, driver


def place(queue: Queue, driver: Driver) -> None:
    queue.set_size(driver.size)
    for part in ("desc", "driver", "device"):
        queue.set_address(part, getattr(driver, part))


def test_a_chain_comes_whole_and_in_order_without_a_copy() -> None:
    memory, queue, driver = make()
    driver.send((BUFFER, 4, 0), (BUFFER + 8, 2, 0), (BUFFER + 16, 3, WRITE), first=2)
    memory.write(BUFFER, b"abcd")
    memory.write(BUFFER + 8, b"ef")
    chain = queue.pop()
    assert chain is not None
    assert (chain.head, chain.read_bytes, chain.write_bytes) == (2, 6, 3)
    assert chain.read() == b"abcdef" and chain.read(5) == b"abcde"
    assert chain.write(b"xyz!") == 3
    assert memory.read(BUFFER + 16, 4) == b"xyz\0"
    memory.write(BUFFER, b"A")
    assert bytes(chain.readable[0]) == b"Abcd"
    assert queue.in_flight == 1
    assert queue.push(chain, 3)
    assert driver.used() == [(2, 3)]
    assert queue.in_flight == 0
    assert queue.pop() is None


def test_what_is_given_back_comes_in_the_order_of_its_pushes() -> None:
    _, queue, driver = make()
    for head in (5, 1, 3):
        driver.send((BUFFER, 1, WRITE), first=head)
    chains = [queue.pop(), queue.pop(), queue.pop()]
    for chain, written in zip(reversed(chains), (7, 8, 9), strict=True):
        assert chain is not None
        queue.push(chain, written)
    assert driver.used() == [(3, 7), (1, 8), (5, 9)]


def test_indices_wrap_around() -> None:
    _, queue, driver = make()
    for number in range(70000):
        driver.offer(number % SIZE)
        chain = queue.pop()
        assert chain is not None and chain.head == number % SIZE
        queue.push(chain, number)
        if number % SIZE == 0:
            assert driver.used()[-1] == (chain.head, number)
    assert queue.pop() is None


@pytest.mark.parametrize(
    ("desc", "driver", "device"),
    [
        (0x4000, 0x1000, 0x1800),
        (0x3000 - 16 * 3, 0x1000, 0x1800),
        (0x4000, 0x3000 - 10, 0x1800),
        (0x4000, 0x1000, 0x3000 - 12),
    ],
    ids=["none", "desc", "driver", "device"],
)
def test_buffers_and_rings_may_span_regions_that_adjoin(
    desc: int, driver: int, device: int
) -> None:
    border = 0x3000
    memory = GuestMemory()
    memory.add(0, border)
    memory.add(border, 0x3000)
    ring = Driver(memory, 64, desc=desc, driver=driver, device=device, event_idx=True)
    queue = Queue(0, 64, memory)
    place(queue, ring)
    queue.enable(event_idx=True)
    at = 0x5000 if desc < border else 0x2F80
    for number in range(20):
        buffer = border - 20 + number if at < border else at
        ring.send((buffer, 32, WRITE), first=number)
        chain = queue.pop()
        assert chain is not None
        expected = [20 - number, 12 + number] if at < border else [32]
        if at < border and driver == 0x1000 and device == 0x1800:
            assert [len(view) for view in chain.writable] == expected
            assert chain.write(bytes(range(32))) == 32
            assert memory.read(buffer, 32) == bytes(range(32))
        assert queue.push(chain, 32)
    assert ring.used() == [(number, 32) for number in range(20)]
    assert queue.pop() is None and ring.notify_at == 20


def test_empty_buffers_are_left_out() -> None:
    _, queue, driver = make()
    driver.send((BUFFER, 0, 0), (BUFFER, 3, 0), (0xDEAD_0000_0000, 0, WRITE))
    chain = queue.pop()
    assert chain is not None
    assert [len(view) for view in chain.readable] == [3] and not chain.writable
    driver.send((0, 0, 0))
    chain = queue.pop()
    assert chain is not None and not chain.readable and chain.read() == b""


@pytest.mark.parametrize("table", [0x5000, 0x5001, HOLE // 2 - 24])
def test_an_indirect_table_may_lie_anywhere_and_follow_direct_descriptors(table: int) -> None:
    memory, queue, driver = make()
    driver.chain([(BUFFER, 2, 0), (BUFFER + 4, 3, WRITE), (BUFFER + 8, 5, WRITE)], table=table)
    # Its own write flag means nothing (2.7.5.3.2).
    driver.send((BUFFER + 16, 1, 0), (table, 48, INDIRECT | WRITE))
    chain = queue.pop()
    assert chain is not None
    assert [len(view) for view in chain.readable] == [1, 2]
    assert [len(view) for view in chain.writable] == [3, 5]
    memory.write(BUFFER, b"hi")
    assert chain.read() == b"\0hi"


def test_an_indirect_chain_may_be_longer_than_the_queue() -> None:
    memory, queue, driver = make(size=2)
    driver.chain([(BUFFER + n, 1, 0) for n in range(200)], table=0x5000)
    driver.send((0x5000, 200 * 16, INDIRECT))
    memory.write(BUFFER, bytes(range(200)))
    chain = queue.pop()
    assert chain is not None and chain.read() == bytes(range(200))


def test_chains_of_many_pieces_are_a_breach_not_a_host_s_memory() -> None:
    memory = GuestMemory()
    for page in range(64):
        memory.add(page * 0x1000, 0x1000)
    driver = Driver(memory, 1, desc=0x1000, driver=0x2000, device=0x3000)
    queue = Queue(0, 1, memory)
    place(queue, driver)
    queue.enable(indirect=True)
    # Each of these touches sixteen regions.
    driver.chain([(0x10800, 0x10000, 0) for _ in range(MAX_PIECES // 16)], table=0x5000)
    driver.send((0x5000, MAX_PIECES, INDIRECT))
    with pytest.raises(GuestError, match="more pieces"):
        queue.pop()


# ---- breaches -----------------------------------------------------------------------------------


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


# ---- resets -------------------------------------------------------------------------------------


def test_a_chain_from_before_a_reset_goes_nowhere() -> None:
    memory, queue, driver = make()
    driver.send((BUFFER, 1, WRITE))
    stale = queue.pop()
    assert stale is not None
    queue.disable()
    assert not queue.push(stale, 1)
    queue.enable()
    assert not queue.push(stale, 1)
    assert memory.u16[driver.device + 2] == 0
    fresh = queue.pop()
    assert fresh is not None
    assert not queue.push(stale, 1) and queue.push(fresh, 1)


def test_a_chain_is_given_back_once() -> None:
    _, queue, driver = make()
    driver.send((BUFFER, 1, WRITE))
    chain = queue.pop()
    assert chain is not None
    assert queue.push(chain) and not queue.push(chain)
    assert driver.used() == [(0, 0)]


def test_its_state_goes_on_elsewhere() -> None:
    memory, queue, driver = make(event_idx=True)
    for _ in range(3):
        driver.send((BUFFER, 1, WRITE))
        chain = queue.pop()
        assert chain is not None
        with pytest.raises(ValueError, match="in flight"):
            queue.state()
        queue.push(chain)
    driver.used()
    other = Queue(0, 16, memory)
    other.restore(queue.state())
    driver.send((BUFFER, 1, WRITE), first=4)
    chain = other.pop()
    assert chain is not None and chain.head == 4
    other.push(chain, 1)
    assert driver.used() == [(4, 1)]


# ---- notifications and interrupts ----------------------------------------------------------------


def test_an_empty_ring_asks_for_notifications_by_its_flag() -> None:
    _, queue, driver = make()
    driver.send((BUFFER, 1, 0))
    assert queue.pop() is not None
    assert driver.quiet
    assert queue.pop() is None
    assert not driver.quiet
    assert not queue.has_work()
    driver.send((BUFFER, 1, 0))
    assert queue.has_work()


def test_an_empty_ring_asks_for_notifications_by_an_index() -> None:
    _, queue, driver = make(event_idx=True)
    for number in range(1, 20):
        driver.send((BUFFER, 1, 0))
        chain = queue.pop()
        assert chain is not None
        queue.push(chain)
        assert driver.notify_at != number
        assert queue.pop() is None
        assert driver.notify_at == number
    assert not driver.quiet


def test_interrupts_are_wanted_unless_the_flag_says_not() -> None:
    _, queue, driver = make()
    assert not queue.should_interrupt()
    for flag in (0, 1, 0):
        driver.no_interrupts(flag)
        driver.send((BUFFER, 1, 0))
        chain = queue.pop()
        assert chain is not None
        queue.push(chain)
        assert queue.should_interrupt() == (not flag)
        assert not queue.should_interrupt()


def test_interrupts_are_wanted_when_the_used_index_passes_the_event() -> None:
    _, queue, driver = make(event_idx=True)
    wanted = []
    for number in range(6):
        driver.want_interrupt_at(number if number % 2 else number + 1000)
        driver.send((BUFFER, 1, 0))
        chain = queue.pop()
        assert chain is not None
        queue.push(chain)
        wanted.append(queue.should_interrupt())
    assert wanted == [False, True] * 3


def test_every_queue_wide_number_of_pushes_wants_one() -> None:
    """After 65536 pushes without a look the old index says nothing any more."""
    _, queue, driver = make(event_idx=True)
    driver.want_interrupt_at(30000)
    for _ in range(65536):
        driver.offer(0)
        chain = queue.pop()
        assert chain is not None
        queue.push(chain)
    assert queue.should_interrupt()
    assert not queue.should_interrupt()


def test_pushes_from_several_threads_are_all_there() -> None:
    _, queue, driver = make(size=16)
    done: list[int] = []
    chains = []

    def push(mine: list[object]) -> None:
        for chain in mine:
            queue.push(chain)  # type: ignore[arg-type]

    for _ in range(50):
        for head in range(16):
            driver.send((BUFFER, 1, 0), first=head)
        chains = [queue.pop() for _ in range(16)]
        threads = [threading.Thread(target=push, args=(chains[n::4],)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            join(thread)
        done += sorted(head for head, _ in driver.used())
    assert done == list(range(16)) * 50


# ---- against the model --------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 120))
def test_it_does_what_the_model_does(seed: int, steps: int) -> None:
    pair = Pair(Random(seed))
    for _ in range(steps):
        pair.step()  # Mismatch, where one does what the other does not
    assert pair.queue.ready == pair.model.enabled
