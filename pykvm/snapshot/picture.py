"""A difference as a picture: memory page by page, and beside it what else is different.

However large the memory, there are at most some thousand cells: one has as many pages as it takes.
"""

from __future__ import annotations

from itertools import islice

from pykvm._abi import ffi
from pykvm.debug.svg import FAINT, box, clean, drawing, mono, path, text
from pykvm.memory.units import PAGE_SIZE, format_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any

    from pykvm.snapshot.diff import Diff, Region

WIDTH, LEFT, TOP, PITCH, SIDE = 1000, 96, 30, 9, 690
COLUMNS, ROWS, REGIONS = 64, 40, 12
"""Cells of a row; rows at most; regions at most: the ones in which most is different."""
LETTERS = 50
"""Of a line beside the map."""

ZEROS, SAME, WRITTEN, APPEARED, GONE = range(5)
Cell = tuple[int, int, float]
_LEGEND = (
    ("#e8e8e8", "zeros in both"),
    ("#a9b4bd", "the same in both"),
    ("#d55e00", "written"),
    ("#0072b2", "zeros before"),
    ("#cc79a7", "zeros now"),
)
_PAGES, _REGISTERS, _DEVICES, _ROWS_OF_HTML = 10, 14, 6, 100


def svg(diff: Diff) -> str:
    """The picture as SVG."""
    # Of many regions those are shown that tell most, each where it lies.
    by_changes = sorted(diff.regions, key=lambda region: -region.count)[:REGIONS]
    regions = sorted(by_changes, key=lambda region: region.gpa)
    per = pages_per_cell(regions)
    parts, y = _map(regions, per)
    beside, bottom = _beside(diff)
    if len(diff.regions) > len(regions):
        hidden = sum(region.count for region in diff.regions) - sum(r.count for r in regions)
        more = f"and {len(diff.regions) - len(regions)} more regions, {hidden} pages different"
        parts.append(text(LEFT, y + 8, more))
        y += 14
    y = max(y, bottom) + 8
    x: float = LEFT
    for colour, meaning in _LEGEND:
        parts += path([box(x, y, PITCH - 1, PITCH - 1)], colour)
        parts.append(text(x + 12, y + 8, meaning))
        x += 30 + 6 * len(meaning)
    size = format_size(per * PAGE_SIZE)
    told = f"A cell is {size}, a row {format_size(per * COLUMNS * PAGE_SIZE)}."
    if per > 1:
        told += " It is filled as far as its pages are different, in the colour of most of them."
    parts.append(text(LEFT, y + 24, told, 160, f'fill="{FAINT}"'))
    total = sum(region.pages for region in diff.regions)
    title = f"{len(diff.pages)} of {total} pages, {len(diff.registers)} registers are different"
    heading = text(LEFT, 16, title, 100, 'font-weight="bold"')
    return drawing(WIDTH, y + 34, [heading, *parts, *beside])


def html(diff: Diff) -> str:
    """The picture, and a table of all that is no page, as far as it is of use."""
    rows = [
        (str(change.cpu), change.name, f"{change.old:#x}", f"{change.new:#x}")
        for change in diff.registers[:_ROWS_OF_HTML]
    ]
    if len(diff.registers) > _ROWS_OF_HTML:
        rows.append(("", f"and {len(diff.registers) - _ROWS_OF_HTML} more", "", ""))
    rows += [("", f"device {name}", "", "") for name in diff.devices[:_ROWS_OF_HTML]]
    head = "".join(f"<th>{name}</th>" for name in ("cpu", "what", "before", "now"))
    body = "".join(
        "<tr>" + "".join(f"<td>{clean(cell, 200)}</td>" for cell in row) + "</tr>" for row in rows
    )
    table = f"<table><tr>{head}</tr>{body}</table>" if rows else ""
    return f"<div>{svg(diff)}{table}</div>"


