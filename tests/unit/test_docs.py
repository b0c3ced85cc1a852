"""What the documents say of the code is so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pykvm import result as reasons
from pykvm.boot import layout
from pykvm.cli import exitcodes
from tests.support.virtio_guest import VirtioGuest
from tests.support.vring_driver import WRITE

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_memory_map_of_a_boot_is_that_of_the_code() -> None:
    text = (DOCS / "booting.md").read_text()
    drawn = {int(number, 16) for number in re.findall(r"^(0x[0-9a-f]{8,9}) ", text, re.MULTILINE)}
    assert {
        layout.ZERO_PAGE, layout.MULTIBOOT_INFO, layout.PVH_INFO, layout.CMDLINE, layout.EBDA,
        layout.RSDP, layout.HIGH_MEMORY, layout.PCI_HOLE, layout.PCI_HOLE_END,
    } <= drawn  # fmt: skip


def test_the_exit_codes_of_a_boot_are_those_of_the_command() -> None:
    text = (DOCS / "booting.md").read_text()
    told = dict(re.findall(r"^\| `([a-z-]+)` \| (\d+) \|", text, re.MULTILINE))
    assert set(told) <= set(reasons.REASONS)
    for reason, code in told.items():
        assert exitcodes.exit_code(reasons.RunResult(reason)) == int(code), reason


def test_every_reason_has_an_exit_code() -> None:
    codes = [exitcodes.exit_code(reasons.RunResult(reason, code=1)) for reason in reasons.REASONS]
    assert all(0 <= code <= 255 for code in codes)


def test_the_device_of_one_s_own_does_what_it_says() -> None:
    text = (DOCS / "virtio.md").read_text()
    (source,) = re.findall(r"```python\n(class Upper.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(f"from pykvm.virtio import VirtioDevice\n{source}", names)
    with VirtioGuest(names["Upper"]()) as guest:
        (driver,) = guest.start()
        guest.memory.write(0x40000, b"quiet")
        driver.send((0x40000, 5, 0), (0x41000, 8, WRITE))
        guest.notify()
        assert driver.used() == [(0, 5)] and guest.memory.read(0x41000, 6) == b"QUIET\0"
