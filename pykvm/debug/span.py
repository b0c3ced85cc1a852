"""What watches a guest for the length of a ``with`` block."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self


class Span:
    """A context manager of what has a ``begin`` and an ``end``."""

    def begin(self) -> None:
        """Watch from here on."""
        raise NotImplementedError

    def end(self) -> None:
        """Watch no longer. What was found stays. Idempotent."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        self.begin()
        return self

    def __exit__(self, *exc: object) -> None:
        self.end()
