"""What does it cost to take one chain from a virtqueue, checked, and to give it back?

In C, over a ring in guest memory, the driver's part (one entry, one index) included. The reference
is a device that trusts its driver: it checks nothing, translates nothing and locks nothing. A chain
of three is a disk's request: header, data, status.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

from benches.measure import OF_OURS, BenchError, Goal, Result, compare, take_turns
from benches.reference import build, pointer
from pykvm._abi import ffi, lib
from pykvm.devices.virtio.queue import Queue
from pykvm.memory import GuestMemory

C_ONLY = True

SIZE = 256
ROUNDS = 200_000
DESC, DRIVER, DEVICE, TABLE, DATA = 0x1000, 0x2000, 0x3000, 0x4000, 0x10000
NEXT, WRITE, INDIRECT = 1, 2, 4

THREE = [(DATA, 16, 0), (DATA + 0x1000, 4096, WRITE), (DATA + 0x3000, 1, WRITE)]


class _Parts(ctypes.Structure):
    _fields_ = [
        ("desc", ctypes.c_uint64),
        ("avail", ctypes.c_uint64),
        ("used", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
    ]


class _Ring:
    """A queue with one chain of descriptors in it, and the address of each part."""

    def __init__(self, buffers: list[tuple[int, int, int]], indirect: bool, regions: int) -> None:
        self.memory = GuestMemory()
        for region in range(regions):  # the first holds everything; the others are to be searched
            self.memory.add(region << 24, 1 << 20)
        table = TABLE if indirect else DESC
        for number, (gpa, length, flags) in enumerate(buffers):
            more = NEXT if number < len(buffers) - 1 else 0
            self._descriptor(table, number, gpa, length, flags | more, number + 1)
        if indirect:
            self._descriptor(DESC, 0, TABLE, 16 * len(buffers), INDIRECT, 0)
        self.queue = Queue(0, SIZE, self.memory)
        for part, gpa in (("desc", DESC), ("driver", DRIVER), ("device", DEVICE)):
            self.queue.set_address(part, gpa)
        self.queue.enable(event_idx=True, indirect=indirect)
        base = self.memory.regions[0].userspace_addr
        self.parts = _Parts(base + DESC, base + DRIVER, base + DEVICE, SIZE)

    def _descriptor(self, table: int, at: int, gpa: int, length: int, flags: int, to: int) -> None:
        self.memory.write(
            table + 16 * at,
            gpa.to_bytes(8, "little")
            + length.to_bytes(4, "little")
            + flags.to_bytes(2, "little")
            + to.to_bytes(2, "little"),
        )


def _library() -> Any:
    library = build("vring_loop.c")
    library.vring_ours.restype = library.vring_least.restype = ctypes.c_int64
    library.vring_ours.argtypes = (*(ctypes.c_void_p,) * 7, ctypes.c_uint64)
    library.vring_least.argtypes = (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p)
    return library


def _ours(ring: _Ring) -> Callable[[], float]:
    loop, queue = _library().vring_ours, ring.queue
    chain = queue._chain
    arguments = [
        ctypes.byref(ring.parts),
        pointer(ffi.addressof(lib, "pykvm_vring_pop")),
        pointer(ffi.addressof(lib, "pykvm_vring_push")),
        pointer(queue.c),
        pointer(chain),
        pointer(ffi.addressof(chain, "generation")),
        pointer(ffi.addressof(chain, "head")),
    ]

    def sample() -> float:
        elapsed: int = loop(*arguments, ROUNDS)
        if elapsed < 0 or queue.in_flight:
            raise BenchError(f"the loop around the queue: {elapsed}, {queue.in_flight} in flight")
        return elapsed / ROUNDS

    return sample


def _least(ring: _Ring) -> Callable[[], float]:
    loop = _library().vring_least
    total = ctypes.c_uint64()

    def sample() -> float:
        elapsed: int = loop(ctypes.byref(ring.parts), ROUNDS, ctypes.byref(total))
        if elapsed < 0 or not total.value:
            raise BenchError(f"the reference's loop: {elapsed}")
        return elapsed / ROUNDS

    return sample


def measure(pairs: int) -> Iterator[Result]:
    """One buffer, three, three in an indirect table; and where RAM has many regions."""
    for name, buffers, indirect, regions, goal in (
        ("one", THREE[:1], False, 2, Goal(150, OF_OURS)),
        ("three", THREE, False, 2, None),
        ("indirect", THREE, True, 2, None),
        ("32-regions", THREE[:1], False, 32, None),
    ):
        ours, least = _Ring(buffers, indirect, regions), _Ring(buffers, False, 1)
        samples = take_turns([_ours(ours), _least(least)], pairs)
        yield compare(
            f"vring/{name}", "ns/chain", *samples, goal=goal, note="offered, popped, pushed"
        )
