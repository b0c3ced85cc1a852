"""Block requests served in C do what Python does, and what C cannot is handed to Python."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from struct import pack
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pykvm._abi import ffi, lib
from pykvm.devices.disk.host import HostFile
from pykvm.devices.disk.raw import RawDisk, open_raw
from pykvm.devices.in_c import Latch
from pykvm.devices.io_thread import IoThread
from pykvm.devices.virtio.blk import F_FLUSH, Blk
from pykvm.devices.virtio.core import NEEDS_RESET
from pykvm.devices.virtio.interrupt import NONE, PYTHON, DirectInterrupt
from tests.support.pci_guest import VERSION_1, VirtioPciGuest
from tests.support.vring_driver import WRITE, Driver

pytestmark = pytest.mark.sanitize

SECTORS = 128
CONTENT = bytes(n // 512 for n in range(SECTORS * 512))
HEADER, STATUS, DATA = 0x30000, 0x31000, 0x40000
IN, OUT, FLUSH, GET_ID = 0, 1, 4, 8
FEATURES = VERSION_1 | 1 << F_FLUSH | 1 << 28


class Shim(HostFile):
    """Something that stands before a file, so that C may not go past it."""


class Disk:
    """A guest with a disk on a file, and its driver."""

    def __init__(self, path: Path, *, fast: bool = True, io: IoThread | None = None) -> None:
        self.path = path
        path.write_bytes(CONTENT)
        disk = open_raw(path) if fast else RawDisk(Shim.open(os.fspath(path)))
        self.device = Blk(disk, serial="S1")
        self.guest = VirtioPciGuest(self.device, io=io)
        assert (self.device.fast is not None) is fast
        (self.driver,) = self.guest.start(FEATURES, size=16)

    def request(
        self,
        type: int,
        sector: int = 0,
        data: bytes | int = 0,
        *,
        header: tuple[int, ...] = (16,),
        pieces: int = 1,
        tail: bool = False,
    ) -> tuple[int, bytes, list[tuple[int, int]]]:
        """Make one: its status, what came, and the used ring."""
        memory = self.guest.memory
        memory.write(HEADER, pack("<IIQ", type, 0, sector))
        memory.fill(DATA, 0x8000, 0x77)
        memory.u8[STATUS] = 0xEE
        size = data if isinstance(data, int) else len(data)
        if not isinstance(data, int):
            memory.write(DATA, data)
        chain, at = [], HEADER
        for length in header:
            chain.append((at, length, 0))
            at += length
        flag = 0 if not isinstance(data, int) else WRITE
        for number in range(pieces if size else 0):
            first, last = size * number // pieces, size * (number + 1) // pieces
            chain.append((DATA + first, last - first, flag))
        status = STATUS
        if tail and flag:  # the status ends the last buffer of data
            gpa, length, _ = chain.pop()
            chain.append((gpa, length + 1, flag))
            status = gpa + length
            memory.u8[status] = 0xEE
        else:
            chain.append((STATUS, 1, WRITE))
        self.driver.send(*chain)
        self.guest.notify()
        return memory.u8[status], memory.read(DATA, 0x8000), self.driver.used()

    def close(self) -> None:
        self.guest.close()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "disk.img")
    yield disk
    disk.close()


def served_in_c(disk: Disk) -> int:
    fast = disk.device.fast
    assert fast is not None
    return int(fast.c.requests)


def test_reads_writes_and_flushes_are_served_in_c(disk: Disk) -> None:
    status, data, used = disk.request(IN, 3, 4096, pieces=3)
    assert (status, used) == (0, [(0, 4097)]) and data[:4097] == CONTENT[1536 : 1536 + 4096] + b"w"
    assert disk.request(OUT, 5, b"x" * 1024, pieces=2)[0] == 0
    assert disk.path.read_bytes()[2560:3584] == b"x" * 1024
    assert disk.request(FLUSH)[0] == 0
    assert disk.request(IN, 5, 512, tail=True)[:2][0] == 0
    assert served_in_c(disk) == 4
    counters = disk.device.counters
    assert counters.requests == 4 and counters.bytes_in == 4097 + 513 + 2
    assert counters.latency.count == 4 and counters.errors == 0
    assert counters.as_dict()["requests"] == 4


@pytest.mark.parametrize(
    ("type", "sector", "data", "header", "status"),
    [
        (GET_ID, 0, 20, (16,), 0),
        (99, 0, 512, (16,), 2),
        (IN, SECTORS, 512, (16,), 1),
        (IN, 1 << 60, 512, (16,), 1),
        (OUT, SECTORS - 1, b"y" * 1024, (16,), 1),
        (IN, 0, 100, (16,), 1),
        (IN, 0, 512, (8, 8), 0),
    ],
)
def test_what_takes_thought_is_pythons(
    disk: Disk, type: int, sector: int, data: int | bytes, header: tuple[int, ...], status: int
) -> None:
    assert disk.request(type, sector, data, header=header)[0] == status
    assert served_in_c(disk) == 0 and disk.device.counters.requests == 1
    assert disk.request(IN, 0, 512)[0] == 0 and served_in_c(disk) == 1


REQUEST = st.tuples(
    st.sampled_from([IN, OUT, FLUSH, GET_ID, 11, 13, 99]),
    st.integers(0, SECTORS + 2) | st.just(1 << 55),
    st.sampled_from([0, 1, 20, 100, 512, 1024, 4096, 0x7E00]),
    st.sampled_from([(16,), (16,), (4, 12), (15,), (17,)]),
    st.integers(1, 3),
    st.booleans(),
)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(REQUEST, min_size=1, max_size=8))
def test_c_does_what_python_does(
    tmp_path_factory: pytest.TempPathFactory, requests: list[tuple[Any, ...]]
) -> None:
    folder = tmp_path_factory.mktemp("both")
    both = [Disk(folder / "fast.img"), Disk(folder / "slow.img", fast=False)]
    try:
        for number, (type, sector, size, header, pieces, tail) in enumerate(requests):
            data = bytes([number + 1]) * size if type in (OUT, 11, 13) else size
            answers = [
                disk.request(type, sector, data, header=header, pieces=pieces, tail=tail)
                for disk in both
            ]
            assert answers[0] == answers[1]
        fast, slow = both
        assert fast.path.read_bytes() == slow.path.read_bytes()
        mine, theirs = (each.device.counters for each in both)
        for name in ("requests", "bytes_in", "bytes_out", "errors"):
            assert getattr(mine, name) == getattr(theirs, name), name
        dirty = [each.device.disk for each in both]
        with fast.device.fast:  # type: ignore[union-attr]
            assert dirty[0]._volatile == dirty[1]._volatile  # type: ignore[attr-defined]
    finally:
        for each in both:
            each.close()


def test_an_io_error_is_told_and_the_device_goes_on(disk: Disk) -> None:
    fast = disk.device.fast
    assert fast is not None
    os.truncate(disk.path, 1024)  # C sees a short read; Python says that it is an error
    assert disk.request(IN, 3, 512)[0] == 1
    assert disk.device.counters.errors == 1
    assert disk.request(IN, 1, 512)[0] == 0 and served_in_c(disk) == 1


def test_a_failed_flush_fails_for_ever(disk: Disk) -> None:
    assert disk.request(OUT, 0, b"z" * 512)[0] == 0
    fast = disk.device.fast
    assert fast is not None
    with fast:
        pass
    number = os.dup(fast.c.fd)
    os.dup2(os.pipe()[1], fast.c.fd)  # fdatasync of a pipe: EINVAL
    assert disk.request(FLUSH)[0] == 1
    os.dup2(number, fast.c.fd)
    os.close(number)
    assert isinstance(disk.device.disk, RawDisk) and disk.device.disk.failed is not None
    assert disk.device.disk.failed.errno == errno.EINVAL
    assert disk.request(FLUSH)[0] == 1 and disk.request(OUT, 0, b"z" * 512)[0] == 0


def test_a_breach_ends_in_needs_reset_and_a_reset_goes_on(disk: Disk) -> None:
    disk.driver.offer(77)
    disk.guest.notify()
    assert disk.guest.status & NEEDS_RESET and "descriptor table" in disk.device.broken
    (disk.driver,) = disk.guest.start(FEATURES, size=16)
    assert disk.request(IN, 1, 512)[0] == 0 and served_in_c(disk) == 1


def test_nothing_is_served_before_the_driver_is_ready(disk: Disk) -> None:
    guest, driver = disk.guest, disk.driver
    assert guest.negotiate(FEATURES)
    driver.send((HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE))
    guest.notify()
    assert not driver.used() and served_in_c(disk) == 0


def test_write_through_is_pythons(tmp_path: Path) -> None:
    disk = Disk(tmp_path / "disk.img")
    (disk.driver,) = disk.guest.start(VERSION_1, size=16)  # no F_FLUSH: every write is stable
    assert disk.request(OUT, 1, b"t" * 512)[0] == 0 and served_in_c(disk) == 0
    assert disk.request(IN, 1, 512)[0] == 0 and served_in_c(disk) == 1
    disk.close()


def test_a_file_that_something_stands_before_is_not_lent(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(CONTENT)
    with RawDisk(Shim.open(os.fspath(path))) as disk:
        assert disk.lend() is None


def test_growth_is_seen(disk: Disk) -> None:
    os.truncate(disk.path, 512 * (SECTORS + 8))
    assert disk.device.refresh()
    assert disk.request(IN, SECTORS + 4, 512)[0] == 0 and served_in_c(disk) == 1


def test_the_io_thread_serves_in_c_while_it_waits(tmp_path: Path) -> None:
    io = IoThread()
    try:
        disk = Disk(tmp_path / "disk.img", io=io)
        used: list[tuple[int, int]] = []
        for _ in range(20):
            found = disk.request(IN, 1, 512)[2]
            while not found:
                found = disk.driver.used()
            used += found
        assert used == [(0, 513)] * 20 and served_in_c(disk) == 20
        assert disk.device.counters.notifies >= 1
        # What is Python's goes there and back.
        found = disk.request(GET_ID, 0, 20)[2]
        assert io.settle() and found + disk.driver.used() == [(0, 21)]
        with io.quiesce():
            disk.request(IN, 1, 512)
            assert not disk.driver.used()
            done = threading.Event()
            io.call(done.set)
            assert not done.wait(0.05) and not disk.driver.used()
        assert io.settle() and disk.driver.used() == [(0, 513)]
        disk.close()
        assert disk.device.counters.errors == 0
    finally:
        io.close()


def test_interrupts_go_without_python_where_they_may() -> None:
    fd, latch = os.eventfd(0, os.EFD_NONBLOCK), Latch()
    interrupt = DirectInterrupt(fd, latch, 5)
    assert lib.pykvm_interrupt_raise(interrupt.c) == 0
    assert os.eventfd_read(fd) == 1 and latch.bits == 5
    interrupt.set(PYTHON)
    latch.bits = 0
    assert lib.pykvm_interrupt_raise(interrupt.c) == -1 and latch.bits == 0
    interrupt.set(NONE)
    assert lib.pykvm_interrupt_raise(interrupt.c) == 0 and latch.bits == 5
    with pytest.raises(BlockingIOError):
        os.eventfd_read(fd)
    os.close(fd)


def test_a_vector_reaches_c_while_it_may_be_sent(tmp_path: Path) -> None:
    disk = Disk(tmp_path / "disk.img")
    guest = disk.guest
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    guest.lines.fds[1] = fd
    assert disk.request(IN, 1, 512)[0] == 0 and guest.read(0x800, 1) == 1  # the ISR, by Python
    guest.use_msix()
    assert disk.request(IN, 1, 512)[0] == 0
    assert os.eventfd_read(fd) == 1 and guest.lines.taken() == []
    assert disk.device.counters.interrupts == 2
    guest.write(0x3000 + 16 + 12, 4, 1)  # masked: it waits
    assert disk.request(IN, 1, 512)[0] == 0
    with pytest.raises(BlockingIOError):
        os.eventfd_read(fd)
    guest.write(0x3000 + 16 + 12, 4, 0)
    assert guest.lines.taken() == [1]
    guest.write(20, 1, 0)  # a reset: no vector any more
    assert guest.function.direct[0].c.fd == PYTHON
    disk.close()
    os.close(fd)


def test_the_structures_are_as_large_as_c_says() -> None:
    assert ffi.sizeof("uint64_t[2048]") == 16 * lib.PYKVM_BLK_VECTORS


def test_several_drivers_of_one_lock_do_not_hang(disk: Disk) -> None:
    fast = disk.device.fast
    assert fast is not None
    with fast, fast:  # who has the lock may take it again
        fast.pause()
    fast.resume()
    assert isinstance(disk.driver, Driver)


def test_a_chain_in_hand_is_done_before_a_state_is_taken(disk: Disk) -> None:
    fast = disk.device.fast
    assert fast is not None
    memory, driver = disk.guest.memory, disk.driver
    memory.write(HEADER, pack("<IIQ", GET_ID, 0, 0))
    driver.send((HEADER, 16, 0), (DATA, 20, WRITE), (STATUS, 1, WRITE))
    assert lib.pykvm_blk_serve(fast.c, 0, 0) == lib.PYKVM_BLK_PYTHON
    assert lib.pykvm_blk_serve(fast.c, 0, 0) == lib.PYKVM_BLK_PYTHON  # and nothing else before it
    assert disk.device.queues[0].in_flight == 1
    state = disk.device.state()
    assert driver.used() == [(0, 21)] and memory.read(DATA, 2) == b"S1"
    disk.device.restore(state)
    assert disk.request(IN, 1, 512)[0] == 0 and served_in_c(disk) == 1


def test_a_chain_in_hand_goes_with_a_reset(disk: Disk) -> None:
    fast = disk.device.fast
    assert fast is not None
    disk.driver.send((HEADER, 16, 0))  # no byte for the status
    assert lib.pykvm_blk_serve(fast.c, 0, 0) == lib.PYKVM_BLK_PYTHON
    (disk.driver,) = disk.guest.start(FEATURES, size=16)
    assert not disk.device.broken
    assert disk.request(IN, 1, 512)[0] == 0 and served_in_c(disk) == 1


def test_many_requests_of_both_kinds_share_a_doorbell_and_an_interrupt(disk: Disk) -> None:
    memory, driver = disk.guest.memory, disk.driver
    for number, type in enumerate((IN, GET_ID, IN, 99, IN)):
        header, status, data = HEADER + 16 * number, STATUS + number, DATA + 512 * number
        memory.write(header, pack("<IIQ", type, 0, number))
        chain = (header, 16, 0), (data, 512, WRITE), (status, 1, WRITE)
        driver.send(*chain, first=3 * number)
    disk.guest.notify()
    assert driver.used() == [(0, 513), (3, 20), (6, 513), (9, 0), (12, 513)]
    assert memory.read(STATUS, 5) == b"\0\0\0\2\0"
    assert disk.device.counters.interrupts == 1 and served_in_c(disk) == 3
