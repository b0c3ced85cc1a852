"""A guest that makes one access after the other, through the real bus and loop, without KVM."""

from __future__ import annotations

from typing import Any

from pykvm._abi import ffi
from pykvm.vcpu_thread import NEVER, End
from tests.support.fake_vcpu import HLT, FakeRun, mmio, pio


class Ports(FakeRun):
    """``inp()``, ``out()``, ``load()``, ``store()``, as of a processor.

    Attributes:
        end: how the last access ended the run; its ``reason`` is "halted" if it went through.
    """

    def __init__(self) -> None:
        super().__init__(HLT)
        self.end: End | None = None

    @property
    def reason(self) -> str:
        """How the last access ended the run."""
        assert self.end is not None
        return self.end.reason

    def _one(self, exit: dict[str, Any], size: int) -> int:
        self.script = ffi.new("struct pykvm_fake_exit[]", [exit, HLT])
        self._fake.script, self._fake.count = self.script, 2
        self._fake.next, self._fake.last = 0, ffi.NULL
        self.end = self.runner.run(NEVER, None)
        return int.from_bytes(self.answered(0, size), "little")

    def inp(self, port: int, size: int = 1) -> int:
        """IN."""
        return self._one(pio(port, size=size), size)

    def out(self, port: int, value: int, size: int = 1) -> None:
        """OUT."""
        self._one(pio(port, value.to_bytes(size, "little"), size=size), size)

    def load(self, gpa: int, size: int = 4) -> int:
        """A load from memory that is not RAM."""
        return self._one(mmio(gpa, size=size), size)

    def store(self, gpa: int, value: int, size: int = 4) -> None:
        """A store to memory that is not RAM."""
        self._one(mmio(gpa, value.to_bytes(size, "little")), size)
