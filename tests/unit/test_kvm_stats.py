"""Statistics files, parsed from bytes laid out by hand and from bytes that make no sense."""

from __future__ import annotations

import os
from collections.abc import Callable
from struct import pack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykvm.kvm.stats import Stat, Stats, StatsError, describe, values

NAME = 48


def text(name: str, size: int = NAME) -> bytes:
    return name.encode().ljust(size, b"\0")


def desc(
    name: str,
    type: int,
    unit: int = 0,
    base: int = 0,
    exponent: int = 0,
    size: int = 1,
    offset: int = 0,
    bucket: int = 0,
) -> bytes:
    return pack("<IhHII", type | unit << 4 | base << 8, exponent, size, offset, bucket) + text(name)


DESCRIPTORS = [
    desc("exits", 0),
    desc("nx_lpage_splits", 1, offset=8),
    desc("max_mmu_page_hash_collisions", 2, offset=16),
    desc("halt_poll_success_ns", 0, unit=2, exponent=-9, offset=24),
    desc("halt_wait_hist", 4, unit=2, exponent=-9, size=4, offset=32),
    desc("linear", 3, size=2, offset=64, bucket=100),
    desc("guest_mode", 1, unit=4, offset=80),
    desc("memory", 2, unit=1, base=1, exponent=20, offset=88),
    desc("time", 0, unit=3, offset=96),
    desc("later", 7, unit=9, base=5, offset=104),
]
WORDS = [11, 12, 13, 14, 0, 1, 2, 3, 21, 22, 1, 5, 1 << 63, 9]


def blob(descriptors: list[bytes] = DESCRIPTORS, words: list[int] = WORDS) -> bytes:
    id_offset, desc_offset = 24, 24 + NAME
    data_offset = desc_offset + sum(map(len, descriptors))
    header = pack("<IIIIII", 0, NAME, len(descriptors), id_offset, desc_offset, data_offset)
    return (
        header + text("kvm-4711/vcpu-0") + b"".join(descriptors) + pack(f"<{len(words)}Q", *words)
    )


def reader(data: bytes, most: int = 1 << 20) -> Callable[[int, int], bytes]:
    return lambda offset, size: data[offset : offset + min(size, most)]


def as_file(data: bytes) -> int:
    fd = os.memfd_create("stats")
    os.write(fd, data)
    return fd


def test_a_statistics_file_is_names_and_values() -> None:
    with Stats(as_file(blob())) as stats:
        assert stats.id == "kvm-4711/vcpu-0"
        assert stats.read() == {
            "exits": 11,
            "nx_lpage_splits": 12,
            "max_mmu_page_hash_collisions": 13,
            "halt_poll_success_ns": 14,
            "halt_wait_hist": [0, 1, 2, 3],
            "linear": [21, 22],
            "guest_mode": 1,
            "memory": 5,
            "time": 1 << 63,
            "later": 9,
        }


def test_it_is_read_anew_each_time() -> None:
    fd = as_file(blob())
    with Stats(fd) as stats:
        os.pwrite(fd, pack("<Q", 99), len(blob()) - 8 * len(WORDS))
        assert stats.read()["exits"] == 99


@pytest.mark.parametrize(
    ("name", "type", "unit", "base", "exponent"),
    [
        ("exits", "cumulative", "", 10, 0),
        ("nx_lpage_splits", "instant", "", 10, 0),
        ("max_mmu_page_hash_collisions", "peak", "", 10, 0),
        ("halt_poll_success_ns", "cumulative", "seconds", 10, -9),
        ("halt_wait_hist", "logarithmic histogram", "seconds", 10, -9),
        ("linear", "linear histogram", "", 10, 0),
        ("guest_mode", "instant", "boolean", 10, 0),
        ("memory", "peak", "bytes", 2, 20),
        ("time", "cumulative", "cycles", 10, 0),
        ("later", "type 7", "unit 9", 0, 0),
    ],
)
def test_each_statistic_says_what_it_counts(
    name: str, type: str, unit: str, base: int, exponent: int
) -> None:
    _, stats, _ = describe(reader(blob()))
    stat = stats[name]
    assert (stat.type, stat.unit, stat.base, stat.exponent) == (type, unit, base, exponent)
    assert name in repr(stat)


def test_a_linear_histogram_has_a_bucket_size() -> None:
    _, stats, _ = describe(reader(blob()))
    assert stats["linear"].bucket_size == 100
    assert stats["linear"].size == 2


def test_short_reads_are_completed() -> None:
    assert describe(reader(blob(), most=7))[0] == "kvm-4711/vcpu-0"


def test_a_file_without_statistics_has_no_values() -> None:
    with Stats(as_file(blob([], []))) as stats:
        assert stats.read() == {}


@pytest.mark.parametrize("cut", [0, 10, 24, 60, 100, 72 + 64 * 9])
def test_a_file_that_ends_too_early_says_where(cut: int) -> None:
    with pytest.raises(StatsError, match="ends inside its"):
        describe(reader(blob()[:cut]))


def test_values_that_are_missing_name_their_statistic() -> None:
    with Stats(as_file(blob()[:-8])) as stats, pytest.raises(StatsError, match="later"):
        stats.read()


@pytest.mark.parametrize(
    "bad",
    [
        [desc("twice", 0), desc("twice", 0, offset=8)],
        [desc("odd", 0, offset=4)],
        [desc("far", 0, offset=1 << 31)],
        [desc("", 0)],
        [desc("ümlaut", 0)],
    ],
    ids=["two of a name", "misaligned", "far away", "nameless", "not ascii"],
)
def test_descriptors_that_make_no_sense_are_refused(bad: list[bytes]) -> None:
    with pytest.raises(StatsError):
        describe(reader(blob(bad)))


def test_a_descriptor_is_closed_when_it_makes_no_sense() -> None:
    fd = as_file(b"")
    with pytest.raises(StatsError):
        Stats(fd)
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)


@given(st.binary(max_size=400))
def test_no_bytes_at_all_raise_anything_else(data: bytes) -> None:
    try:
        _, stats, offset = describe(reader(data))
        values(stats, data[offset:])
    except StatsError as error:
        assert str(error)


@given(
    position=st.integers(0, len(blob()) - 1),
    change=st.binary(min_size=1, max_size=8),
)
def test_no_damage_to_a_good_file_raises_anything_else(position: int, change: bytes) -> None:
    data = bytearray(blob())
    data[position : position + len(change)] = change
    try:
        _, stats, offset = describe(reader(bytes(data)))
        values(stats, bytes(data)[offset:])
    except StatsError as error:
        assert str(error)


@given(st.lists(st.integers(0, (1 << 64) - 1), min_size=1, max_size=64))
def test_values_survive(words: list[int]) -> None:
    stat = Stat("x", 4, 0, len(words), 0, 0)
    found = values({"x": stat}, pack(f"<{len(words)}Q", *words))
    assert found == {"x": words}
