"""The split virtqueue in C: what a driver may do, and the reference model."""

from __future__ import annotations

import threading
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pykvm.devices.virtio.queue import MAX_PIECES, Queue
from pykvm.errors import GuestError
from pykvm.memory import GuestMemory
from tests.support.vring_compare import Pair
from tests.support.vring_driver import INDIRECT, WRITE, Driver
from tests.support.vring_small import BUFFER, HOLE, SIZE, make, place
from tests.support.waiting import join

pytestmark = pytest.mark.sanitize


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
