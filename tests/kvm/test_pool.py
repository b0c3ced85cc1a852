"""Spare machines: fresh each time, refilled behind the taker's back, none leaked."""

from __future__ import annotations

import pytest

import pykvm
from pykvm import result as reasons

pytestmark = pytest.mark.usefixtures("no_leak")


def test_machines_from_a_pool_are_fresh_and_work() -> None:
    with pykvm.Pool(2, memory="1M") as pool:
        for _ in range(6):
            with pool.take() as m:
                assert m.mem[0x8000:0x8001] == b"\0"
                m.load(b"\xf4", at=0x8000)
                m.cpu.enter("real16", entry=0x8000)
                assert m.run(timeout=60).reason == reasons.HALTED


def test_a_closed_pool_gives_nothing_and_takes_nothing_back() -> None:
    pool = pykvm.Pool(1, memory="1M")
    m = pool.take()
    pool.close()
    pool.close()
    with pytest.raises(pykvm.ClosedError):
        pool.take()
    m.load(b"\xf4", at=0x8000)
    m.cpu.enter("real16", entry=0x8000)
    assert m.run(timeout=60).reason == reasons.HALTED
    m.close()


def test_a_failure_to_make_one_reaches_the_taker(monkeypatch: pytest.MonkeyPatch) -> None:
    from pykvm import pool as module

    class Broken:
        def __init__(self, **options: object) -> None:
            raise pykvm.CapabilityError("gone")

    with pykvm.Pool(1, memory="1M") as pool:
        monkeypatch.setattr(module, "Machine", Broken)
        pool.take().close()
        with pytest.raises(pykvm.CapabilityError, match="gone"):
            pool.take()


def test_options_that_make_no_pool_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        pykvm.Pool(0)
    with pytest.raises(TypeError, match="size"):
        pykvm.Pool(1, memory=pykvm.GuestMemory("1M"))
    with pytest.raises(ValueError, match="cpus"):
        pykvm.Pool(1, cpus=0)
