"""Fuzz loops over virtio devices: what they do belongs to its input, whoever serves them."""

from __future__ import annotations

import pytest

import pykvm
from pykvm.outcome import UNTIL
from pykvm.virtio import Rng
from tests.kvm.test_virtio import PROBE
from tests.support.vring_driver import WRITE, Driver

BUFFER, INPUT = 0x30000, 0x40000
GUEST = (
    PROBE.replace("QUEUE", "0")
    + """
        out 0x10, al
        mov ah, [0x30000]                   # what an input before may have left
        or ah, [0x22002]
        mov word ptr [0x21002], 1
        mov dword ptr [rdi + 0x50], 0
        cmp byte ptr [0x40000], 'w'
        jne over
    again:
        cmp byte ptr [0x22002], 1
        jne again
        mov al, [0x30000]
    over:
        out 0x11, ax
"""
)


@pytest.mark.parametrize("io", ["sync", "thread"])
def test_every_input_has_the_device_as_the_snapshot_has_it(io: str) -> None:
    with pykvm.Machine("2M") as m:
        m.virtio(Rng(source=lambda count: b"\x5a" * count, rate=None), io=io)
        m.load(pykvm.asm(GUEST, mode="long64"), at=0x8000)
        m.cpu.enter("long64", entry=0x8000)
        m.cpu.rax = 0
        driver = Driver(m.memory, 8, desc=0x20000, driver=0x21000, device=0x22000)
        driver.send((BUFFER, 16, WRITE))
        m.memory.u16[0x21002] = 0  # the guest itself makes it available
        m.pio.stop(0x10)
        assert m.run(timeout=60).reason == "stopped"
        with m.snapshot() as s:
            inputs = [b"w" if n % 3 else b"-" for n in range(300)]
            outcomes = list(m.fuzz(s, inputs, write_at=INPUT, until=0x11, timeout=20))
            assert {outcome.reason for outcome in outcomes} == {UNTIL}
            assert [outcome.code for outcome in outcomes] == [
                0x5A if data == b"w" else 0 for data in inputs
            ]
            with m.snapshot() as after:
                assert not s.diff(after), s.diff(after)
