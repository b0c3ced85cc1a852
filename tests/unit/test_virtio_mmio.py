"""The core of virtio devices and their MMIO registers, as a driver meets them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from pykvm.devices.virtio import mmio as registers
from pykvm.devices.virtio.core import (
    ACKNOWLEDGE,
    DRIVER,
    DRIVER_OK,
    FAILED,
    FEATURES_OK,
    NEEDS_RESET,
)
from tests.support.virtio_echo import BUFFER, Echo, send
from tests.support.virtio_guest import EVENT_IDX, INDIRECT, VERSION_1, VirtioGuest, latch_bits
from tests.support.vring_driver import Driver
from tests.support.waiting import join

pytestmark = pytest.mark.sanitize


@pytest.fixture
def guest() -> Iterator[VirtioGuest]:
    with VirtioGuest(Echo()) as guest:
        yield guest


# ---- registers -----------------------------------------------------------------------------------


def test_what_it_is_stands_in_its_registers(guest: VirtioGuest) -> None:
    assert guest.read(0).to_bytes(4, "little") == b"virt"
    assert (guest.read(4), guest.read(8)) == (2, 42)
    assert guest.features() == VERSION_1 | EVENT_IDX | INDIRECT | 1 << 3
    assert guest.status == 0 and guest.read(registers.CONFIG_GENERATION) == 0
    for select, size in ((0, 16), (1, 16), (2, 0), (0xFFFFFFFF, 0)):
        guest.write(registers.QUEUE_SEL, select)
        assert guest.read(registers.QUEUE_SIZE_MAX) == size
        assert guest.read(registers.QUEUE_READY) == 0
    for select in (2, 3, 4, 0xFFFFFFFF):
        guest.write(registers.DEVICE_FEATURES_SEL, select)
        assert guest.read(registers.DEVICE_FEATURES) == 0
    assert guest.read(0x0B0) == guest.read(0x0BC) == 0xFFFFFFFF


@pytest.mark.parametrize("offset", [0, 4, 8, 0x10, 0x34, 0x44, 0x60, 0x70, 0xFC])
def test_registers_are_32_bits_wide_and_aligned(guest: VirtioGuest, offset: int) -> None:
    guest.start()
    for size in (1, 2, 8):
        assert guest.read(offset, size) == 0
    for off in (1, 2, 3):
        assert guest.read(offset + off) == 0


def test_writes_of_other_widths_do_nothing(guest: VirtioGuest) -> None:
    for size in (1, 2, 8):
        guest.write(registers.STATUS, ACKNOWLEDGE, size)
        guest.write(registers.STATUS - 1, ACKNOWLEDGE << 8, size)
    assert guest.status == 0


def test_every_access_of_every_width_is_answered(guest: VirtioGuest) -> None:
    for start in (False, True):
        if start:
            guest.start()
        for offset in (*range(0x110), 0x7FE, 0xFF8, 0xFFF):
            for size in (1, 2, 4, 8):
                assert 0 <= guest.read(offset, size) < 1 << 8 * size


# ---- the status machine --------------------------------------------------------------------------


def test_a_driver_starts_as_the_specification_says(guest: VirtioGuest) -> None:
    guest.start()
    assert guest.status == ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
    assert guest.device.activated and guest.device.activations == 1  # type: ignore[attr-defined]


def test_bits_come_in_their_order(guest: VirtioGuest) -> None:
    guest.write(registers.STATUS, DRIVER_OK)
    assert guest.status == 0
    guest.write(registers.STATUS, FEATURES_OK)
    assert guest.status == 0
    guest.write(registers.STATUS, DRIVER | DRIVER_OK | FAILED)
    assert guest.status == DRIVER | FAILED
    assert not guest.device.activated


def test_bits_stay_until_a_reset(guest: VirtioGuest) -> None:
    guest.start()
    guest.write(registers.STATUS, ACKNOWLEDGE)
    assert guest.status & DRIVER_OK
    guest.write(registers.STATUS, 0xFFFFFF00)  # its low byte counts
    assert guest.status == 0 and not guest.device.activated


@pytest.mark.parametrize(
    "features", [0, EVENT_IDX, VERSION_1 | 1, VERSION_1 | 1 << 4, VERSION_1 | 1 << 63]
)
def test_features_that_do_not_fit_are_not_ok(guest: VirtioGuest, features: int) -> None:
    assert not guest.negotiate(features)
    guest.write(registers.STATUS, guest.status | DRIVER_OK)
    assert not guest.status & DRIVER_OK


def test_features_are_settled_by_features_ok(guest: VirtioGuest) -> None:
    assert guest.negotiate(VERSION_1 | 1 << 3)
    guest.write(registers.DRIVER_FEATURES_SEL, 0)
    guest.write(registers.DRIVER_FEATURES, EVENT_IDX)
    assert guest.device.has(3) and not guest.device.has(29)
    guest.negotiate(VERSION_1)
    assert not guest.device.has(3)


def test_the_driver_cannot_set_needs_reset(guest: VirtioGuest) -> None:
    guest.write(registers.STATUS, NEEDS_RESET | ACKNOWLEDGE)
    assert guest.status == ACKNOWLEDGE


# ---- queues --------------------------------------------------------------------------------------


def test_a_request_is_served_and_interrupts(guest: VirtioGuest) -> None:
    driver, _ = guest.start()
    send(guest, driver, b"hello")
    guest.notify()
    assert driver.used() == [(0, 5)]
    assert guest.memory.read(BUFFER + 0x100, 5) == b"hello"
    assert guest.interrupts() == 1 and guest.acknowledge() == 1
    assert latch_bits(guest) == 0
    counters = guest.device.counters
    assert (counters.requests, counters.bytes_out, counters.bytes_in) == (1, 5, 5)
    assert (counters.notifies, counters.interrupts, counters.errors) == (1, 1, 0)
    assert counters.latency.count == 1


def test_a_batch_interrupts_once(guest: VirtioGuest) -> None:
    driver, _ = guest.start()
    for number in range(4):
        send(guest, driver, b"hello", first=2 * number)
    guest.notify()
    assert len(driver.used()) == 4 and guest.interrupts() == 1


def test_acknowledging_one_interrupt_leaves_the_other(guest: VirtioGuest) -> None:
    driver, _ = guest.start()
    send(guest, driver, b"hello")
    guest.notify()
    guest.device.config_changed()
    assert guest.read(registers.INTERRUPT_STATUS) == 3
    guest.write(registers.INTERRUPT_ACK, 1)
    assert guest.read(registers.INTERRUPT_STATUS) == 2
    guest.write(registers.INTERRUPT_ACK, 2, 1)  # of another width: nothing
    guest.write(registers.INTERRUPT_STATUS, 2)  # for reading
    assert guest.read(registers.INTERRUPT_STATUS) == 2
    assert guest.read(registers.INTERRUPT_ACK) == 0


def test_doorbells_before_driver_ok_and_of_no_queue_are_ignored(guest: VirtioGuest) -> None:
    guest.notify(0)
    driver, _ = guest.start()
    send(guest, driver, b"hello")
    for index in (2, 0xFFFF, 0xFFFFFFFF):
        guest.notify(index)
    assert driver.used() == [] and guest.device.counters.notifies == 0


def test_a_queue_before_features_ok_is_a_breach(guest: VirtioGuest) -> None:
    guest.write(registers.QUEUE_SEL, 0)
    guest.write(registers.QUEUE_READY, 1)
    assert guest.status == NEEDS_RESET
    assert "FEATURES_OK" in guest.device.broken
    assert guest.interrupts() == 0  # nobody listens yet


def test_a_queue_that_cannot_be_is_a_breach(guest: VirtioGuest) -> None:
    assert guest.negotiate()
    guest.set_up(0, Driver(guest.memory, 3))
    assert guest.status & NEEDS_RESET and guest.read(registers.QUEUE_READY) == 0
    assert "size" in guest.device.broken


def test_addresses_have_64_bits(guest: VirtioGuest) -> None:
    assert guest.negotiate()
    high = Driver(guest.memory, 4, desc=0x1234_5678_9ABC_DEF0, driver=2 << 40, device=3 << 40)
    guest.set_up(0, high)
    queue = guest.device.queues[0]
    assert [queue.address(part) for part in ("desc", "driver", "device")] == [
        high.desc, high.driver, high.device,
    ]  # fmt: skip


def test_a_queue_can_be_stopped_and_started_anew(guest: VirtioGuest) -> None:
    driver, _ = guest.start()
    guest.write(registers.QUEUE_SEL, 0)
    assert guest.read(registers.QUEUE_READY) == 1
    guest.write(registers.QUEUE_READY, 0)
    assert guest.read(registers.QUEUE_READY) == 0
    assert guest.device.drains  # type: ignore[attr-defined]
    send(guest, driver, b"hello")
    guest.notify()
    assert driver.used() == []
    guest.write(registers.QUEUE_READY, 1)
    guest.notify()
    assert driver.used() == [(0, 5)]


# ---- breaches and resets -------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["ring", "request", "config"])
def test_a_breach_asks_for_a_reset_and_a_fresh_driver_works(guest: VirtioGuest, what: str) -> None:
    driver, _ = guest.start()
    if what == "ring":
        driver.offer(99)
        guest.notify()
    elif what == "request":
        send(guest, driver, b"bad")
        guest.notify()
    else:
        guest.write(registers.CONFIG + 0x400, 1)
    assert guest.status & NEEDS_RESET and guest.device.broken
    assert guest.interrupts() == 1 and guest.acknowledge() == 2
    assert guest.device.counters.errors == 1
    send(guest, driver, b"hello")
    guest.notify()
    assert driver.used() == []
    guest.write(registers.STATUS, DRIVER_OK)  # nothing comes back without a reset
    assert guest.status & NEEDS_RESET
    driver, _ = guest.start()
    assert not guest.status & NEEDS_RESET and not guest.device.broken
    send(guest, driver, b"hello")
    guest.notify()
    assert driver.used() == [(0, 5)]


def test_a_breach_after_good_requests_still_tells_of_them(guest: VirtioGuest) -> None:
    driver, _ = guest.start()
    send(guest, driver, b"hello")
    driver.offer(99)
    guest.notify()
    assert driver.used() == [(0, 5)]
    assert guest.acknowledge() & 2


def test_a_reset_amid_io_makes_it_stale(guest: VirtioGuest) -> None:
    _, driver = guest.start()
    device: Any = guest.device
    send(guest, driver, b"hello")
    guest.notify(1)
    (chain,) = device.kept
    assert device.queues[1].in_flight == 1
    _, driver = guest.start()
    assert device.drains
    device.complete(device.queues[1], chain, 5)
    assert driver.used() == [] and guest.interrupts() == 0
    assert device.counters.requests == 0 and device.counters.resets == 2
    send(guest, driver, b"hello")
    guest.notify(1)
    device.complete(device.queues[1], device.kept[-1], 5)
    assert driver.used() == [(0, 5)] and guest.interrupts() == 1


def test_a_reset_takes_pending_interrupts_back(guest: VirtioGuest) -> None:
    driver, _ = guest.start()
    send(guest, driver, b"hello")
    guest.notify()
    assert latch_bits(guest) == 1
    guest.write(registers.STATUS, 0)
    assert latch_bits(guest) == 0


def test_completions_from_other_threads_interrupt_once_a_batch(guest: VirtioGuest) -> None:
    _, driver = guest.start()
    device: Any = guest.device
    for number in range(4):
        send(guest, driver, b"hello", first=2 * number)
    guest.notify(1)
    done = [(chain, 3, number == 1) for number, chain in enumerate(device.kept)]
    thread = threading.Thread(target=device.complete_many, args=(device.queues[1], done))
    thread.start()
    join(thread)
    assert [head for head, _ in driver.used()] == [0, 2, 4, 6]
    assert guest.interrupts() == 1
    assert (device.counters.requests, device.counters.errors) == (4, 1)


# ---- configuration -------------------------------------------------------------------------------


def test_the_configuration_is_read_and_written_at_any_width(guest: VirtioGuest) -> None:
    assert guest.read(registers.CONFIG, 1) == ord("0")
    assert guest.read(registers.CONFIG + 2, 2) == int.from_bytes(b"23", "little")
    assert guest.read(registers.CONFIG + 8, 8) == int.from_bytes(b"89abcdef", "little")
    assert guest.read(registers.CONFIG + 14, 4) == int.from_bytes(b"ef", "little")
    assert guest.read(registers.CONFIG + 0xE00) == 0
    guest.write(registers.CONFIG + 4, 0x5859, 2)
    assert guest.read(registers.CONFIG + 4) == int.from_bytes(b"YX67", "little")


def test_a_change_of_the_configuration_has_a_generation_and_an_interrupt(
    guest: VirtioGuest,
) -> None:
    guest.device.config_changed()
    assert guest.read(registers.CONFIG_GENERATION) == 1 and guest.interrupts() == 0
    guest.start()
    guest.device.config_changed()
    assert guest.read(registers.CONFIG_GENERATION) == 2
    assert guest.interrupts() == 1 and guest.acknowledge() == 2
