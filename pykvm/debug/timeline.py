"""A trace as a picture: time from left to right, a lane for each vCPU, exits by colour."""

from __future__ import annotations

from pykvm.debug.svg import clean

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.debug.events import Event

WIDTH, LANE, LEFT, TOP = 960, 34, 64, 26
COLUMNS = WIDTH - LEFT - 8
"""Pixels of time. What is closer together shares one: a trace of a million exits is no larger."""

# Colours that differ for the colour-blind too (Okabe and Ito, 2008).
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442", "#555555")


def timeline(events: list[Event], title: str = "") -> str:
    """The picture as SVG.

    Of each pixel's width the colour tells the reason that most time was spent on, its height the
    part of the time that was spent outside the guest; an exit is never less than a quarter high.
    """
    reasons = _by_frequency(events)
    colours = {reason: _COLOURS[min(n, len(_COLOURS) - 1)] for n, reason in enumerate(reasons)}
    cpus = sorted({event.cpu for event in events})
    height = TOP + LANE * max(1, len(cpus)) + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="11">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="14">{clean(title or f"{len(events)} exits", 120)}</text>',
    ]
    first = min((event.time - event.inside for event in events), default=0.0)
    last = max((event.time + (event.spent or 0.0) for event in events), default=0.0)
    span = (last - first) or 1e-9
    for lane, cpu in enumerate(cpus):
        y = TOP + lane * LANE
        parts.append(f'<text x="4" y="{y + LANE / 2 + 3:.0f}">vcpu {cpu}</text>')
        parts.append(
            f'<rect x="{LEFT}" y="{y}" width="{COLUMNS}" height="{LANE - 6}" fill="#eeeeee"/>'
        )
        mine = [event for event in events if event.cpu == cpu]
        for column, (reason, share) in sorted(_columns(mine, first, span).items()):
            tall = max(0.25, min(1.0, share)) * (LANE - 6)
            parts.append(
                f'<rect x="{LEFT + column}" y="{y + LANE - 6 - tall:.1f}" width="1" '
                f'height="{tall:.1f}" fill="{colours[reason]}"/>'
            )
    base = TOP + LANE * max(1, len(cpus))
    for n in range(5):
        x = LEFT + COLUMNS * n / 4
        anchor = ("start", "middle", "middle", "middle", "end")[n]
        parts.append(
            f'<text x="{x:.0f}" y="{base + 10}" text-anchor="{anchor}" fill="#555555">'
            f"{_ms((first if n == 0 else first + span * n / 4) - first)}</text>"
        )
    x = float(LEFT)
    for reason in reasons[: len(_COLOURS)]:
        parts.append(
            f'<rect x="{x:.0f}" y="{base + 18}" width="9" height="9" fill="{colours[reason]}"/>'
        )
        parts.append(f'<text x="{x + 13:.0f}" y="{base + 27}">{clean(reason, 30)}</text>')
        x += 24 + 7 * min(30, len(reason))
    return "\n".join([*parts, "</svg>"])


def _columns(events: list[Event], first: float, span: float) -> dict[int, tuple[str, float]]:
    """Of each column with an exit, the reason of most time spent, and the share of that time."""
    width = span / COLUMNS
    spent: dict[int, dict[str, float]] = {}
    for event in events:
        begin = (event.time - first) / width
        end = begin + (event.spent or 0.0) / width
        column = min(COLUMNS - 1, max(0, int(begin)))
        last = min(COLUMNS - 1, int(end))
        for at in range(column, last + 1):
            part = min(end, at + 1) - max(begin, at)
            of = spent.setdefault(at, {})
            of[event.reason] = of.get(event.reason, 0.0) + max(0.0, part)
    return {
        at: (max(of, key=lambda reason: of[reason]), sum(of.values())) for at, of in spent.items()
    }


def _by_frequency(events: list[Event]) -> list[str]:
    counts: dict[str, int] = {}
    for event in events:
        counts[event.reason] = counts.get(event.reason, 0) + 1
    return sorted(counts, key=lambda reason: (-counts[reason], reason))


def _ms(value: float) -> str:
    return f"{value * 1e3:.4g} ms"
