"""What tests on a real KVM share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import pykvm


@pytest.fixture
def m() -> Iterator[pykvm.Machine]:
    """A machine of one vCPU with nothing in it."""
    with pykvm.Machine(memory="2M") as machine:
        yield machine


@pytest.fixture
def made() -> Iterator[list[pykvm.Machine]]:
    """Machines that a test makes, closed behind it."""
    machines: list[pykvm.Machine] = []
    yield machines
    for m in machines:
        m.close()
