"""What the documents say of the code is so."""

from __future__ import annotations

import re
from pathlib import Path

from pykvm import result as reasons
from pykvm.boot import layout
from pykvm.cli import exitcodes

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
