"""Virtio over PCI: what a driver finds, its registers, doorbells and interrupts."""

from __future__ import annotations

from collections.abc import Iterator
from struct import unpack_from

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pykvm.devices import pci
from pykvm.devices.io_thread import IoThread
from pykvm.devices.virtio import pci as virtio
from pykvm.devices.virtio.console import VirtioConsole
from pykvm.devices.virtio.core import NEEDS_RESET
from pykvm.devices.virtio.device import VirtioDevice
from pykvm.devices.virtio.pci_common import NO_VECTOR
from pykvm.devices.virtio.rng import Rng
from tests.support.pci_guest import MESSAGE, VERSION_1, VirtioPciGuest
from tests.support.vring_driver import WRITE


def rng() -> Rng:
    return Rng(source=lambda count: b"r" * count)


@pytest.fixture
def guest() -> Iterator[VirtioPciGuest]:
    with VirtioPciGuest(rng()) as guest:
        yield guest


def test_the_header_says_virtio(guest: VirtioPciGuest) -> None:
    assert guest.config(guest.number, 0) == 0x1044_1AF4
    assert guest.config(guest.number, 8, 1) == 1  # no transitional device
    assert guest.config(guest.number, 0x3D, 1) == 0  # no INTx


def test_the_capabilities_lead_to_every_structure(guest: VirtioPciGuest) -> None:
    found = [unpack_from("<BBB3xII", body, 2) for _, id, body in guest.capabilities() if id == 9]
    assert [(kind, bar) for _, kind, bar, _, _ in found] == [
        (1, 0), (2, 1), (2, 0), (3, 0), (4, 0), (5, 0),
    ]  # fmt: skip
    sizes = {0: virtio.LENGTH, 1: guest.function.bars[1].size}
    for length_of_capability, kind, bar, offset, length in found:
        assert length_of_capability == (20 if kind in (2, 5) else 16)
        assert offset % 4 == 0 and offset + length <= sizes[bar]
    ((_, _, body),) = [each for each in guest.capabilities() if each[1] == 0x11]
    assert unpack_from("<HII", body, 2) == (1, virtio.TABLE, virtio.PENDING)


def test_a_request_is_served_and_the_isr_is_read_once(guest: VirtioPciGuest) -> None:
    (driver,) = guest.start()
    driver.send((0x30000, 16, WRITE))
    guest.notify()
    assert driver.used() == [(0, 16)] and guest.memory.read(0x30000, 16) == b"r" * 16
    assert guest.config(guest.number, pci.STATUS, 2) & pci.HAS_INTERRUPT
    assert guest.read(virtio.ISR, 1) == 1
    assert guest.read(virtio.ISR, 1) == 0
    assert not guest.config(guest.number, pci.STATUS, 2) & pci.HAS_INTERRUPT
    driver.send((0x30000, 8, WRITE))
    guest.write(virtio.NOTIFY, 2, 0)  # the doorbell in memory
    assert driver.used() == [(0, 8)]


def test_msix_takes_the_place_of_the_isr(guest: VirtioPciGuest) -> None:
    (driver,) = guest.start()
    guest.use_msix()
    driver.send((0x30000, 16, WRITE))
    guest.notify()
    assert guest.lines.taken() == [1] and guest.read(virtio.ISR, 1) == 0
    assert guest.lines.routes == [
        {0: (MESSAGE, 0x40)},
        {1: (MESSAGE, 0x41)},
    ]
    guest.device.config_changed()
    assert guest.lines.taken() == [0]
    guest.write(22, 2, 0)
    guest.write(26, 2, NO_VECTOR)
    driver.send((0x30000, 16, WRITE))
    guest.notify()
    assert guest.lines.taken() == [] and len(driver.used()) == 2


def test_a_vector_that_there_is_not_is_refused(guest: VirtioPciGuest) -> None:
    for offset in (16, 26):
        guest.write(offset, 2, 1)
        assert guest.read(offset, 2) == 1
        guest.write(offset, 2, 2)
        assert guest.read(offset, 2) == NO_VECTOR
    guest.write(22, 2, 5)  # no such queue
    guest.write(26, 2, 0)
    assert guest.read(26, 2) == NO_VECTOR and guest.read(24, 2) == 0


