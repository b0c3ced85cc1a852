"""The search for what a hostile driver of a disk could do: every planted bug is found by it."""

from __future__ import annotations

from random import Random

import pytest

from tests.hostile.blk import PLANTED
from tests.hostile.machines import HostileDriver

STEPS = 60
BUDGET = 60_000


@pytest.mark.parametrize("name", PLANTED)
def test_a_bug_planted_into_the_disk_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*PLANTED[name])
    with pytest.raises(Exception, match=r"."):
        for seed in range(BUDGET // STEPS):
            driver = HostileDriver(Random(seed), "blk")
            for _ in range(STEPS):
                driver.step()
            driver.prove()
            driver.close()


def test_a_disk_and_its_model_agree_whatever_a_driver_does() -> None:
    served = 0
    for seed in range(40):
        driver = HostileDriver(Random(seed), "blk")
        for _ in range(STEPS):
            driver.step()
        driver.prove()
        served += driver.device.counters.requests
        driver.close()
    assert served > 100
