"""A virtio device beside its registers: the I/O thread, its state, its life."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from pykvm.devices.io_thread import IoThread
from pykvm.devices.virtio import mmio as registers
from pykvm.devices.virtio.queue import Chain, Queue
from tests.support.virtio_echo import Echo, send
from tests.support.virtio_guest import EVENT_IDX, VERSION_1, VirtioGuest

pytestmark = pytest.mark.sanitize


@pytest.fixture
def guest() -> Iterator[VirtioGuest]:
    with VirtioGuest(Echo()) as guest:
        yield guest


def test_the_io_thread_serves_the_doorbell() -> None:
    io = IoThread()
    with VirtioGuest(Echo(), io=io) as guest:
        driver, _ = guest.start()
        send(guest, driver, b"hello")
        with io.quiesce():
            guest.notify()
            assert driver.used() == []
        assert io.settle()
        assert driver.used() == [(0, 5)] and guest.interrupts() == 1
    io.close()


def test_more_than_a_queue_in_one_go_is_left_for_the_next() -> None:
    """Only another vCPU can do that: here the device itself adds while it serves."""
    io = IoThread()
    left = 100

    class Fed(Echo):
        def _one(self, queue: Queue, chain: Chain) -> int | None:
            nonlocal left
            if left:
                left -= 1
                driver.used()
                driver.offer(0)
            return super()._one(queue, chain)

    with VirtioGuest(Fed(), io=io) as guest:
        driver, _ = guest.start(VERSION_1 | EVENT_IDX)
        send(guest, driver, b"hello")
        guest.device.notify(0)
        assert guest.device.counters.requests >= 8
        while left:
            assert io.settle()
        assert io.settle()
        assert guest.device.counters.requests == 101
        assert guest.device.counters.notifies > 100 // 8
    io.close()


def test_however_often_the_doorbell_rings_one_queue_is_asked_for_once() -> None:
    io = IoThread()

    class Endless(Echo):
        def queue_notify(self, index: int) -> bool:
            return True

    with VirtioGuest(Endless(), io=io) as guest:
        guest.start()
        with io.quiesce():
            for _ in range(100):
                guest.device.notify(0)
            assert len(io._calls) == 1
    io.close()


def test_its_state_survives_json_and_goes_on_elsewhere(guest: VirtioGuest) -> None:
    driver, _ = guest.start(VERSION_1 | EVENT_IDX)
    send(guest, driver, b"hello")
    guest.notify()
    driver.used()
    state = json.loads(json.dumps(guest.window.state()))
    with VirtioGuest(Echo()) as other:
        other.memory[0:0x100000] = guest.memory[0:0x100000]
        other.window.restore(state)
        assert other.read(registers.INTERRUPT_STATUS) == 1
        driver.memory = other.memory
        driver.want_interrupt_at(1)
        send(other, driver, b"again", first=2)
        other.device.resume()
        assert driver.used() == [(2, 5)] and other.interrupts() == 1
        assert other.window.state()["device"]["status"] == state["device"]["status"]


def test_a_state_of_another_device_is_refused(guest: VirtioGuest) -> None:
    state = guest.device.state()
    with pytest.raises(ValueError, match="queues"):
        guest.device.restore(state | {"queues": []})
    with pytest.raises(ValueError, match="features"):
        guest.device.restore(state | {"driver_features": 1 << 60, "status": 11})


def test_a_driver_that_asks_for_too_much_can_be_in_a_state(guest: VirtioGuest) -> None:
    assert not guest.negotiate(VERSION_1 | 1 << 60)
    state = guest.window.state()
    guest.window.restore(state)
    assert guest.window.state() == state


def test_a_device_has_one_transport(guest: VirtioGuest) -> None:
    with pytest.raises(ValueError, match="already"):
        guest.device.attach(guest.memory)


def test_after_close_the_window_is_free(guest: VirtioGuest) -> None:
    guest.window.close()
    guest.window.close()
    assert len(guest.fake.mmio) == 0
