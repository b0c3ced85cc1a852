"""Hypothesis for the unit tests, and fixtures that several files share.

KVM tests do without Hypothesis: in the rig it takes 25 s to import.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import Phase, settings
from hypothesis.internal.conjecture import engine

from pykvm.doctor.host import Tree
from tests.conftest import ON_CI
from tests.support.disk_io import content
from tests.support.ports import Ports

# A failure is to be told, with what repeats it, before the watchdog ends the run: by default its
# example is made smaller for up to five minutes, and then explained, at a tenth of the speed.
engine.MAX_SHRINKING_SECONDS = 20

# On an emulated or busy machine wall time says nothing about the code under test. CI takes the same
# examples each time, so that a change is judged by what it changed; every other run looks for more.
settings.register_profile(
    "pykvm",
    deadline=None,
    derandomize=ON_CI,
    print_blob=True,
    phases=[phase for phase in Phase if phase != Phase.explain],
)
settings.load_profile("pykvm")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A raw disk image."""
    path = tmp_path / "disk.img"
    path.write_bytes(content())
    return path


@pytest.fixture
def backing_file(tmp_path: Path) -> Path:
    """A file of four pages, each full of its number, the first of 1."""
    path = tmp_path / "image"
    path.write_bytes(b"".join(bytes([page]) * 4096 for page in range(1, 5)))
    return path


@pytest.fixture
def ports() -> Ports:
    """A bus of ports, and a guest's INs and OUTs."""
    return Ports()


@pytest.fixture
def tree(tmp_path: Path) -> Callable[..., Tree]:
    """``tree({"/proc/misc": text, …})``: a root with these files in it."""

    def make(files: dict[str, str] | None = None) -> Tree:
        for path, text in (files or {}).items():
            target = tmp_path / "root" / path.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
        return Tree(str(tmp_path / "root"))

    return make
