"""``pykvm doctor``: can KVM be used here, if not what to do, and if so how well."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from pykvm import __version__

from . import exitcodes
from .common import debug_option, device_option, json_option, write_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType
    from rich.table import Table

    from pykvm.doctor import Capability, Report


@click.command(short_help="Say whether KVM can be used here, and if not what to do.")
@device_option
@json_option
@debug_option
def doctor(device: str, as_json: bool) -> None:
    """Say whether KVM can be used here and what it can do; if not, why and what to do.

    Runs a few tiny guests and measures for less than a second. Exit code 0 if KVM can be used, 1 if
    not. The schema of --json stands in the documentation of pykvm.doctor.
    """
    from pykvm.doctor import examine

    report = examine(device)
    if as_json:
        write_json({"pykvm": __version__, **report.to_dict()})
    else:
        _show(report)
    raise click.exceptions.Exit(exitcodes.OK if report.usable else exitcodes.ERROR)


def _show(report: Report) -> None:
    """Print the report. What is long comes first, so that a terminal ends on what matters."""
    from rich.console import Console

    console = Console(highlight=False, emoji=False, markup=False)
    with console.capture() as capture:
        for part in _parts(report):
            console.print(part)
    # Rich fills cells with blanks up to the edge, and would take a closed pipe for its own matter.
    click.echo("\n".join(line.rstrip() for line in capture.get().splitlines()))


def _parts(report: Report) -> Iterator[RenderableType]:
    from rich.text import Text

    if report.capabilities:
        yield _capabilities("What this KVM can do", [c for c in report.capabilities if c.value])
        yield Text()
        yield _capabilities("What it cannot", [c for c in report.capabilities if not c.value])
        yield Text()
    yield _verdict(report)
    yield Text()
    yield _facts(report)
    if report.costs:
        yield Text()
        yield _costs(report)
    for title, lines in (
        ("What to do" if report.problem else "Good to know", report.advice),
        ("Not found out", [f"{name}: {error}" for name, error in report.failed.items()]),
    ):
        if lines:
            yield Text(f"\n{title}", style="bold")
            yield _list(lines)


def _verdict(report: Report) -> RenderableType:
    from rich.text import Text

    if report.problem is None:
        return Text("KVM can be used here.", style="bold green")
    text = Text("KVM cannot be used here: ", style="bold red")
    text.append(report.problem.what, style="not bold")
    return text


def _list(lines: list[str]) -> Table:
    from rich.table import Table

    table = Table.grid(padding=(0, 1))
    for line in lines:
        table.add_row(" •", line)
    return table


def _facts(report: Report) -> Table:
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, value in _rows(report):
        table.add_row(f" {name}", value)
    return table


def _rows(report: Report) -> Iterator[tuple[str, str]]:
    host = report.host
    if report.problem is not None:
        for seen in report.problem.evidence:
            yield "seen", seen
    if report.backend is not None:
        modules = ", ".join(report.backend.modules) or "none seen"
        yield "back end", f"{report.backend.name} (kernel module: {modules}); {report.backend.says}"
    if report.ring0 is not None:
        ring0 = report.ring0
        yield (
            "ring 0",
            f"{ring0.verdict}: {_time(ring0.ring0_ns)} an instruction, {_time(ring0.ring3_ns)} in"
            " ring 3 (measured)",
        )
    boots, why = report.linux
    if report.usable:
        verdict = {True: "should boot", False: "does not boot", None: "not known"}[boots]
        yield "stock Linux", f"{verdict}: {why}"
    if report.backend is not None and report.backend.nested is not None:
        yield "nesting", f"guests can{'' if report.backend.nested else 'not'} run KVM themselves"
    if report.limits is not None:
        limits = report.limits
        yield (
            "a machine has",
            f"at most {limits['vcpus']} processors ({limits['recommended_vcpus']} recommended) and"
            f" {limits['memory_slots']} memory slots",
        )
    yield "kernel", f"Linux {host['kernel'] or '?'}, {host['architecture'] or '?'}"
    inside = " in a virtual machine" if host["virtual_machine"] else ""
    yield "processor", f"{host['processors'] or '?'} × {host['processor'] or '?'}{inside}"
    if host["container"]:
        yield "container", str(host["container"])
    yield "memory", _memory(report)
    yield "assembler", {None: "?", "": "none"}.get(host["assembler"], host["assembler"])
    yield "python", str(host["python"] or "?")


def _memory(report: Report) -> str:
    from pykvm.memory.units import format_size

    host = report.host
    parts = []
    if host["available_memory"]:
        parts.append(f"{host['available_memory'] / (1 << 30):.1f} GiB available")
    if host["page_size"]:
        parts.append(f"pages of {format_size(host['page_size'])}")
    huge = host["huge_pages"]
    if huge:
        parts.append(f"transparent huge pages: {huge['transparent'] or 'none'}")
        for size, pool in huge["pools"].items():
            parts.append(f"huge pages of {size}: {pool['free']} of {pool['total']} free")
    return "; ".join(parts) or "?"


def _costs(report: Report) -> Table:
    from rich.table import Table

    table = Table(
        title="What it costs on this machine", title_justify="left", title_style="bold", box=None
    )
    table.add_column("")
    for heading in ("median", "fastest", "slowest", "a second"):
        table.add_column(heading, justify="right", header_style="dim")
    for cost in report.costs.values():
        table.add_row(
            cost.what, _time(cost.ns), _time(cost.low), _time(cost.high), f"{cost.per_second:,.0f}"
        )
    return table


def _time(ns: float) -> str:
    for unit, size in (("s", 1e9), ("ms", 1e6), ("µs", 1e3)):
        if ns >= size:
            return f"{ns / size:.3g} {unit}"
    return f"{ns:.3g} ns"


def _capabilities(title: str, capabilities: list[Capability]) -> Table:
    from rich.table import Table

    table = Table(
        title=f"{title} ({len(capabilities)})",
        title_justify="left",
        title_style="bold",
        box=None,
        show_header=False,
    )
    table.add_column()
    table.add_column(style="dim", no_wrap=True)
    for capability in capabilities:
        value = f" = {capability.value}" if capability.value > 1 else ""
        table.add_row(capability.means, capability.name.removeprefix("KVM_CAP_") + value)
    return table
