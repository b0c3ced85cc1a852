"""What debugs a machine that is closed meanwhile, or is asked for what there is not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import pykvm
from pykvm.debug import probe
from pykvm.errors import ClosedError


@pytest.fixture
def m() -> Iterator[pykvm.Machine]:
    with pykvm.Machine("128K") as made:
        made.load(pykvm.asm("inc dword ptr [0x18000]; hlt", mode="long64"), at=0x8000)
        made.cpu.enter("long64", entry=0x8000)
        yield made


def test_a_trace_ends_after_its_machine_and_is_whole(m: pykvm.Machine) -> None:
    with m.trace() as trace:
        m.run(timeout=20)
        m.close()
    assert [event.reason for event in trace.events] == ["hlt"]
    assert not any(trace.stats.values())


def test_stops_are_taken_away_after_their_machine(m: pykvm.Machine) -> None:
    problem = m.debugger.obstacle(probe.PORT, m.cpu)
    if problem:
        pytest.skip(f"probe.obstacle('port', 'long64'): {problem}")
    point = m.breakpoint(0x8007)
    with m.coverage([0x8000]) as covered:
        m.close()
    point.delete()
    assert point.deleted and not covered.hit and len(m.planted) == 0


def test_nobody_waits_for_gdb_on_behalf_of_a_closed_machine(m: pykvm.Machine) -> None:
    m.close()
    with pytest.raises(ClosedError):
        m.gdb_server("127.0.0.1:0")


@pytest.mark.parametrize("address", [-1, 1 << 64])
def test_what_is_no_address_is_refused(m: pykvm.Machine, address: int) -> None:
    with pytest.raises(ValueError, match="no linear address"):
        m.breakpoint(address)
    with pytest.raises(ValueError, match="no linear address"):
        m.watch(address)
