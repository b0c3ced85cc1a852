"""Pictures of memory and of execution: well-formed, bounded, and true, whatever it is."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pykvm._abi import ffi
from pykvm.debug import svg
from pykvm.debug.coverage import Coverage
from pykvm.debug.walk import ROWS, of_coverage, walk
from pykvm.memory.units import PAGE_SIZE
from pykvm.snapshot import picture
from pykvm.snapshot.diff import Change, Diff, Region
from pykvm.snapshot.image import Part
from pykvm.symbols import Symbols

NAMES = st.text(max_size=80)


def texts(drawn: str) -> list[str]:
    found = (each.text for each in ElementTree.fromstring(drawn).iter())
    return [line for line in found if line and line.strip()]


def region(
    gpa: int, pages: int, old: set[int], new: set[int], differs: set[int], name: str = ""
) -> Region:
    parts = [Part(0, gpa, pages * PAGE_SIZE, False, name, 0) for _ in range(2)]
    bitmap = ffi.new("uint64_t[]", parts[0].words)
    for where, which in ((parts[0].held, old), (parts[1].held, new), (bitmap, differs)):
        for page in which:
            where[page // 64] |= 1 << page % 64
    return Region(parts[0], parts[1], bitmap, len(differs))


def difference(
    *regions: Region, changes: tuple[Change, ...] = (), devices: tuple[str, ...] = ()
) -> Diff:
    pages = [
        each.gpa + (first + n) * PAGE_SIZE
        for each in regions
        for first, count in each.runs()
        for n in range(count)
    ]
    return Diff(pages, list(changes), list(devices), regions)


# ---- text ----------------------------------------------------------------------------------------


@given(NAMES, st.integers(1, 90))
def test_any_name_is_text_of_bounded_length(name: str, most: int) -> None:
    drawn = svg.drawing(10, 10, [svg.text(0, 0, name, most)])
    drawn.encode()  # no half of a character
    element = ElementTree.fromstring(drawn)[1]
    assert len(element.text or "") <= most and len(element) == 0


def test_a_name_cannot_leave_its_element() -> None:
    assert texts(svg.drawing(1, 1, [svg.text(0, 0, '</text>"<script>&\x1b\u202e')]))[-1] == (
        '</text>"<script>&··'
    )


# ---- the map of memory ---------------------------------------------------------------------------


def test_each_kind_of_page_is_told() -> None:
    one = region(0, 6, old={1, 2, 4}, new={1, 2, 3}, differs={2, 3, 4})
    assert list(picture.cells(one, 1)) == [
        (picture.ZEROS, picture.ZEROS, 0.0),
        (picture.SAME, picture.SAME, 0.0),
        (picture.ZEROS, picture.WRITTEN, 1.0),
        (picture.ZEROS, picture.APPEARED, 1.0),
        (picture.ZEROS, picture.GONE, 1.0),
        (picture.ZEROS, picture.ZEROS, 0.0),
    ]
    assert list(picture.cells(one, 4)) == [
        (picture.SAME, picture.WRITTEN, 0.5),
        (picture.ZEROS, picture.GONE, 0.5),  # two pages are left for the last cell
    ]


@given(st.data(), st.integers(1, 300), st.sampled_from([1, 2, 4, 8, 16, 64, 256]))
def test_cells_count_what_is_there(data: st.DataObject, pages: int, per: int) -> None:
    some = st.sets(st.integers(0, pages - 1))
    old, new, extra = data.draw(some), data.draw(some), data.draw(some)
    differs = (old ^ new) | (extra & old & new)
    found = list(picture.cells(region(0, pages, old, new, differs), per))
    assert len(found) == -(-pages // per)
    for n, (ground, kind, share) in enumerate(found):
        mine = set(range(n * per, min(pages, (n + 1) * per)))
        assert share * len(mine) == pytest.approx(len(mine & differs))
        assert (ground == picture.SAME) == bool(mine & old - differs)
        members = {
            picture.WRITTEN: differs & old & new,
            picture.APPEARED: differs - old,
            picture.GONE: differs - new,
        }
        counts = {of: len(mine & each) for of, each in members.items()}
        assert counts[kind] == max(counts.values()) if share else kind == ground


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 2**40), st.integers(1, 2**18), NAMES, st.integers(0, 2**62)),
        max_size=20,
    ),
    st.lists(st.tuples(st.integers(0, 3), NAMES, st.integers(0, 2**64 - 1)), max_size=40),
    st.lists(NAMES, max_size=20),
)
def test_any_difference_is_a_picture_of_bounded_size(
    places: list[tuple[int, int, str, int]],
    changes: list[tuple[int, str, int]],
    devices: list[str],
) -> None:
    regions = [
        region(gpa * PAGE_SIZE, pages, {seed % pages}, set(), {seed % pages}, name)
        for gpa, pages, name, seed in places
    ]
    found = difference(
        *regions,
        changes=tuple(Change(cpu, name, value, value ^ 1) for cpu, name, value in changes),
        devices=tuple(devices),
    )
    drawn = found._repr_svg_()
    root = ElementTree.fromstring(drawn)
    assert int(root.get("height") or 0) < 1000 and len(drawn) < 300_000
    ElementTree.fromstring(found._repr_html_())


def test_the_largest_memory_is_no_larger_a_picture() -> None:
    pages = (64 << 30) // PAGE_SIZE
    high = region(4 << 30, pages, set(), {0}, {0, pages - 1}, "high")
    for word in range(0, pages // 64, 3):  # as many cells as can be, none as its neighbour
        high.differs[word] = high.old[word] = 0x5555 << word % 48
    drawn = Diff([0] * pages, [], [], [high])._repr_svg_()
    assert len(drawn) < 300_000
    assert int(ElementTree.fromstring(drawn).get("height") or 0) < 1000
    assert "A cell is 32M" in drawn and f"{4 << 30:#x}" in texts(drawn)


def test_beside_the_map_stands_what_changed_and_how_much_more() -> None:
    many = region(0, 64, set(range(0, 64, 2)), set(), set(range(0, 64, 2)), "ram<&>")
    changes = tuple(Change(n % 2, f"regs.r{n}", n, n + 1) for n in range(20))
    told = texts(difference(many, changes=changes, devices=("serial<1>",))._repr_svg_())
    assert "32 of 64 pages, 20 registers are different" in told
    assert {"0x0", "0x2000", "and 22 more", "and 6 more", "serial<1>"} <= set(told)
    assert "cpu 1 regs.r1 0x1 → 0x2" in told and "ram<&>, 256K: 0x0 to 0x3ffff" in told


def test_no_difference_is_a_picture_too() -> None:
    told = texts(Diff([], [], [])._repr_svg_())
    assert "0 of 0 pages, 0 registers are different" in told
    assert "<table>" not in Diff([], [], [])._repr_html_()


# ---- the walk ------------------------------------------------------------------------------------


def coverage(blocks: list[tuple[int, int] | int], hit: list[int]) -> Coverage:
    made = Coverage(None, blocks)  # type: ignore[arg-type]  # nothing is planted
    made.hit = dict.fromkeys(hit)
    return made


def test_blocks_stand_by_address_with_the_order_in_which_they_were_reached() -> None:
    symbols = Symbols({"main<&>": 0x1000, "leaf": 0x2000})
    told = texts(
        of_coverage(coverage([(0x2000, 3), (0x1000, 7), 0x1008], [0x1000, 0x2000]), symbols)
    )
    assert told[0] == "2 of 3 blocks were reached"
    rows = [told[at + 1 :] for at in (told.index("0x1000"), told.index("0x1008"))]
    assert rows[0][:3] == ["main<&>", "7 bytes", "no. 1"]
    assert rows[1][:2] == ["main<&>+0x8", "not reached"]
    assert told[told.index("0x2000") :][:4] == ["0x2000", "leaf", "3 bytes", "no. 2"]


def test_of_many_blocks_a_row_is_several() -> None:
    blocks = list(range(0x1000, 0x1000 + 16 * 5 * ROWS, 16))
    told = texts(of_coverage(coverage([*blocks], blocks[:7]), Symbols({})))
    assert told.count("0 of 5") == ROWS - 2 and "5 of 5" in told and "2 of 5" in told


def rectangles(drawn: str) -> list[str]:
    paths = [each.get("d") or "" for each in ElementTree.fromstring(drawn).iter()]
    return [part for each in paths for part in each.split("M")[1:] if part.endswith("z")]


def test_a_mark_is_as_high_as_the_share_of_its_steps() -> None:
    steps = [0, 0, 0, 1] * 240  # four to a column, all columns alike
    drawn = walk({0: "a", 1: "b"}, steps, None, "", "", lambda _, count: str(count))
    lanes_and_marks = rectangles(drawn)
    assert len(lanes_and_marks) == 4  # alike, so one rectangle
    assert [part.split("v")[1].split("h")[0] for part in lanes_and_marks] == ["12", "12", "9", "3"]
    assert {"720", "240", "960"} <= set(texts(drawn))


@settings(deadline=None)
@given(
    st.dictionaries(st.integers(0, 2**64 - 1), NAMES, max_size=100),
    st.lists(st.integers(0, 2**32), max_size=400),
    st.dictionaries(NAMES, st.integers(0, 2**64 - 1), max_size=20),
    NAMES,
)
def test_any_walk_is_a_picture_of_bounded_size(
    places: dict[int, str], choices: list[int], symbols: dict[str, int], title: str
) -> None:
    addresses = sorted(places)
    steps = [addresses[n % len(addresses)] for n in choices] if addresses else []
    drawn = walk(places, steps, Symbols(symbols), title, "steps", lambda _, count: str(count))
    assert int(ElementTree.fromstring(drawn).get("height") or 0) < 700
    assert len(drawn) < 300_000


def test_the_longest_walk_is_no_larger_a_picture() -> None:
    places = dict.fromkeys(range(10_000), "nop")
    steps = [n * 7919 % 10_000 for n in range(200_000)]  # everywhere all the time
    drawn = walk(places, steps, None, "", "", lambda _, count: str(count))
    assert len(drawn) < 300_000
    ElementTree.fromstring(drawn)
