"""What the documents say of the code is so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

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


def test_every_reason_is_explained_somewhere() -> None:
    cell = re.compile(r"^\| (`[a-z`, …-]+) \|", re.MULTILINE)
    told: set[str] = set()
    for page in (DOCS.parent / "README.md", DOCS / "booting.md"):
        told |= set(re.findall(r"[a-z-]+", " ".join(cell.findall(page.read_text()))))
    assert set(reasons.REASONS) <= told


def test_the_benches_that_the_readme_names_exist() -> None:
    run = pytest.importorskip("benches.run")
    text = (DOCS.parent / "README.md").read_text().split("\n| tier |")[1]
    table = re.findall(r"^\|(?:[^|]*\|){3} `([a-z-]+)` \|", text, re.MULTILINE)
    assert table == ["doorbell", "c-action", "handler", "registers"]
    assert set(table) <= set(run.QUESTIONS)


def test_every_module_is_in_the_picture_of_the_storeys() -> None:
    text = (DOCS / "architecture.md").read_text()
    picture = text.split("```")[1]
    package = DOCS.parent / "pykvm"
    names = {path.stem for path in package.glob("*.py")}
    names |= {path.parent.name for path in package.glob("*/__init__.py")}
    small = {"__init__", "__main__"}  # and what goes by another name, or with its like
    small |= {"assembler", "machine", "pool", "symbols", "snapshot_cpuid", "snapshot_pool"}
    assert {name for name in names - small if not re.search(rf"\b{name}\b", picture)} == set()


def test_every_file_that_a_document_names_exists() -> None:
    root = DOCS.parent
    parts = ("pykvm", "csrc", "tests", "benches", "guests", "docs")
    there = [f"/{path.relative_to(root)}" for part in parts for path in (root / part).rglob("*.*")]
    examples = {"talk.py", "boot.svg", "linux/kvm.h", "asm/kvm.h"}
    for page in (*DOCS.glob("*.md"), root / "README.md"):
        named = set(re.findall(r"(?<![\w/.])[\w/]+\.(?:py|[chS]|md|svg)\b", page.read_text()))
        assert {
            name
            for name in named - examples
            if not any(path.endswith(f"/{name}") for path in there) and not (root / name).exists()
        } == set(), page


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
