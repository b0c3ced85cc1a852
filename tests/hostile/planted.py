"""Bugs of the kind that queues have had, planted into a copy of vring.c or into a device class.

The search has to find every one of them (``tests/unit/test_hostile.py``): else it finds nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pykvm.devices.virtio.core import NEEDS_RESET
from pykvm.devices.virtio.device import VirtioDevice
from pykvm.devices.virtio.mmio import MmioInterrupt
from pykvm.devices.virtio.queue import Chain, Queue
from tests.hostile.build import Patch

RING: dict[str, tuple[Patch, ...]] = {
    "head without a bound": (("if (chain->head >= ring->size) return PYKVM_BREACH_HEAD;", ""),),
    "next without a bound": (("if (index >= ring->size) return PYKVM_BREACH_NEXT;", ""),),
    "next in an indirect table without a bound": (
        ("if (index >= count) return PYKVM_BREACH_NEXT;", ""),
    ),
    "a loop without end": (("if (++seen == ring->size) return PYKVM_BREACH_LOOP;", "++seen;"),),
    "a loop in an indirect table without end": (
        ("if (++seen == count) return PYKVM_BREACH_LOOP;", "++seen;"),
    ),
    "writing where only reading is allowed: a ROM": (
        (
            """struct pykvm_ram_region *region = find(map, gpa);
            if (!region || (writable && region->readonly)) return PYKVM_BREACH_BUFFER;""",
            """struct pykvm_ram_region *region = find(map, gpa);
            if (!region) return PYKVM_BREACH_BUFFER;""",
        ),
    ),
    "the direction of a buffer turned around": (
        (".writable = writable,", ".writable = !writable && descriptor->length == 1,"),
    ),
    "readable after writable": (
        (
            """if (wrote && !(descriptor.flags & WRITE)) return PYKVM_BREACH_ORDER;
            wrote |= descriptor.flags & WRITE;""",
            "wrote |= descriptor.flags & WRITE;",
        ),
    ),
    "double fetch: the length is checked, then read again": (
        (
            """int error = add(map, chain, &descriptor);
            if (error) return error;
            if (!(descriptor.flags & NEXT)) return 0;
            if (++seen == ring->size)""",
            """int error = add(map, chain, &descriptor);
            if (error) return error;
            if (chain->count && descriptor.length)
                chain->segments[chain->count - 1].length =
                    load_descriptor(element(ring, PYKVM_DESC, index * DESCRIPTOR)).length;
            if (!(descriptor.flags & NEXT)) return 0;
            if (++seen == ring->size)""",
        ),
    ),
    "double fetch: the head": (
        (
            "if (chain->head >= ring->size) return PYKVM_BREACH_HEAD;",
            """if (chain->head >= ring->size) return PYKVM_BREACH_HEAD;
            chain->head = load16(element(ring, PYKVM_DRIVER, 4 + 2 * entry));""",
        ),
    ),
    "a byte beyond the end of a region": (
        (
            "uint64_t room = region->last - gpa + 1, piece = room < left ? room : left;",
            "uint64_t room = region->last - gpa + 2, piece = room < left ? room : left;",
        ),
    ),
    "a ring that ends outside RAM": (("if (room >= left) break;", "if (room + 8 >= left) break;"),),
    "a ring that is not aligned": (
        ("if (part->gpa & (align[i] - 1)) error = PYKVM_BREACH_ALIGN; else", ""),
    ),
    "a queue size that is no power of two": (
        ("if (!size || size & (size - 1) || size > 32768)", "if (!size || size > 32768)"),
    ),
    "an index far ahead": (("if (count > ring->size) return PYKVM_BREACH_INDEX;", ""),),
    "more in flight than there is": (
        ("if (ring->in_flight >= ring->size) return PYKVM_BREACH_FLIGHT;", ""),
    ),
    "a total that overflows": (
        (
            "*total += descriptor->length;",
            "*total = (uint32_t)(*total + descriptor->length);",
        ),
    ),
    "an indirect table of half a descriptor": (
        ("if (!count || table->length % DESCRIPTOR || count > INDIRECT_MAX)", "if (!count)"),
    ),
    "a table within a table": (
        (
            "if (descriptor.flags & INDIRECT) return PYKVM_BREACH_INDIRECT; if (*wrote",
            "if (*wrote",
        ),
    ),
    "an indirect table outside RAM": (
        (
            "if (!covers(map, table->gpa, table->length, 0, &host)) return PYKVM_BREACH_TABLE;",
            """if (!covers(map, table->gpa, DESCRIPTOR, 0, &host)) return PYKVM_BREACH_TABLE;""",
        ),
    ),
    "indirect tables though they were not negotiated": (
        ("if (!ring->indirect || descriptor.flags & NEXT)", "if (descriptor.flags & NEXT)"),
    ),
    "a chain from before a reset is given back": (
        (
            "if (!ring->enabled || generation != ring->generation || !ring->in_flight)",
            "if (!ring->enabled || !ring->in_flight)",
        ),
    ),
    "a notification that is lost": (
        (
            "/* the driver stores its index, then looks */ count = waiting(ring);",
            "",
        ),
    ),
    "an interrupt too few": (
        (
            "(uint16_t)(now - load16(used_event(ring)) - 1) < (uint16_t)(now - before);",
            "(uint16_t)(now - load16(used_event(ring)) - 1) < (uint16_t)(now - before - 1);",
        ),
    ),
    "the used index before the element": (
        (
            "uint32_t entry = ring->used & (ring->size - 1);",
            "uint32_t entry = (ring->used + 1) & (ring->size - 1);",
        ),
    ),
}
"""Of vring.c: what stands there, and what takes its place."""


# ---- in Python -----------------------------------------------------------------------------------


def _ignore(*arguments: object) -> None:
    """Do nothing, where something should be done."""


def _serve_without_interrupts(self: VirtioDevice, queue: Queue) -> None:
    self.counters.add("interrupts")


def _unguarded(self: VirtioDevice, function: Callable[[], Any]) -> Any:
    return function()


def _serve_on(self: VirtioDevice, index: int) -> None:
    """The doorbell of a device that is not running."""
    if self.queue_ready(index):
        self._guarded(lambda: self.queue_notify(index))


def _write_features_late(self: VirtioDevice, select: int, value: int) -> None:
    if select < 4:
        kept = self.driver_features & ~(0xFFFFFFFF << 32 * select)
        self.driver_features = kept | value << 32 * select


def _clear_bits(self: VirtioDevice, value: int) -> None:
    """The status is what was written last."""
    _write_status(self, value)
    if value & 0xFF:
        self.status &= value | NEEDS_RESET


def _breach_is_forgotten(self: VirtioDevice, why: str) -> None:
    for queue in self.queues:
        queue.disable()


def _read_one(self: Chain, limit: int | None = None) -> bytes:
    return b"".join(self.readable[:1])


def _write_past(self: Chain, data: bytes) -> int:
    """Says that all of it fitted."""
    _write(self, data)
    return len(data)


_write_status = VirtioDevice.write_status
_write = Chain.write

DEVICE: dict[str, tuple[type, str, Any]] = {
    "a reset leaves the interrupt status": (MmioInterrupt, "reset", _ignore),
    "a reset leaves the queues": (Queue, "reset", _ignore),
    "features are not checked": (VirtioDevice, "_features_fit", lambda self: True),
    "features change after FEATURES_OK": (VirtioDevice, "write_features", _write_features_late),
    "no interrupt for used buffers": (VirtioDevice, "_interrupt", _serve_without_interrupts),
    "an exception comes out": (VirtioDevice, "_guarded", _unguarded),
    "a device that is not running serves": (VirtioDevice, "notify", _serve_on),
    "status bits can be cleared": (VirtioDevice, "write_status", _clear_bits),
    "a breach is not told": (VirtioDevice, "needs_reset", _breach_is_forgotten),
    "only the first buffer is read": (Chain, "read", _read_one),
    "more was written than fitted": (Chain, "write", _write_past),
}
"""Of devices and their core: the class, the method, and what takes its place."""
