"""What the pictures share: text that any XML reader takes, and rectangles by the path.

Nothing in a picture is as large as what it is of: thousands of cells of a colour are one path.
"""

from __future__ import annotations

from html import escape

BACKGROUND, INK, FAINT = "#ffffff", "#000000", "#666666"
# Colours that differ for the colour-blind too (Okabe and Ito, 2008).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def clean(value: str, most: int) -> str:
    """Text of at most so many characters, escaped.

    Names come from files and from guests: what XML has no way to write (control characters), and
    what turns the text around it, is a dot.
    """
    if len(value) > most:
        value = value[: most - 1] + "…"
    return escape("".join(c if c.isprintable() else "·" for c in value))


def text(x: float, y: float, value: str, most: int = 100, more: str = "") -> str:
    """A line of text; ``more``: attributes."""
    return f'<text x="{x:g}" y="{y:g}"{" " * bool(more)}{more}>{clean(value, most)}</text>'


def mono(x: float, y: float, value: str, most: int = 100, more: str = "") -> str:
    """A line of text in letters of one width: 6 units each."""
    return text(x, y, value, most, f'font-family="monospace" font-size="10" {more}'.rstrip())


def box(x: float, y: float, width: float, height: float) -> str:
    """A rectangle as a part of a path."""
    return f"M{x:g} {y:g}h{width:g}v{height:g}h-{width:g}z"


def path(parts: list[str], colour: str) -> list[str]:
    """All rectangles of a colour as one element; none if there are none."""
    return [f'<path d="{"".join(parts)}" fill="{colour}"/>'] if parts else []


def drawing(width: int, height: int, parts: list[str]) -> str:
    """The picture: on a ground of its own, for pages may be dark."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11" '
            f'fill="{INK}">',
            f'<rect width="{width}" height="{height}" fill="{BACKGROUND}"/>',
            *parts,
            "</svg>\n",
        ]
    )
