"""typing.overload for what ``import pykvm`` loads, where typing itself would cost the most."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import overload as overload
else:

    def overload(function: object) -> None:
        """Forget a signature that only type checkers read."""
