"""The command line, run in this process."""

from __future__ import annotations

from click.testing import CliRunner, Result

from pykvm.cli.main import cli
from tests.support import plain


def invoke(*args: str) -> Result:
    """What a command prints, and its exit code."""
    return CliRunner(env=plain.unset()).invoke(cli, args, prog_name="pykvm")
