"""What the commands share: how errors are told, and how numbers are read."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from pykvm.errors import PykvmError
from pykvm.memory.units import parse_size

from . import exitcodes
from .failures import message, settle_output, tell

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    IntParam = click.ParamType[int]
    FloatParam = click.ParamType[float]
else:
    IntParam = FloatParam = click.ParamType

_DEBUG = "pykvm.debug"


class Failure(click.ClickException):
    """Something pykvm could not do: one message on standard error, exit code 1."""

    exit_code = exitcodes.ERROR

    def show(self, file: Any = None) -> None:
        """Print the message."""
        tell(f"pykvm: {self.message}")


class Cli(click.Group):
    """The group of commands; turns what they raise into messages and exit codes.

    With ``--debug`` exceptions come as they are. What is not an error of pykvm's or the system's is
    a bug, and comes as it is anyway.
    """

    def make_context(self, *args: Any, **options: Any) -> click.Context:
        """Read the command line, which also prints ``--help`` and ``--version``."""
        with _told({}):
            return super().make_context(*args, **options)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        with _told(ctx.meta):
            return super().invoke(ctx)


@contextmanager
def _told(meta: dict[str, Any]) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise click.exceptions.Exit(exitcodes.INTERRUPTED) from None
    except BrokenPipeError:
        settle_output()
        raise click.exceptions.Exit(exitcodes.BROKEN_PIPE) from None
    except (PykvmError, LookupError, OSError) as error:
        settle_output()
        if meta.get(_DEBUG) or isinstance(error, (KeyError, IndexError)):
            raise
        raise Failure(message(error)) from error


def _set_debug(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta[_DEBUG] = True


debug_option = click.option(
    "--debug",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_set_debug,
    help="Show the traceback of an error.",
)

device_option = click.option(
    "--device",
    metavar="PATH",
    default="/dev/kvm",
    show_default=True,
    help="The KVM device.",
)

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on standard output.")


class Size(IntParam):
    """Bytes or an address: ``4096``, ``0x1000``, ``2M``. The value is an int."""

    name = "size"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        """Parse it."""
        try:
            return parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Count(IntParam):
    """A whole number from a least one on, decimal or with ``0x``. The value is an int."""

    name = "count"

    def __init__(self, least: int) -> None:
        self.least = least

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        """Parse it."""
        try:
            number = int(str(value), 0)
        except ValueError:
            number = -1
        if number < self.least:
            self.fail(f"{value!r} is not a whole number of at least {self.least}", param, ctx)
        return number


class Seconds(FloatParam):
    """Seconds as a decimal number, or ``none``. The value is a float; infinity is no limit."""

    name = "seconds"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        """Parse it."""
        try:
            number = float("inf") if value == "none" else float(value)
        except ValueError:
            number = -1.0
        if not number >= 0:
            self.fail(f"{value!r} is neither seconds (0.5) nor none", param, ctx)
        return number


def write_json(data: Any) -> None:
    """Print data as JSON on standard output, for programs and readable for people."""
    import json

    click.echo(json.dumps(data, indent=2))