def test_without_an_interrupt_controller_there_is_no_msix() -> None:
    with VirtioPciGuest(rng(), msix=False) as guest:
        assert [id for _, id, _ in guest.capabilities()] == [9] * 6
        (driver,) = guest.start()
        assert guest.read(16, 2) == NO_VECTOR
        assert guest.read(virtio.TABLE, 4) == 0
        driver.send((0x30000, 16, WRITE))
        guest.notify()
        assert guest.read(virtio.ISR, 1) == 1


def test_registers_read_back_and_a_reset_clears_them(guest: VirtioPciGuest) -> None:
    (driver,) = guest.start()
    assert [guest.read(at, 4) for at in (32, 40, 48)] == [
        driver.desc, driver.driver, driver.device,
    ]  # fmt: skip
    assert guest.read(28, 2) == 1 and guest.read(30, 2) == 0 and guest.read(24, 2) == 8
    assert guest.read(18, 2) == 1
    guest.write(8, 4, 1)
    assert guest.read(12, 4) == 1  # VERSION_1
    guest.write(4, 4, 9)
    guest.write(0, 4, 1)
    assert guest.read(4, 4) & 1
    guest.write(28, 2, 0)  # may not be written
    assert guest.read(28, 2) == 1
    guest.write(20, 1, 0)
    assert guest.status == 0
    assert guest.read(28, 2) == 0 and guest.read(32, 4) == 0 and guest.read(24, 2) == 64
    assert guest.read(26, 2) == NO_VECTOR and guest.read(16, 2) == NO_VECTOR


@pytest.mark.parametrize(("offset", "size"), [(0, 1), (20, 4), (20, 2), (22, 4), (32, 8), (33, 4)])
def test_other_widths_are_no_accesses(guest: VirtioPciGuest, offset: int, size: int) -> None:
    guest.start()
    before = guest.function.state()
    guest.write(offset, size, 0)
    assert guest.read(offset, size) == 0
    assert guest.function.state() == before


def test_addresses_have_64_bits(guest: VirtioPciGuest) -> None:
    guest.write(22, 2, 0)
    for offset in (32, 40, 48):
        guest.write(offset + 4, 4, 0x12)
        guest.write(offset, 4, 0x3456_7000)
        assert guest.read(offset, 4) == 0x3456_7000 and guest.read(offset + 4, 4) == 0x12
    assert guest.device.queues[0].address("desc") == 0x12_3456_7000


def test_the_configuration_of_the_device() -> None:
    with VirtioPciGuest(VirtioConsole(columns=80, rows=25)) as guest:
        assert guest.read(virtio.DEVICE_CONFIG, 2) == 80
        assert guest.read(virtio.DEVICE_CONFIG + 2, 2) == 25
        assert guest.read(virtio.DEVICE_CONFIG, 4) == 25 << 16 | 80
        assert guest.read(virtio.NOTIFY - 4, 4) == 0
        generation = guest.read(21, 1)
        guest.device.config_changed()
        assert guest.read(21, 1) == generation + 1


def test_a_window_in_configuration_space_reaches_the_registers(guest: VirtioPciGuest) -> None:
    ((at, _, _),) = [each for each in guest.capabilities() if each[2][3] == virtio.PCI_CFG]

    def through(offset: int, size: int, value: int | None = None, bar: int = 0) -> int:
        guest.config(guest.number, at + 4, 1, bar)
        guest.config(guest.number, at + 8, 4, offset)
        guest.config(guest.number, at + 12, 4, size)
        return guest.config(guest.number, at + 16, size if size in (1, 2, 4) else 4, value)

    through(20, 1, 3)
    assert guest.status == 3 and through(20, 1) == 3
    assert through(18, 2) == 1
    (driver,) = guest.start()
    driver.send((0x30000, 16, WRITE))
    through(0, 2, 0, bar=1)
    assert driver.used() == [(0, 16)]
    # Nowhere: no access, and what was there before is what is read.
    assert through(20, 1) == 15
    for offset, size, bar in ((20, 3, 0), (20, 1, 2), (21, 2, 0), (0x4000, 4, 0), (1 << 31, 4, 0)):
        through(offset, size, 0, bar)
        assert guest.status == 15


