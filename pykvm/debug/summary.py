"""A trace on one page: what the guest exited for, how often, and what that cost."""

from __future__ import annotations

from html import escape

from pykvm.debug.timeline import timeline

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pykvm.debug.events import Event, Recording


class Row:
    """A line of the histogram.

    Attributes:
        where: reason, address and direction.
        count: exits.
        spent: seconds in which they were served, all together.
        slowest: the longest of them, in seconds.
    """

    __slots__ = ("count", "slowest", "spent", "where")

    def __init__(self, where: str) -> None:
        self.where = where
        self.count = 0
        self.spent = 0.0
        self.slowest = 0.0

    def add(self, event: Event) -> None:
        """Count an event."""
        self.count += 1
        spent = event.spent or 0.0
        self.spent += spent
        self.slowest = max(self.slowest, spent)


class Summary:
    """Histograms and the slowest exits of a recording; prints as text, shows itself in notebooks.

    Attributes:
        rows: one for each reason and address, the most frequent first.
        reasons: one for each reason alone.
        slowest: the events that took longest to serve.
        seconds: from the first exit to the end of the last.
        inside: of these, seconds that vCPUs were in KVM_RUN, and ``spent`` outside: sums over all
            vCPUs.
    """

    def __init__(self, recording: Recording, slowest: int = 10) -> None:
        self.recording = recording
        self.events = events = recording.events
        self.rows = _count(events, lambda event: event.where)
        self.reasons = _count(events, lambda event: event.reason)
        self.slowest = sorted(events, key=lambda event: -(event.spent or 0.0))[:slowest]
        self.inside = sum(event.inside for event in events)
        self.spent = sum(event.spent or 0.0 for event in events)
        self.seconds = 0.0
        if events:
            ends = (event.time + (event.spent or 0.0) for event in events)
            self.seconds = max(ends) - min(event.time - event.inside for event in events)

    def as_json(self) -> dict[str, Any]:
        """All of it as plain data."""

        def rows(of: list[Row]) -> list[dict[str, Any]]:
            return [
                {"where": r.where, "count": r.count, "spent": r.spent, "slowest": r.slowest}
                for r in of
            ]

        return {
            "events": len(self.events), "lost": self.recording.lost, "seconds": self.seconds,
            "inside": self.inside, "spent": self.spent, "reasons": rows(self.reasons),
            "rows": rows(self.rows),
            "slowest": [
                {"where": e.where, "time": e.time, "cpu": e.cpu, "spent": e.spent}
                for e in self.slowest
            ],
            "stats": self.recording.stats,
        }  # fmt: skip

    def text(self, rows: int = 20) -> str:
        """The page, with so many rows of the histogram."""
        lines = [self._headline(), ""]
        lines += _table(
            ("exit", "count", "share", "served in", "mean", "slowest"),
            [_cells(row, len(self.events)) for row in self.rows[:rows]],
        )
        if len(self.rows) > rows:
            lines.append(f"and {len(self.rows) - rows} more")
        if self.events:
            lines += ["", "slowest:"]
            lines += [f"  {seconds(event.spent or 0.0):>9}  {event!r}" for event in self.slowest]
        for what, values in self.recording.stats.items():
            if values:
                lines += ["", f"KVM's statistics, {what}:"]
                lines += [f"  {name:<36} {value}" for name, value in sorted(values.items())]
        return "\n".join(lines)

    def _headline(self) -> str:
        text = f"{len(self.events)} exits in {seconds(self.seconds)}"
        if self.recording.lost:
            text += f", {self.recording.lost} before them lost"
        return f"{text}; in KVM_RUN {seconds(self.inside)}, serving {seconds(self.spent)}"

    __str__ = text
    __repr__ = text

    def _repr_svg_(self) -> str:
        return timeline(self.events)

    def _repr_html_(self) -> str:
        head = "".join(
            f"<th>{name}</th>"
            for name in ("exit", "count", "share", "served in", "mean", "slowest")
        )
        body = "".join(
            "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in _cells(row, len(self.events)))
            + "</tr>"
            for row in self.rows[:20]
        )  # fmt: skip
        return (
            f"<div><p>{escape(self._headline())}</p><table><tr>{head}</tr>{body}</table>"
            f"{self._repr_svg_()}</div>"
        )


def seconds(value: float) -> str:
    """A duration with three digits: ``12.3 us``."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value * 1e9:.0f} ns"


def _count(events: list[Event], key: Any) -> list[Row]:
    found: dict[str, Row] = {}
    for event in events:
        where = key(event)
        row = found.get(where)
        if row is None:
            row = found[where] = Row(where)
        row.add(event)
    return sorted(found.values(), key=lambda row: (-row.count, row.where))


def _cells(row: Row, total: int) -> tuple[str, ...]:
    return (
        row.where, str(row.count), f"{100 * row.count / total:.1f} %", seconds(row.spent),
        seconds(row.spent / row.count), seconds(row.slowest),
    )  # fmt: skip


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[n]) for row in (head, *rows)) for n in range(len(head))]
    return [
        "  ".join(
            cell.ljust(width) if n == 0 else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (head, *rows)
    ]
