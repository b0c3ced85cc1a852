"""The VM generation ID of a machine that is made of a snapshot, or put back to it.

What knows of it is imported when it is needed: tiny guests have none.
"""

from __future__ import annotations

from pykvm.errors import SnapshotError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pykvm.devices.vmgenid import Identity
    from pykvm.snapshot.image import Image


def another(identity: Identity, there: bool) -> bytes | None:
    """The VM generation ID that a machine is to get, or None; ``there``: whether it has one."""
    if identity == "keep":
        return None
    from pykvm.devices.vmgenid import id_of

    value = id_of(identity)
    if not there and not isinstance(identity, str):
        raise SnapshotError("this guest has no VM generation ID: none can be given to it")
    return value if there else None


def place(gpa: Any, image: Image) -> int:
    """Where a file says that the VM generation ID is. ValueError: it cannot be there."""
    from pykvm.arch.x86_64.acpi_tables import GenerationId

    if (
        type(gpa) is not int
        or gpa % GenerationId.ALIGN
        or not any(
            not part.readonly and part.gpa <= gpa <= part.gpa + part.size - GenerationId.SIZE
            for part in image.parts
        )
    ):
        raise ValueError(f"no VM generation ID can be at {gpa!r}")
    return gpa
