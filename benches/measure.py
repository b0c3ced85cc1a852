"""How the benches measure: interleaved samples, medians, quartiles, and goals that hold or not.

A sampler is a function that does one batch of work and returns the cost of one operation. The
samplers of a question take turns, in changing order, so that what the host does meanwhile (clock
frequency, other tenants) meets all of them alike; each is called once beforehand to warm up.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Sampler = Callable[[], float]

MIN_PAIRS = 15
"""Pairs below which a median of a noisy machine says little; fewer are for trying things out."""

OF_RATIO, OF_OURS, OF_DIFFERENCE = "ratio", "ours", "difference"


class BenchError(Exception):
    """A bench could not run, or the work it timed was not the work it meant to time."""


class NotHere(BenchError):
    """This machine lacks what a bench needs; the message says what."""


@dataclass(frozen=True)
class Goal:
    """The most that a figure may be.

    Attributes:
        limit: inclusive.
        of: which figure: the ``ratio`` of ours to the reference, ``ours`` in its unit, or the
            ``difference`` of the two.
    """

    limit: float
    of: str = OF_RATIO

    def __str__(self) -> str:
        prefix = {OF_RATIO: "", OF_OURS: "ours ", OF_DIFFERENCE: "ref + "}[self.of]
        return f"{prefix}≤ {self.limit:g}{'×' if self.of == OF_RATIO else ''}"


@dataclass(frozen=True)
class Result:
    """The answer to one question.

    Attributes:
        name: ``question/variant``.
        unit: of ours and reference.
        ours, reference: medians over all pairs.
        ratio: see ``ratio_of``.
        ratio_of: ``"pairs"``: the median of the ratios of each pair. ``"medians"``: the ratio of
            the medians, for figures that are small differences of large ones.
        difference: median of (ours - reference) of each pair.
        spread: first and third quartile of ours, reference and the pairwise ratio.
        goal: None for a figure that only informs.
        note: what a reader needs to know to read the figures.
    """

    name: str
    unit: str
    ours: float
    reference: float
    ratio: float
    difference: float
    pairs: int
    spread: dict[str, tuple[float, float]]
    ratio_of: str = "pairs"
    goal: Goal | None = None
    note: str = ""

    @property
    def holds(self) -> bool | None:
        """Whether the goal holds; None without one."""
        if self.goal is None:
            return None
        value: float = getattr(self, self.goal.of)
        return value <= self.goal.limit

    def as_json(self, backend: str) -> dict[str, Any]:
        """The result as plain data."""
        return {
            "name": self.name,
            "backend": backend,
            "unit": self.unit,
            "ours": _short(self.ours),
            "reference": _short(self.reference),
            "ratio": _short(self.ratio),
            "ratio_of": self.ratio_of,
            "difference": _short(self.difference),
            "goal": self.goal.limit if self.goal else None,
            "goal_of": self.goal.of if self.goal else None,
            "holds": self.holds,
            "pairs": self.pairs,
            "spread": {name: [_short(q) for q in both] for name, both in self.spread.items()},
            "note": self.note,
        }


def take_turns(samplers: Sequence[Sampler], rounds: int) -> list[list[float]]:
    """Call the samplers in turn, ``rounds`` times, and return the samples of each.

    The order is rotated from round to round (for two: alternated). One round more comes first and
    is thrown away.
    """
    if rounds < 1:
        raise ValueError(f"at least one round is needed, not {rounds}")
    samples: list[list[float]] = [[] for _ in samplers]
    for sampler in samplers:
        sampler()
    for number in range(rounds):
        for turn in range(len(samplers)):
            which = (turn + number) % len(samplers)
            samples[which].append(samplers[which]())
    return samples


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """First and third quartile; of one value, that value."""
    if len(values) < 2:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def compare(
    name: str,
    unit: str,
    ours: Sequence[float],
    reference: Sequence[float],
    *,
    goal: Goal | None = None,
    ratio_of: str = "pairs",
    note: str = "",
) -> Result:
    """Make a result of paired samples."""
    if not ours or len(ours) != len(reference):
        raise ValueError(f"samples come in pairs, not {len(ours)} and {len(reference)}")
    pairs = list(zip(ours, reference, strict=True))
    ratios = [a / b if b else float("inf") for a, b in pairs]
    medians = statistics.median(ours), statistics.median(reference)
    if ratio_of == "pairs":
        ratio = statistics.median(ratios)
    elif ratio_of == "medians":
        drowned = min(medians) <= 0  # a difference that is negative was smaller than the noise
        ratio = float("inf") if drowned else medians[0] / medians[1]
    else:
        raise ValueError(f'ratio_of is "pairs" or "medians", not {ratio_of!r}')
    return Result(
        name=name,
        unit=unit,
        ours=medians[0],
        reference=medians[1],
        ratio=ratio,
        ratio_of=ratio_of,
        difference=statistics.median(a - b for a, b in pairs),
        pairs=len(pairs),
        spread={
            "ours": quartiles(ours),
            "reference": quartiles(reference),
            "ratio": quartiles(ratios),
        },
        goal=goal,
        note=note,
    )


def table(results: Sequence[Result]) -> str:
    """The results as text in columns."""
    rows = [("question", "ours", "reference", "unit", "ratio", "its quartiles", "goal", "holds")]
    for r in results:
        low, high = r.spread["ratio"]
        rows.append(
            (
                r.name,
                f"{r.ours:.4g}",
                f"{r.reference:.4g}",
                r.unit,
                f"{r.ratio:.3f}",
                f"{low:.3f}..{high:.3f}",
                str(r.goal) if r.goal else "-",
                {True: "yes", False: "NO", None: "-"}[r.holds],
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    numbers = {1, 2, 4}
    lines = [
        "  ".join(
            cell.rjust(width) if column in numbers else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def to_json(results: Sequence[Result], backend: str) -> str:
    """The results as a JSON array, one object a result."""
    data = [result.as_json(backend) for result in results]
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


def _short(value: float) -> float:
    return float(f"{value:.6g}")
