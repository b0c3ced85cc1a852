"""KVM's binary statistics (api.rst 4.133): names and values of a VM or a vCPU.

The file behind the descriptor describes itself: a header, an id, an array of descriptors with
names, and the values, 64 bits each. What is not well-formed raises :class:`StatsError`.
"""

from __future__ import annotations

import os

from pykvm._abi import ffi, lib
from pykvm.errors import PykvmError

from .handle import Handle

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    Read = Callable[[int, int], bytes]

# Far above any kernel's, and low enough that a nonsensical header costs no memory.
MAX_DESCRIPTORS = 1 << 14
MAX_NAME = 1 << 10
MAX_VALUES = 1 << 16

_TYPES = {
    lib.KVM_STATS_TYPE_CUMULATIVE: "cumulative",
    lib.KVM_STATS_TYPE_INSTANT: "instant",
    lib.KVM_STATS_TYPE_PEAK: "peak",
    lib.KVM_STATS_TYPE_LINEAR_HIST: "linear histogram",
    lib.KVM_STATS_TYPE_LOG_HIST: "logarithmic histogram",
}
_UNITS = {
    lib.KVM_STATS_UNIT_NONE: "",
    lib.KVM_STATS_UNIT_BYTES: "bytes",
    lib.KVM_STATS_UNIT_SECONDS: "seconds",
    lib.KVM_STATS_UNIT_CYCLES: "cycles",
    lib.KVM_STATS_UNIT_BOOLEAN: "boolean",
}
_BASES = {lib.KVM_STATS_BASE_POW10: 10, lib.KVM_STATS_BASE_POW2: 2}


class StatsError(PykvmError, ValueError):
    """A statistics file does not have the form that KVM documents."""


class Stat:
    """One statistic: what its numbers mean.

    Attributes:
        name: KVM's name of it.
        type: "cumulative", "instant", "peak", "linear histogram", "logarithmic histogram", or
            "type N" for one that is newer than this module.
        unit: "", "bytes", "seconds", "cycles", "boolean", or "unit N".
        base: 10 or 2.
        exponent: a value counts ``base ** exponent`` units: exponent -9 of seconds is ns.
        size: how many values: 1, or the buckets of a histogram.
        offset: in bytes, of the first value from the start of the values.
        bucket_size: width of a bucket of a linear histogram, else 0. Bucket n of a logarithmic one
            counts values from ``2 ** (n - 1)`` to ``2 ** n - 1``, bucket 0 counts zeros.
    """

    __slots__ = (
        "base",
        "bucket_size",
        "exponent",
        "name",
        "offset",
        "size",
        "type",
        "unit",
    )

    def __init__(
        self, name: str, flags: int, exponent: int, size: int, offset: int, bucket_size: int
    ) -> None:
        """Args: as in ``struct kvm_stats_desc``; flags hold type, unit and base."""
        kind = flags & lib.KVM_STATS_TYPE_MASK
        unit = flags & lib.KVM_STATS_UNIT_MASK
        base = flags & lib.KVM_STATS_BASE_MASK
        self.name = name
        self.type = _TYPES.get(kind, f"type {kind >> lib.KVM_STATS_TYPE_SHIFT}")
        self.unit = _UNITS.get(unit, f"unit {unit >> lib.KVM_STATS_UNIT_SHIFT}")
        self.base = _BASES.get(base, 0)
        self.exponent = exponent
        self.size = size
        self.offset = offset
        self.bucket_size = bucket_size

    def __repr__(self) -> str:
        unit = self.unit
        if self.exponent:
            unit = f"{self.base}^{self.exponent} {unit}".rstrip()
        return f"<Stat {self.name}: {self.type}{', ' if unit else ''}{unit}>"


