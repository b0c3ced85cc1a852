from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykvm.memory import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("0x1000", 4096),
        ("1_000", 1000),
        ("512K", 512 << 10),
        ("512k", 512 << 10),
        ("2M", 2 << 20),
        (" 2 M ", 2 << 20),
        ("2MiB", 2 << 20),
        ("0x10K", 16 << 10),
        ("1G", 1 << 30),
        ("3t", 3 << 40),
        (12345, 12345),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        "M",
        "2MB",
        "2B",
        "2P",
        "1.5G",
        "-1",
        "-2M",
        "010",
        "2 2M",
        "2MM",
        "2iB",
        "٢M",
        "0x",
        "K1",
    ],
)
def test_text_that_is_no_size_is_refused_and_quoted(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a size: write bytes"):
        parse_size(text)


def test_a_negative_number_is_no_size() -> None:
    with pytest.raises(ValueError, match="cannot be negative: -4096"):
        parse_size(-4096)


@pytest.mark.parametrize("value", [True, 2.0, None, b"2M", [4096]])
def test_a_size_of_another_type_is_a_type_error(value: object) -> None:
    with pytest.raises(TypeError, match=f"a size must be an int, not {type(value).__name__}"):
        parse_size(value)  # type: ignore[arg-type]


def test_sizes_are_printed_in_the_largest_unit_that_divides_them() -> None:
    sizes = (0, 100, 4096, 0x3000, 1 << 20, 3 << 19, 5 << 30, 2 << 40)
    assert [format_size(size) for size in sizes] == [
        "0", "100", "4K", "12K", "1M", "1536K", "5G", "2T",
    ]  # fmt: skip


@given(st.integers(min_value=0, max_value=1 << 52))
def test_a_printed_size_reads_back_as_itself(size: int) -> None:
    assert parse_size(format_size(size)) == size
