"""The VM generation ID: by which a guest learns that it is a clone, and is another from now on.

16 bytes in guest memory, and an interrupt that says that they have changed; the ACPI tables tell
where (``pykvm.arch.x86_64.acpi``). Linux mixes the new ID into its random numbers and reseeds them
(CONFIG_VMGENID). After Microsoft's "Virtual Machine Generation ID" (2012).
"""

from __future__ import annotations

import os

from pykvm.arch.x86_64.acpi_tables import GenerationId

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any
    from uuid import UUID

    Identity = str | bytes | UUID

NEW, KEEP = "new", "keep"


def id_of(wanted: Identity) -> bytes | None:
    """What ``identity=`` means: 16 bytes, or None for the one that the guest has.

    Args:
        wanted: ``"new"``: random bytes of the host's; ``"keep"``; 16 bytes; or a UUID, whose bytes
            stand in memory as a Windows GUID's do.

    Raises:
        ValueError, TypeError: something else.
    """
    if isinstance(wanted, str):
        if wanted not in (NEW, KEEP):
            raise ValueError(f'identity is "{NEW}", "{KEEP}", 16 bytes or a UUID, not {wanted!r}')
        return None if wanted == KEEP else os.urandom(GenerationId.SIZE)
    return GenerationId(wanted if isinstance(wanted, bytes) else wanted.bytes_le).value


class VmGenerationId:
    """The ID of one machine.

    Args:
        memory: the guest's memory.
        gpa: where it is.
        notify: raises the interrupt.

    Raises:
        ValueError: it cannot be there.
    """

    def __init__(self, memory: Any, gpa: int, notify: Callable[[], object]) -> None:
        if gpa % GenerationId.ALIGN or not memory.covers(gpa, GenerationId.SIZE):
            raise ValueError(f"no VM generation ID can be at {gpa:#x}")
        self._memory = memory
        self._notify = notify
        self.gpa = gpa

    @property
    def value(self) -> bytes:
        """What stands there; a guest can write it as any memory."""
        return bytes(self._memory.read(self.gpa, GenerationId.SIZE))

    def change(self, wanted: Identity = NEW) -> None:
        """Write another ID, and tell the guest if it is one.

        The interrupt waits for a guest that does not run, or has interrupts disabled. One whose
        driver is not there yet will see the ID that it has by then.

        Args:
            wanted: see :func:`id_of`.
        """
        value = id_of(wanted)
        if value is not None and value != self.value:
            self._memory.write(self.gpa, value)
            self._notify()

    def __repr__(self) -> str:
        return f"<VmGenerationId {self.value.hex()} at {self.gpa:#x}>"
