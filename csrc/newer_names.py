"""Names newer than the oldest linux/kvm.h that pykvm is built against."""

from __future__ import annotations

from typing import NamedTuple


class Constant(NamedTuple):
    """One integer name: its value as C text, and the kernel release that brought it."""

    name: str
    value: str
    since: str


class Struct(NamedTuple):
    """One structure: its tag, the release that brought it (or its newest member), its C text."""

    tag: str
    since: str
    text: str


STRUCTS: tuple[Struct, ...] = ()
CONSTANTS: tuple[Constant, ...] = ()
