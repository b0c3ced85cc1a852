"""What the debugging half of a machine knows without running one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pykvm.debugging import KERNEL_MAP, Debugging

START, SIZE = 0x100_0000, 0x200_0000


def kernel_gpa(address: int, *, protocol: str = "vmlinux", is_linux: bool = True) -> int | None:
    plan = SimpleNamespace(protocol=protocol, kernel=(START, SIZE))
    machine: Any = SimpleNamespace(pc=SimpleNamespace(is_linux=is_linux, plan=plan))
    return Debugging._kernel_gpa(machine, address)


@pytest.mark.parametrize("protocol", ["vmlinux", "pvh"])
def test_the_text_of_a_kernel_is_known_before_its_page_tables_are(protocol: str) -> None:
    assert kernel_gpa(KERNEL_MAP + START + 0x10, protocol=protocol) == START + 0x10
    assert kernel_gpa(KERNEL_MAP + START + SIZE - 1, protocol=protocol) == START + SIZE - 1


@pytest.mark.parametrize("address", [0, START, KERNEL_MAP + START - 1, KERNEL_MAP + START + SIZE])
def test_what_is_not_its_text_is_not_known(address: int) -> None:
    assert kernel_gpa(address) is None


def test_of_a_kernel_that_unpacks_itself_and_of_other_guests_nothing_is_known() -> None:
    assert kernel_gpa(KERNEL_MAP + START, protocol="bzimage") is None
    assert kernel_gpa(KERNEL_MAP + START, is_linux=False) is None
    assert Debugging._kernel_gpa(SimpleNamespace(pc=None), KERNEL_MAP + START) is None  # type: ignore[arg-type]
