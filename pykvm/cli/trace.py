"""``pykvm trace``: what is in a trace that ``--trace FILE`` wrote."""

from __future__ import annotations

import click

from .common import Count, Failure, debug_option, json_option, write_json


@click.group(short_help="Look at traces, which --trace FILE writes.")
@debug_option
def trace() -> None:
    """Look at traces, which "pykvm run --trace FILE" and "pykvm boot --trace FILE" write."""


@trace.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False))
@click.option(
    "--rows", type=Count(1), default=20, show_default=True, metavar="N", help="Rows to show."
)
@click.option(
    "--svg", type=click.Path(dir_okay=False), metavar="FILE", help="Draw a timeline into FILE."
)
@json_option
@debug_option
def summary(file: str, rows: int, svg: str | None, as_json: bool) -> None:
    """Tell what a guest exited for, how often, and what took longest to serve.

    FILE is a trace in either of its formats. Exits are counted by reason, address and direction.
    """
    from pykvm.debug import export

    try:
        found = export.load(file).summary()
    except ValueError as error:
        raise Failure(str(error)) from error
    if svg is not None:
        with open(svg, "w", encoding="utf-8") as picture:
            picture.write(found._repr_svg_())
    if as_json:
        write_json(found.as_json())
    else:
        click.echo(found.text(rows))
