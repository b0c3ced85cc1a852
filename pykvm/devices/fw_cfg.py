"""QEMU's firmware configuration device, as far as guests without firmware use it.

QEMU's docs/specs/fw_cfg.rst; there is no DMA interface, and revision bit 1 says so.
"""

from __future__ import annotations

from pykvm.devices.base import Device, State

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from pykvm.devices.access import Access

SIGNATURE, ID, RAM_SIZE, NB_CPUS, MAX_CPUS = 0x00, 0x01, 0x03, 0x05, 0x0F
TRADITIONAL = 1
"""Of ID: the only interface there is."""


class FwCfg(Device):
    """A selector (16 bits) and, at the next port, a data register that gives byte after byte.

    Args:
        cpus: number of processors.
        memory: bytes of RAM.
        max_cpus: how many there could be; default ``cpus``.
        extra: more items, by their keys.
    """

    LENGTH = 2

    def __init__(
        self,
        *,
        cpus: int,
        memory: int,
        max_cpus: int | None = None,
        extra: Mapping[int, bytes] | None = None,
    ) -> None:
        super().__init__()
        self._items = {
            SIGNATURE: b"QEMU",
            ID: TRADITIONAL.to_bytes(4, "little"),
            RAM_SIZE: memory.to_bytes(8, "little"),
            NB_CPUS: cpus.to_bytes(2, "little"),
            MAX_CPUS: (cpus if max_cpus is None else max_cpus).to_bytes(2, "little"),
            **(extra or {}),
        }
        self._selected = 0
        self._at = 0

    def access(self, access: Access) -> int | None:
        """Select an item with a write of 16 bits; read its next bytes, zeros after its end."""
        if access.is_write:
            if access.size == 2 and access.offset == 0:
                self._selected, self._at = access.value, 0
            return None
        item = self._items.get(self._selected, b"")
        data = item[self._at : self._at + access.size]
        self._at += access.size
        return int.from_bytes(data, "little")

    def state(self) -> State:
        """What is selected, and how far it was read."""
        return {"selected": self._selected, "at": self._at}

    def restore(self, state: State) -> None:
        """Take over what :meth:`state` returned."""
        self._selected, self._at = state["selected"], state["at"]
