"""What a vCPU has done and nobody has seen yet: the next run is told of it, also of a copy.

Of several vCPUs that end a run at once one is told of; a Ctrl-C may come before any is. A snapshot
has KVM complete the instruction, for registers and memory are not what they will be before. So
what was written is kept here, and handed out again as if KVM had just returned with it.
"""

from __future__ import annotations

from pykvm._abi import ffi, lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Item = dict[str, Any]

_PAGE = 0x1000
_GIVEN_UP = (
    lib.PYKVM_ACCESS, lib.PYKVM_STOPPED, lib.PYKVM_UNCLAIMED, lib.PYKVM_FULL,
)  # fmt: skip


class Unseen:
    """The accesses that are given up while the instruction of a vCPU is completed.

    Args:
        c: its ``struct pykvm_vcpu *``.
    """

    def __init__(self, c: Any) -> None:
        self._c = c
        self._accesses: list[tuple[str, int, bool, bytes]] = []

    def see(self, outcome: int) -> None:
        """The loop returned to nobody, with an outcome."""
        access = self._c.access
        # A read gets its all ones here; only who is told that nobody answers it has lost nothing.
        if outcome in _GIVEN_UP and (access.is_write or outcome == lib.PYKVM_UNCLAIMED):
            on = "mmio" if access.is_mmio else "pio"
            data = int(access.value).to_bytes(8, "little")[: access.size]
            self._accesses.append((on, int(access.address), bool(access.is_write), data))

    def item(self) -> Item | None:
        """One exit of them, as plain data: items of a string instruction are together in it."""
        if not self._accesses:
            return None
        on, address, is_write, data = self._accesses[0]
        like = [
            each[3]
            for each in self._accesses
            if each[:3] == (on, address, is_write) and len(each[3]) == len(data)
        ]
        most = _PAGE // len(data) if on == "pio" else 1
        return {
            "on": on,
            "address": address,
            "is_write": is_write,
            "size": len(data),
            "data": b"".join(like[:most]).hex(),
        }


def hand_out(c: Any, item: Item) -> None:
    """Have the next run of a vCPU, which has nothing open, begin with it."""
    run, size, data = c.run, item["size"], bytes.fromhex(item["data"])
    if item["on"] == "pio":
        run.exit_reason = lib.KVM_EXIT_IO
        run.io.direction = lib.KVM_EXIT_IO_OUT if item["is_write"] else lib.KVM_EXIT_IO_IN
        run.io.port, run.io.size, run.io.count = item["address"], size, len(data) // size
        run.io.data_offset = lib.KVM_PIO_PAGE_OFFSET * _PAGE
        ffi.memmove(ffi.cast("char *", run) + run.io.data_offset, data, len(data))
    else:
        run.exit_reason = lib.KVM_EXIT_MMIO
        run.mmio.phys_addr, run.mmio.len = item["address"], size
        run.mmio.is_write = item["is_write"]
        ffi.memmove(run.mmio.data, data, size)
    c.error = 0
    c.access.pending = lib.PYKVM_UNSERVED


def of_json(said: Any, cpus: int) -> dict[int, Item]:
    """What a file says of each vCPU, by its index.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: it is not what a snapshot has.
    """
    found: dict[int, Item] = {}
    for index, each in said.items():
        on, address, size = each["on"], each["address"], each["size"]
        data = bytes.fromhex(each["data"])
        limits = {"pio": (1 << 16, (1, 2, 4), _PAGE), "mmio": (1 << 52, range(1, 9), size)}
        limit, sizes, most = limits[on]
        fits = type(address) is int and 0 <= address < limit and size in sizes
        if not fits or not data or len(data) % size or len(data) > most:
            raise ValueError(f"{each!r} is no access")
        if not 0 <= int(index) < cpus:
            raise ValueError(f"there is no vCPU {index}")
        found[int(index)] = {
            "on": on,
            "address": address,
            "is_write": bool(each["is_write"]),
            "size": int(size),
            "data": data.hex(),
        }
    return found
