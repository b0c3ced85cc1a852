"""Claims on the bus, against a plain model: a dict from address to claim."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pykvm._abi import lib
from pykvm.devices.bus import Bus
from pykvm.devices.claim import Claim
from pykvm.errors import BusOverlapError
from tests.support.fake_vcpu import HLT, FakeRun, mmio, pio
from tests.support.ports import Ports


class BusAgainstModel(RuleBasedStateMachine):
    """Claims come and go; who serves an address is always what a dict says."""

    def __init__(self) -> None:
        super().__init__()
        self.bus = Bus("pio", [])
        self.model: dict[int, Claim] = {}

    @rule(first=st.integers(-2, 70), length=st.integers(0, 9))
    def claim(self, first: int, length: int) -> None:
        wanted = range(first, first + length)
        if first < 0 or length < 1:
            with pytest.raises(ValueError):
                self.bus.ignore(first, length)
        elif any(port in self.model for port in wanted):
            with pytest.raises(BusOverlapError):
                self.bus.ignore(first, length)
        else:
            claim = self.bus.ignore(first, length)
            self.model |= dict.fromkeys(wanted, claim)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        claim = self.model[data.draw(st.sampled_from(sorted(self.model)))]
        claim.release()
        claim.release()
        self.model = {port: c for port, c in self.model.items() if c is not claim}

    @rule(port=st.integers(0, 90))
    def look_up(self, port: int) -> None:
        assert self.bus.find(port) is self.model.get(port)

    @invariant()
    def counts(self) -> None:
        assert len(self.bus) == len(set(self.model.values()))


TestBusAgainstModel = BusAgainstModel.TestCase


@pytest.mark.sanitize
@given(
    claims=st.lists(st.tuples(st.integers(0, 200), st.integers(1, 20)), max_size=30),
    ports=st.lists(st.integers(0, 230), min_size=1, max_size=40),
)
def test_c_finds_what_python_finds(claims: list[tuple[int, int]], ports: list[int]) -> None:
    fake = FakeRun(*[pio(port, b"x") for port in ports], HLT)
    model: dict[int, Claim] = {}
    for first, length in claims:
        if not any(port in model for port in range(first, first + length)):
            model |= dict.fromkeys(range(first, first + length), fake.pio.ignore(first, length))
    unclaimed = []
    while (end := fake.runner.run((1 << 63) - 1, None)).exit is not None and end.reason != "halted":
        unclaimed.append(end.exit.port)
    assert unclaimed == [port for port in ports if port not in model]
    for claim in set(model.values()):
        assert claim.hits == sum(model.get(port) is claim for port in ports)


def test_the_last_address_of_each_space_can_be_claimed() -> None:
    top = (1 << 64) - 8
    fake = FakeRun(mmio(top, size=8), pio(0xFFFF), HLT)
    fake.mmio.constant(top, 0x0102030405060708, 8)
    fake.pio.constant(0xFFFF, 0x42)
    fake.runner.run((1 << 63) - 1, None)
    assert fake.answered(0, 8) == bytes([8, 7, 6, 5, 4, 3, 2, 1])
    assert fake.answered(1, 1) == b"\x42"
    with pytest.raises(ValueError, match="outside"):
        fake.mmio.ignore(top, 9)
    with pytest.raises(ValueError, match="outside"):
        fake.pio.ignore(0xFFFF, 2)


def test_an_access_belongs_to_the_range_in_which_it_begins() -> None:
    fake = FakeRun(pio(0x10, b"\1\2\3\4", size=4), HLT)
    first, second = fake.pio.ignore(0x10), fake.pio.ignore(0x11, 3)
    fake.runner.run((1 << 63) - 1, None)
    assert (first.hits, second.hits) == (1, 0)


def test_an_overlap_names_both_claims() -> None:
    bus = Bus("mmio", [])
    bus.constant(0x1000, 1, 0x100)
    with pytest.raises(BusOverlapError, match=r"0x10ff.*0x1000") as caught:
        bus.ignore(0x10FF)
    assert "release" in str(caught.value)


def test_a_handler_must_be_callable() -> None:
    with pytest.raises(TypeError, match="callable"):
        Bus("pio", []).handle(1, 7)  # type: ignore[arg-type]


def test_slots_are_used_again_and_their_number_is_bounded() -> None:
    slots: list[object] = []
    bus = Bus("mmio", slots)  # type: ignore[arg-type]
    for _ in range(3):
        bus.ignore(0).release()
    assert len(slots) == 1
    claims = [bus.ignore(n) for n in range(lib.PYKVM_SLOTS)]
    with pytest.raises(BusOverlapError, match=str(lib.PYKVM_SLOTS)):
        bus.ignore(1 << 20)
    claims[7].release()
    bus.ignore(1 << 20)


def test_an_eventfd_claim_wants_an_open_fd_and_rings_it() -> None:
    fake = FakeRun(pio(0x10, b"x"), pio(0x10, b"y"), HLT)
    fd = os.eventfd(0)
    try:
        fake.pio.eventfd(0x10, fd)
        fake.runner.run((1 << 63) - 1, None)
        assert os.eventfd_read(fd) == 2
    finally:
        os.close(fd)
    with pytest.raises(OSError):
        fake.pio.eventfd(0x20, fd)


def test_claims_and_buses_print_what_they_are() -> None:
    bus = Bus("pio", [])
    bus.constant(0x71, 1)
    assert "0x71..0x71 constant/ignore, 0 hits" in repr(bus)


# ---- addresses that nobody claims --------------------------------------------------------------


def test_unclaimed_accesses_end_the_run_until_told_otherwise() -> None:
    ports = Ports()
    rest = ports.pio.unclaimed("ignore")
    assert rest is not None
    claim = ports.pio.constant(0x20, 7)
    assert (ports.inp(0x1F, 4), ports.inp(0x20), ports.inp(0xFFFF)) == (0xFFFFFFFF, 7, 0xFF)
    ports.out(0x21, 1)
    assert (rest.hits, claim.hits) == (3, 1)
    assert ports.pio.find(0x20) is claim
    assert ports.pio.find(0x21) is rest
    assert len(ports.pio) == 1
    assert ports.pio.unclaimed("end") is None
    ports.inp(0x21)
    assert ports.end is not None and ports.end.reason == "unclaimed"
    assert rest.hits == 3


def test_what_was_said_of_unclaimed_accesses_holds_for_vcpus_that_come_later() -> None:
    bus = Bus("pio", [])
    rest = bus.unclaimed("ignore")
    fake = FakeRun(pio(0x10, b"x"), HLT)
    bus.attach(fake.c)
    assert fake.runner.run((1 << 63) - 1, None).reason == "halted"
    assert rest is not None and rest.hits == 1


def test_unclaimed_accesses_are_written_down_if_asked() -> None:
    ports = Ports()
    ports.mmio.unclaimed("ignore")
    rest = ports.mmio.unclaimed("log")
    assert rest is not None
    ports.store(0xFED0_0000_0000, 0x1234, 8)
    assert ports.load((1 << 64) - 4) == 0xFFFF_FFFF
    first, second = rest.device.read()
    assert (first.address, first.value, first.size, first.is_write) == (
        0xFED0_0000_0000, 0x1234, 8, True,
    )  # fmt: skip
    assert (second.address, second.value, second.is_write) == ((1 << 64) - 4, 0xFFFF_FFFF, False)
    rest.release()
    rest.release()
    ports.load(0)
    assert ports.end is not None and ports.end.reason == "unclaimed"


def test_a_log_of_unclaimed_accesses_loses_none_when_its_ring_is_full() -> None:
    fake = FakeRun(*[pio(number, b"x") for number in range(8)])
    rest = fake.pio.unclaimed("log")
    assert rest is not None
    fake.runner.run((1 << 63) - 1, 10_000)
    records = rest.device.read()
    assert [record.address for record in records] == [n % 8 for n in range(10_000)]
    fake.pio.close()
    assert fake.pio.find(1) is None


def test_only_known_things_can_be_done_with_unclaimed_accesses() -> None:
    with pytest.raises(ValueError, match="panic"):
        Bus("pio", []).unclaimed("panic")


# ---- clocks ------------------------------------------------------------------------------------


def test_a_clock_reads_the_same_time_at_every_width_and_offset() -> None:
    ports = Ports()
    clock = ports.mmio.clock(0x1000, 1, 8).device
    assert clock.now() == 0
    clock.set(0x1122_3344_5566)  # it ticks once a second: hardly within the test
    assert clock.now() == 0x1122_3344_5566
    assert ports.load(0x1000, 8) == 0x1122_3344_5566
    assert ports.load(0x1002, 4) == 0x1122_3344
    assert ports.load(0x1005, 1) == 0x11
    ports.store(0x1000, 0, 8)
    assert ports.load(0x1000, 8) == 0x1122_3344_5566


def test_a_clock_has_a_rate_and_a_width() -> None:
    for hz in (0, -1, 1 << 64):
        with pytest.raises(ValueError, match="Hz"):
            Bus("pio", []).clock(0, hz)
    with pytest.raises(ValueError, match="bytes wide"):
        Bus("pio", []).clock(0, 1000, 9)


def test_a_stop_port_reads_what_it_was_given() -> None:
    ports = Ports()
    ports.pio.stop(0xF4, 4, value=0x1234)
    assert ports.inp(0xF4, 4) == 0x1234
    ports.out(0xF4, 9)
    assert ports.end is not None and (ports.end.reason, ports.end.code) == ("stopped", 9)


# ---- doorbells -----------------------------------------------------------------------------------


def test_a_doorbell_that_kvm_refuses_leaves_no_claim_and_no_descriptor() -> None:
    def refuse(claim: object, size: int, datamatch: int | None, on: bool) -> bool:
        raise OSError("refused")

    bus = Bus("pio", [], refuse)
    fd = os.eventfd(0)
    try:
        open_before = set(os.listdir("/proc/self/fd"))
        with pytest.raises(OSError, match="refused"):
            bus.eventfd(0x50, fd)
        assert len(bus) == 0
        assert set(os.listdir("/proc/self/fd")) == open_before
    finally:
        os.close(fd)


def test_a_doorbell_does_not_need_the_callers_descriptor_any_more() -> None:
    """Else a guest would write to whatever file has the number next."""
    calls: list[bool] = []

    def doorbell(claim: Claim, size: int, datamatch: int | None, on: bool) -> bool:
        os.fstat(claim.fd)
        calls.append(on)
        return True

    bus = Bus("pio", [], doorbell)
    fd = os.eventfd(0)
    claim = bus.eventfd(0x50, fd)
    os.close(fd)
    claim.release()
    assert calls == [True, False]
    assert claim.fd == -1
