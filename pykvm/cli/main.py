"""The entry point: ``pykvm`` and ``python -m pykvm``."""

from __future__ import annotations

import click

import pykvm

from .boot import boot
from .common import Cli, debug_option
from .doctor import doctor
from .guests import guests
from .run import run
from .trace import trace


@click.group(cls=Cli, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(pykvm.__version__, prog_name="pykvm", message="%(prog)s %(version)s")
@debug_option
def cli() -> None:
    """KVM, scripted: run tiny guests, and see what this machine's KVM can do.

    Start with "pykvm doctor" and "pykvm run hello".
    """


cli.add_command(run)
cli.add_command(boot)
cli.add_command(guests)
cli.add_command(doctor)
cli.add_command(trace)


def main() -> None:
    """Run the command line; ends the process with the exit code."""
    cli.main(prog_name="pykvm")
