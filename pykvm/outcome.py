"""``Outcome``: what fuzzing tells of one input."""

from __future__ import annotations

UNTIL = "until"
"""The reason of a run that came to its end."""


class Outcome:
    """How one input ended.

    Attributes:
        input: the bytes.
        reason: as ``RunResult.reason``; ``"until"`` for a write to the port that ends a run.
        code: what was written to the port that ended it, or None.
        rip: the guest's RIP, of a port as KVM has it before the instruction is complete.
        exits: exits it made.
        fresh: cells of the coverage map that no input before had reached.
        address: the port or guest-physical address that ended it, or None.
    """

    __slots__ = ("address", "code", "exits", "fresh", "input", "reason", "rip")

    def __init__(
        self,
        input: bytes,
        reason: str,
        code: int | None,
        rip: int,
        exits: int,
        fresh: int,
        address: int | None,
    ) -> None:
        self.input = input
        self.reason = reason
        self.code = code
        self.rip = rip
        self.exits = exits
        self.fresh = fresh
        self.address = address

    def __repr__(self) -> str:
        code = "" if self.code is None else f" {self.code:#x}"
        new = f", {self.fresh} new cells" if self.fresh else ""
        return f"<{self.reason}{code} at {self.rip:#x} by {shown(self.input)}{new}>"


def shown(data: bytes) -> str:
    """An input, or its beginning, for a message."""
    return repr(data if len(data) <= 32 else data[:32] + b"...")
