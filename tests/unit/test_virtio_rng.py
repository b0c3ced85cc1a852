"""The entropy device: what it gives, and how much of it."""

from __future__ import annotations

import pytest

from pykvm.devices.io_thread import IoThread
from pykvm.devices.virtio.rng import MAX_BYTES, Rng
from tests.support.virtio_guest import VirtioGuest
from tests.support.vring_driver import WRITE
from tests.support.waiting import until

BUFFER = 0x40000


def test_a_buffer_is_filled_from_the_source() -> None:
    asked: list[int] = []

    def source(count: int) -> bytes:
        asked.append(count)
        return bytes(range(count % 256))

    with VirtioGuest(Rng(source=source)) as guest:
        (driver,) = guest.start()
        driver.send((BUFFER, 5, WRITE), (BUFFER + 8, 3, WRITE))
        guest.notify()
        assert driver.used() == [(0, 8)] and asked == [8]
        assert guest.memory.read(BUFFER, 11) == bytes(range(5)) + bytes(3) + bytes(range(5, 8))
        assert guest.interrupts() == 1


def test_by_default_it_is_the_kernel_s_randomness() -> None:
    with VirtioGuest(Rng()) as guest:
        (driver,) = guest.start()
        driver.send((BUFFER, 32, WRITE))
        guest.notify()
        first = guest.memory.read(BUFFER, 32)
        driver.send((BUFFER, 32, WRITE))
        guest.notify()
        assert bytes(32) != first != guest.memory.read(BUFFER, 32) != bytes(32)


def test_a_request_is_bounded_and_one_without_room_is_an_error() -> None:
    with VirtioGuest(Rng()) as guest:
        (driver,) = guest.start()
        driver.send((BUFFER, MAX_BYTES + 1, WRITE))
        driver.send((BUFFER, 10, 0), first=1)
        guest.notify()
        assert driver.used() == [(0, MAX_BYTES), (1, 0)]
        assert guest.device.counters.errors == 1


def test_over_its_rate_requests_wait_and_are_served_later() -> None:
    io = IoThread()
    with VirtioGuest(Rng(rate=2000), io=io) as guest:
        (driver,) = guest.start()
        for number in range(3):
            driver.send((BUFFER, 1000, WRITE), first=number)
        guest.notify()
        assert io.settle()
        used = driver.used()
        assert sum(written for _, written in used) <= 2100

        def all_served() -> bool:
            used.extend(driver.used())
            return len(used) >= 3

        until("the third request", all_served)
        assert len(used) == 3 and all(written for _, written in used)
    io.close()


def test_a_rate_is_at_least_a_byte() -> None:
    with pytest.raises(ValueError, match="rate"):
        Rng(rate=0)
