"""A hostile guest under a real KVM; ``python -m tests.hostile`` runs it for longer."""

from __future__ import annotations

import os
import shutil

import pytest

from pykvm.devices.virtio.device import VirtioDevice
from pykvm.devices.virtio.queue import Queue
from tests.hostile import guest, pci_guest

OPERATIONS = 4000
SEEDS = [int(seed) for seed in os.environ.get("PYKVM_HOSTILE_SEEDS", "1").split()]

pytestmark = pytest.mark.skipif(shutil.which("as") is None, reason="there is no assembler")


@pytest.mark.parametrize("io", ["sync", "thread"])
@pytest.mark.parametrize("seed", SEEDS)
def test_devices_survive_a_hostile_guest(io: str, seed: int) -> None:
    done = guest.run(OPERATIONS, seed, io, timeout=100)
    for counters in done.counters.values():
        assert counters["requests"] > 10 and counters["resets"] > 10 and counters["errors"] > 10
    assert done.states > 20


@pytest.mark.parametrize(("io", "operations"), [("sync", OPERATIONS), ("thread", 300)])
def test_a_pci_bus_survives_a_hostile_guest(io: str, operations: int) -> None:
    done = pci_guest.run(operations, 1, io, timeout=100)
    assert done.counters["rng"]["resets"] > operations // 100
    assert done.counters["rng"]["requests"] > operations // 1000


def test_what_the_program_looks_for_it_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that stays broken, and one that loses a request."""

    def reset(self: VirtioDevice) -> None:
        for queue in self.queues:
            queue.reset()

    with monkeypatch.context() as patch:
        patch.setattr(VirtioDevice, "_reset", reset)
        with pytest.raises(guest.Lost, match=r"not well|not served"):
            guest.run(OPERATIONS, 1, "sync", timeout=100)
    with monkeypatch.context() as patch:
        patch.setattr(Queue, "push", lambda self, chain, written=0: False)
        with pytest.raises(guest.Lost):
            guest.run(100, 1, "sync", timeout=5)


@pytest.mark.parametrize("io", ["sync", "thread"])
def test_a_flood_of_doorbells_leaves_stop_and_the_console_alone(io: str) -> None:
    latencies, shown, rung = guest.flood(10_000, 5, io)
    assert rung >= 10_000 and shown >= 5
    assert sorted(latencies)[len(latencies) // 2] < 0.5  # how much less, the command measures