class Stats(Handle):
    """An open statistics file (``Vm.get_stats_fd``, ``Vcpu.get_stats_fd``).

    It may be read at any time and from any thread, also while the vCPU runs, and stays open when
    the VM is closed.

    Attributes:
        id: what the numbers are of: ``kvm-<pid>``, ``kvm-<pid>/vcpu-<id>``.
        stats: the :class:`Stat` objects by name.
    """

    __slots__ = ("_data_offset", "_data_size", "id", "stats")

    kind = "stats"

    def __init__(self, fd: int) -> None:
        """Read the description. The descriptor is closed if it makes no sense."""
        super().__init__(fd)
        try:
            self.id, self.stats, self._data_offset = describe(self._pread)
            self._data_size = max(
                (stat.offset + 8 * stat.size for stat in self.stats.values()), default=0
            )
        except BaseException:
            self.close()
            raise

    def _pread(self, offset: int, size: int) -> bytes:
        return os.pread(self.fd, size, offset)

    def read(self) -> dict[str, int | list[int]]:
        """The values now: a number by name, a list of buckets for a histogram."""
        data = self._pread(self._data_offset, self._data_size) if self._data_size else b""
        return values(self.stats, data)


def describe(read: Read) -> tuple[str, dict[str, Stat], int]:
    """Read the description of a statistics file.

    Args:
        read: ``read(offset, size)`` gives the file's bytes, fewer at its end.

    Returns: its id, its statistics by name, and the offset of the values.

    Errors: :class:`StatsError`.
    """
    raw = _exactly(read, 0, ffi.sizeof("struct kvm_stats_header"), "header")
    header = ffi.from_buffer("struct kvm_stats_header *", raw)
    if not 0 < header.name_size <= MAX_NAME:
        raise StatsError(f"names of {header.name_size} bytes")
    if header.num_desc > MAX_DESCRIPTORS:
        raise StatsError(f"{header.num_desc} descriptors")
    name_size = header.name_size
    identity = _text(_exactly(read, header.id_offset, name_size, "id"), "id")
    fixed = ffi.sizeof("struct kvm_stats_desc")
    step = fixed + name_size
    block = _exactly(read, header.desc_offset, step * header.num_desc, "descriptors")
    stats: dict[str, Stat] = {}
    for start in range(0, len(block), step):
        desc = ffi.from_buffer("struct kvm_stats_desc *", block[start : start + fixed])
        name = _text(block[start + fixed : start + step], f"name {start // step}")
        if name in stats:
            raise StatsError(f"two statistics are named {name!r}")
        if desc.offset % 8 or desc.offset + 8 * desc.size > 8 * MAX_VALUES:
            raise StatsError(f"{name}: {desc.size} values at offset {desc.offset}")
        stats[name] = Stat(
            name, desc.flags, desc.exponent, desc.size, desc.offset, desc.bucket_size
        )
    return identity, stats, header.data_offset


def values(stats: dict[str, Stat], data: bytes) -> dict[str, int | list[int]]:
    """The values of statistics, from the bytes of the value block.

    Errors: :class:`StatsError` if the block ends before a value.
    """
    found: dict[str, int | list[int]] = {}
    words = memoryview(data[: len(data) // 8 * 8]).cast("Q")
    for name, stat in stats.items():
        first = stat.offset // 8
        items = words[first : first + stat.size].tolist()
        if len(items) != stat.size:
            raise StatsError(f"{name}: its values lie behind the end of the file")
        found[name] = items[0] if stat.size == 1 and "histogram" not in stat.type else items
    return found


def _exactly(read: Read, offset: int, size: int, what: str) -> bytes:
    """That many bytes: KVM's read may return less than asked for at a boundary of its parts."""
    data = b""
    while len(data) < size:
        more = read(offset + len(data), size - len(data))
        if not more:
            raise StatsError(f"the file ends inside its {what}")
        data += more
    return data


def _text(raw: bytes, what: str) -> str:
    text = raw.split(b"\0", 1)[0]
    if not text.isascii() or not text:
        raise StatsError(f"{what} is not a name: {raw[:32]!r}")
    return text.decode("ascii")
