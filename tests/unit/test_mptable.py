"""MP tables: found in memory, read back, and refused where they are damaged."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykvm.arch.x86_64.mptable import MpTable, build_mptable


@pytest.mark.parametrize("cpus", [1, 4, 254])
def test_mp_tables_are_found_and_read_back(cpus: int) -> None:
    memory = bytearray(1 << 20)
    built = build_mptable(cpus=cpus)
    built.write(memory)
    found = [at for at in range(0xF0000, 1 << 20, 16) if memory[at : at + 4] == b"_MP_"]
    assert found == [built.base]
    read = MpTable.decode(built.base, bytes(memory[built.base :]))
    assert (read.blob, repr(read)) == (built.blob, repr(built))
    processors = [members for kind, members in read.entries if kind == "processor"]
    assert [p["apic_id"] for p in processors] == list(range(cpus))
    assert [p["flags"] for p in processors] == [3] + [1] * (cpus - 1)
    wires = {m["irq"]: (m["pin"], m["flags"]) for k, m in read.entries if k == "interrupt"}
    assert wires[0] == (2, 0) and wires[4] == (4, 0) and wires[9] == (9, 0xD)
    assert 2 not in wires


@given(at=st.integers(0, 200), value=st.integers(1, 255), cut=st.integers(0, 220))
def test_damaged_mp_tables_are_refused(at: int, value: int, cut: int) -> None:
    raw = bytearray(build_mptable(cpus=1).blob)
    raw[at] ^= value
    for damaged in (bytes(raw), bytes(raw[:cut])):
        with pytest.raises(ValueError):
            MpTable.decode(0xF0000, damaged)


@pytest.mark.parametrize(
    "options",
    [
        {"cpus": 0},
        {"cpus": 255},
        {"cpus": 1, "base": 0xF0008},
        {"cpus": 1, "base": 0xE0000},
        {"cpus": 1, "base": 0xFFFF0},
    ],
)
def test_mp_tables_that_cannot_be_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        build_mptable(**options)
