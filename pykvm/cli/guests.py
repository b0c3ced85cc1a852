"""``pykvm guests``: which guests come with pykvm."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from .common import debug_option, json_option, write_json

if TYPE_CHECKING:
    from typing import Any

    from pykvm.guestlib import Guest


@click.command()
@json_option
@debug_option
def guests(as_json: bool) -> None:
    """List the guests that come with pykvm, and what each shows.

    Their commented sources are in the folder that --json tells.
    """
    from pykvm import guestlib

    found = [guestlib.find(name) for name in guestlib.names()]
    if as_json:
        write_json([_describe(guest) for guest in found])
        return
    width = max((len(guest.name) for guest in found), default=0)
    for guest in found:
        click.echo(f"{guest.name:{width}}  {guest.summary}")


def _describe(guest: Guest) -> dict[str, Any]:
    return {
        "name": guest.name,
        "summary": guest.summary,
        "mode": guest.mode,
        "ring": guest.ring,
        "memory": guest.memory,
        "cpus": guest.cpus,
        "irqchip": guest.irqchip,
        "pit": guest.pit,
        "pic": guest.pic,
        "timeout": guest.timeout,
        "expected_reason": guest.expected_reason,
        "expected_code": guest.expected_code,
        "folder": str(guest.path),
        "source": str(guest.source) if guest.source else None,
        "image": str(guest.image),
    }
