"""Names for addresses: where a guest hangs."""

from __future__ import annotations

from pathlib import Path

import pytest

from pykvm.errors import BootError
from pykvm.symbols import Symbols, check_system_map

TABLE = {"start": 0x1000, "middle": 0x1100, "end": 0x9000, "absolute": 0}


@pytest.mark.parametrize(
    ("address", "name"),
    [
        (0x1000, "start"),
        (0x1001, "start+0x1"),
        (0x10FF, "start+0xff"),
        (0x1100, "middle"),
        (0xFFFF_FFFF_FFFF_FFFF, ""),  # far behind the last
        (0xFFF, ""),
        (0, ""),
    ],
)
def test_an_address_is_named_by_the_symbol_before_it(address: int, name: str) -> None:
    assert Symbols(TABLE).name(address) == name


def test_no_symbols_name_nothing() -> None:
    assert Symbols({}).name(0x1000) == ""


def test_a_system_map_is_read_as_the_kernel_writes_it(tmp_path: Path) -> None:
    file = tmp_path / "System.map"
    file.write_text(
        "0000000000000000 A fixed_percpu_data\n"
        "ffffffff81000000 T _stext\n"
        "ffffffff81000200 t local.0\t[module]\n"
    )
    symbols = Symbols.of_system_map(file)
    assert symbols.name(0xFFFFFFFF81000010) == "_stext+0x10"
    assert symbols.name(0xFFFFFFFF81000204) == "local.0+0x4"


def test_debians_placeholder_names_nothing(tmp_path: Path) -> None:
    file = tmp_path / "System.map"
    file.write_text(
        "ffffffffffffffff B The real System.map is in the linux-image-<version>-dbg package\n"
    )
    assert Symbols.of_system_map(file).name(0xFFFFFFFF81000000) == ""


@pytest.mark.parametrize("line", ["", "ffffffff81000000 T", "xyz T name", "\x7fELF"])
def test_another_file_is_quoted(tmp_path: Path, line: str) -> None:
    file = tmp_path / "System.map"
    file.write_text(f"ffffffff81000000 T _stext\n{line}\n")
    with pytest.raises(ValueError, match="line 2 is no symbol"):
        Symbols.of_system_map(file)


def test_a_look_at_the_first_line_finds_what_is_no_system_map(tmp_path: Path) -> None:
    file = tmp_path / "System.map"
    file.write_bytes(b"\x7fELF\x02" * 100000)
    with pytest.raises(BootError, match="line 1 is no symbol") as found:
        check_system_map(file)
    assert len(str(found.value)) < 20000
    file.write_text("ffffffff81000000 T _stext\nand so on")
    check_system_map(file)
