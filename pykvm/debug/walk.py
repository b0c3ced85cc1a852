"""Where execution went, as a picture: code from top to bottom by address, time from left to right.

A row is an instruction or a block, or several where there are many; a column a step, or several.
"""

from __future__ import annotations

from pykvm.debug.svg import COLOURS, FAINT, box, drawing, mono, path, text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from pykvm.debug.coverage import Coverage
    from pykvm.debug.instructions import InstructionTrace
    from pykvm.symbols import Symbols

WIDTH, LEFT, AREA, TOP, PITCH = 960, 372, 480, 32, 14
ROWS, COLUMNS = 40, 240
LETTERS = 56
"""Of a row's label: address, name, and what is there."""


def of_coverage(covered: Coverage, symbols: Symbols) -> str:
    """Blocks, and when each was reached first."""
    order = {address: number for number, address in enumerate(covered.hit, 1)}

    def note(blocks: Sequence[int], hits: int) -> str:
        if len(blocks) > 1:
            return f"{hits} of {len(blocks)}"
        return f"no. {order[blocks[0]]}" if hits else "not reached"

    sizes = {a: f"{b.size} bytes" if b.size else "" for a, b in covered.blocks.items()}
    title = f"{len(covered.hit)} of {len(sizes)} blocks were reached"
    return walk(sizes, list(covered.hit), symbols, title, "blocks as they were reached", note)


def of_instructions(trace: InstructionTrace, symbols: Symbols | None) -> str:
    """Instructions, and when each was executed."""
    texts = {each.address: each.text for each in trace.executed}
    steps = [each.address for each in trace.executed]
    title = f"{len(steps)} instructions were executed, at {len(texts)} addresses"
    return walk(texts, steps, symbols, title, "instructions", lambda _, count: f"{count} ×")


def walk(
    places: Mapping[int, str],
    steps: Sequence[int],
    symbols: Symbols | None,
    title: str,
    unit: str,
    note: Callable[[Sequence[int], int], str],
) -> str:
    """The picture as SVG.

    Args:
        places: address → what is there; those that were never reached as well.
        steps: addresses in the order in which they were reached, all of ``places``.
        symbols: names for addresses.
        title, unit: what it is of, and what is counted from left to right.
        note: what stands behind a row, of its addresses and how many steps went there.
    """
    addresses = sorted(places)
    per = max(1, -(-len(addresses) // ROWS))
    rows = [addresses[n : n + per] for n in range(0, len(addresses), per)]
    row_of = {address: n // per for n, address in enumerate(addresses)}
    names = [symbols.name(row[0]) if symbols is not None else "" for row in rows]
    counts = [0] * len(rows)
    for step in steps:
        counts[row_of[step]] += 1

    wide = (max(map(len, column), default=0) for column in ((hex(a) for a in addresses), names))
    widths = [
        min(most, each) for most, each in zip((18, 20 if per == 1 else 34), wide, strict=True)
    ]
    widths.append(LETTERS - sum(widths))

    parts = [text(8, 18, title, 120, 'font-weight="bold"')]
    lanes: dict[bool, list[str]] = {True: [], False: []}
    for n, row in enumerate(rows):
        y = TOP + n * PITCH
        lanes[counts[n] > 0].append(box(LEFT, y, AREA, PITCH - 2))
        faint = "" if counts[n] else f'fill="{FAINT}"'
        what = places[row[0]] if per == 1 else ""
        x = 8
        for label, letters in zip((f"{row[0]:#x}", names[n], what), widths, strict=True):
            parts += [mono(x, y + 10, label, letters, faint)] if label else []
            x += 6 * (letters + 2)
        parts.append(text(LEFT + AREA + 8, y + 10, note(row, counts[n]), 16, faint))
    marks, line = _marks([row_of[step] for step in steps])
    colours = _colours(names)
    drawn: dict[str, list[str]] = {}
    for n, rectangle in marks:
        drawn.setdefault(colours[n], []).append(rectangle)
    y = TOP + len(rows) * PITCH + 12
    axis = f'fill="{FAINT}"'
    parts += [
        text(LEFT, y, f"{min(1, len(steps))}", 20, axis),
        text(LEFT + AREA / 2, y, unit, 60, f'{axis} text-anchor="middle"'),
        text(LEFT + AREA, y, f"{len(steps)}", 20, f'{axis} text-anchor="end"'),
    ]
    back = [*path(lanes[True], "#ececec"), *path(lanes[False], "#f6ded2"), *line]
    for colour, rectangles in drawn.items():
        back += path(rectangles, colour)
    return drawing(WIDTH, y + 10, [*back, *parts])


def _marks(steps: list[int]) -> tuple[list[tuple[int, str]], list[str]]:
    """Of each row the rectangles of its steps, and a line from step to step while they are few.

    Where a column is several steps, a rectangle is as high as the row's share of them, but never
    less than a quarter.
    """
    columns = min(COLUMNS, len(steps))
    width = AREA / max(1, columns)
    marks = []
    ends: dict[int, tuple[int, float, int]] = {}  # of each row: first column, height, last column
    tall = PITCH - 2

    def close(row: int) -> None:
        first, high, last = ends.pop(row)
        x, y = round(LEFT + first * width, 2), round(TOP + row * PITCH + tall - high, 2)
        marks.append((row, box(x, y, round((last - first + 1) * width - 0.5, 2), high)))

    for column in range(columns):
        here: dict[int, int] = {}
        part = steps[column * len(steps) // columns : (column + 1) * len(steps) // columns]
        for row in part:
            here[row] = here.get(row, 0) + 1
        for row, count in sorted(here.items()):
            high = round(max(0.25, count / len(part)) * tall, 1)
            if row in ends and ends[row][1:] == (high, column - 1):
                ends[row] = (ends[row][0], high, column)
                continue
            if row in ends:
                close(row)
            ends[row] = (column, high, column)
    for row in sorted(ends):
        close(row)
    if not 1 < len(steps) == columns:
        return marks, []
    points = "L".join(
        f"{round(LEFT + (n + 0.5) * width, 1):g} {TOP + row * PITCH + tall / 2:g}"
        for n, row in enumerate(steps)
    )
    return marks, [f'<path d="M{points}" stroke="#9a9a9a" stroke-width="0.8" fill="none"/>']


def _colours(names: Iterable[str]) -> list[str]:
    """A colour for each row: another one where another symbol begins."""
    found: list[str] = []
    before, number = None, -1
    for name in names:
        symbol = name.partition("+")[0]
        number += symbol != before
        before = symbol
        found.append(COLOURS[number % len(COLOURS)])
    return found
