"""What ``boot()`` leaves for the next one: the unpacked kernel, written while the guest runs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import pykvm
from pykvm import result as reasons
from tests.support.kernels import PACKERS, PREF, bzimage, elf

# mov edx, 0x604; mov eax, 0x3400; out dx, ax; jmp $: ACPI's power off
OFF = bytes.fromhex("ba04060000 b800340000 66ef ebfe")


@pytest.fixture
def kernel() -> bytes:
    """A bzImage whose kernel only powers off."""
    vmlinux = elf([(PREF, OFF, len(OFF))])
    return bzimage(PACKERS["gzip"](vmlinux))


def boot(kernel: bytes, folder: Path) -> tuple[pykvm.Machine, bool | None]:
    m = pykvm.Machine("16M", irqchip=True, pit=True)
    return m, m.boot(kernel, cache=folder).cache_hit


def test_the_unpacked_kernel_is_kept_by_the_end_of_the_run(kernel: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    m, hit = boot(kernel, folder)
    with m:
        assert hit is False and not folder.exists(), "nothing is written before the guest starts"
        priority = os.getpriority(os.PRIO_PROCESS, 0)
        result = m.run(timeout=30)
        assert result.reason == reasons.POWER_OFF
        assert result.timings["store"] > 0
        assert len(list(folder.iterdir())) == 1
        assert os.getpriority(os.PRIO_PROCESS, 0) == priority, "only the thread that writes is nice"
    m, hit = boot(kernel, folder)
    with m:
        assert hit is True
        assert m.run(timeout=30).reason == reasons.POWER_OFF


def test_a_cache_that_cannot_be_written_costs_the_run_nothing(
    kernel: bytes, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    m, _ = boot(kernel, tmp_path / "file" / "cache")
    with m:
        assert m.run(timeout=30).reason == reasons.POWER_OFF
        assert m.pc is not None and m.pc.plan is not None
        assert any("was not kept" in note for note in m.pc.plan.notes)