def test_what_a_driver_breaks_is_told(guest: VirtioPciGuest) -> None:
    (driver,) = guest.start()
    guest.use_msix()
    driver.offer(77)
    guest.notify()
    assert guest.status & NEEDS_RESET and guest.lines.taken() == [0]


def test_doorbells_ring_the_io_thread() -> None:
    io = IoThread()
    try:
        with VirtioPciGuest(VirtioConsole(), io=io) as guest:
            drivers = guest.start()
            device = guest.device
            assert isinstance(device, VirtioConsole) and not device.synchronous
            guest.memory[0x30000:0x30003] = b"abc"
            for send in (guest.notify, lambda index: guest.write(virtio.NOTIFY + 4, 2, index)):
                drivers[1].send((0x30000, 3, 0))
                send(1)
                assert io.settle() and drivers[1].used() == [(0, 0)]
            assert device.read() == b"abcabc"
            # The doorbells move with the BAR.
            guest.config(guest.number, pci.BARS + 4, value=0xC100)
            guest.doorbells = guest.bar(guest.number, 1)
            drivers[1].send((0x30000, 3, 0))
            guest.notify(1)
            assert io.settle() and drivers[1].used() == [(0, 0)]
    finally:
        io.close()


def test_state_goes_on_where_it_was(guest: VirtioPciGuest) -> None:
    (driver,) = guest.start()
    guest.use_msix()
    driver.send((0x30000, 16, WRITE))
    guest.notify()
    state = guest.function.state()
    with VirtioPciGuest(rng()) as other:
        other.memory.load(0, guest.memory.read(0, 1 << 20))
        other.function.restore(state)
        driver.memory = other.memory
        assert other.status == guest.status and driver.used() == [(0, 16)]
        assert other.lines.routes == [{0: (MESSAGE, 0x40), 1: (MESSAGE, 0x41)}]
        driver.send((0x30000, 16, WRITE))
        other.notify()
        assert driver.used() == [(0, 16)] and other.lines.taken() == [1]


def test_a_device_with_too_many_queues_is_refused() -> None:
    class Many(VirtioDevice):
        queue_max_sizes = (8,) * 65

    with pytest.raises(ValueError, match="up to 64 queues"):
        VirtioPciGuest(Many())


ACCESS = st.tuples(
    st.sampled_from(["memory", "port", "config"]),
    st.integers(0, 63)
    | st.integers(0, virtio.LENGTH - 1)
    | st.sampled_from([virtio.ISR, virtio.DEVICE_CONFIG, virtio.NOTIFY, virtio.TABLE, 3 << 12]),
    st.sampled_from([1, 2, 4, 8]),
    st.none() | st.integers(0, (1 << 64) - 1) | st.sampled_from([0, 1, 3, 11, 15, 0x10000]),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(ACCESS, max_size=60), st.booleans())
def test_no_access_raises_and_a_fresh_driver_works_after_it(
    accesses: list[tuple[str, int, int, int | None]], started: bool
) -> None:
    with VirtioPciGuest(rng()) as guest:
        if started:
            guest.start()
            guest.use_msix()
        for where, offset, size, value in accesses:
            value = None if value is None else value & (1 << 8 * size) - 1
            if where == "memory":
                guest.memory_access(guest.registers + offset, size, value)
            elif where == "port" and size < 8:
                guest.port(guest.doorbells + offset % 4, size, value)
            elif size < 8:
                guest.config(guest.number, offset % 252, size, value)
        guest.config(guest.number, pci.BARS, value=guest.registers)
        guest.config(guest.number, pci.BARS + 4, value=guest.doorbells)
        guest.config(guest.number, pci.COMMAND, 2, 7)
        (driver,) = guest.start(VERSION_1)
        driver.send((0x30000, 16, WRITE))
        guest.notify()
        assert driver.used() == [(0, 16)]