def pages_per_cell(regions: Iterable[Region]) -> int:
    """The least power of two at which the rows of all regions are few enough."""
    sizes, per = [region.pages for region in regions], 1
    while sum(-(-pages // (per * COLUMNS)) for pages in sizes) > ROWS:
        per *= 2
    return per


def cells(region: Region, per: int) -> Iterator[Cell]:
    """Of each cell its ground, the kind of most of its differences, and their share, 0 to 1.

    The ground is :data:`SAME` if any page without a difference is not zeros; a cell without
    differences is of the kind that its ground is of.
    """
    old, new, differs = (ffi.buffer(bitmap) for bitmap in (region.old, region.new, region.differs))
    for first in range(0, region.pages, per):
        count = min(per, region.pages - first)
        was, now, other = (_bits(bitmap, first, count) for bitmap in (old, new, differs))
        ground = SAME if was & ~other else ZEROS
        if not other:
            yield ground, ground, 0.0
            continue
        kinds = ((WRITTEN, was & now), (APPEARED, now & ~was), (GONE, was & ~now))
        kind = max(kinds, key=lambda each: (each[1] & other).bit_count())[0]
        yield ground, kind, other.bit_count() / count


def _bits(bitmap: Any, first: int, count: int) -> int:
    """Bits of a bitmap as a number; of many, whole bytes are read and nothing before them."""
    data = int.from_bytes(bitmap[first // 8 : (first + count + 7) // 8], "little")
    return data >> first % 8 & (1 << count) - 1


def _map(regions: Iterable[Region], per: int) -> tuple[list[str], int]:
    """The cells, and how far down they go."""
    y = TOP
    labels: list[str] = []
    plain: dict[int, list[str]] = {ZEROS: [], SAME: []}
    coloured: dict[int, list[str]] = {WRITTEN: [], APPEARED: [], GONE: []}
    for region in regions:
        span = f"{region.gpa:#x} to {region.gpa + region.pages * PAGE_SIZE - 1:#x}"
        size = format_size(region.pages * PAGE_SIZE)
        labels.append(text(LEFT, y + 8, f"{region.name or 'memory'}, {size}: {span}", 90))
        y += 14
        seen = cells(region, per)
        for row in range(-(-region.pages // (per * COLUMNS))):
            at = region.gpa + row * COLUMNS * per * PAGE_SIZE
            if row % 2 == 0:
                end = f'text-anchor="end" fill="{FAINT}"'
                labels.append(mono(LEFT - 6, y + 8, f"{at:#x}", 18, end))
            line = list(islice(seen, COLUMNS))
            for n, (ground, kind, share) in enumerate(line):
                x = LEFT + n * PITCH
                if share < 1:
                    _extend(plain[ground], x, y + (PITCH - 1) / 2)
                if share:
                    tall = round(max(2.0, share * (PITCH - 1)), 1)
                    coloured[kind].append(box(x, y + PITCH - 1 - tall, PITCH - 1, tall))
            y += PITCH
        y += 6
    # A run of cells is one line; its dashes are the cells, and begin anew with each line.
    lines = [
        f'<path d="{"".join(parts)}" stroke="{_LEGEND[kind][0]}" stroke-width="{PITCH - 1}" '
        f'stroke-dasharray="{PITCH - 1} 1" fill="none"/>'
        for kind, parts in plain.items()
        if parts
    ]
    for kind, boxes in coloured.items():
        lines += path(boxes, _LEGEND[kind][0])
    return [*lines, *labels], y


def _extend(lines: list[str], x: int, y: float) -> None:
    """Add a cell, to the line that ends where it begins if there is one."""
    if lines:
        start, _, length = lines[-1].partition("h")
        if start.endswith(f" {y:g}") and int(start[1:].split()[0]) + int(length) == x:
            lines[-1] = f"{start}h{int(length) + PITCH}"
            return
    lines.append(f"M{x} {y:g}h{PITCH}")


def _beside(diff: Diff) -> tuple[list[str], int]:
    """Addresses, registers and devices that are different, and how far down they go."""
    lines: list[tuple[str, bool]] = []

    def chapter(title: str, items: list[str], more: str) -> None:
        lines.extend([(title, True), *((item, False) for item in items)])
        if more:
            lines.append((more, False))
        lines.append(("", False))

    runs = (
        (region.gpa + first * PAGE_SIZE, count)
        for region in diff.regions
        if region.count
        for first, count in region.runs()
    )
    shown = list(islice(runs, _PAGES))
    left = len(diff.pages) - sum(count for _, count in shown)
    if shown:
        items = [
            f"{gpa:#x}" + (f" to {gpa + count * PAGE_SIZE - 1:#x}: {count}" if count > 1 else "")
            for gpa, count in shown
        ]
        chapter("pages", items, f"and {left} more" if left else "")
    several = any(change.cpu for change in diff.registers)
    if diff.registers:
        changes = [
            f"{f'cpu {change.cpu} ' * several}{change.name} {change.old:#x} → {change.new:#x}"
            for change in diff.registers[:_REGISTERS]
        ]
        left = len(diff.registers) - len(changes)
        chapter("registers", changes, f"and {left} more" if left else "")
    if diff.devices:
        left = len(diff.devices) - _DEVICES
        chapter("devices", diff.devices[:_DEVICES], f"and {left} more" if left > 0 else "")
    parts, y = [], TOP + 8
    for line, heading in lines:
        if line:
            make = text if heading else mono
            parts.append(make(SIDE, y, line, LETTERS, 'font-weight="bold"' * heading))
        y += 13 if line else 6
    return parts, y
