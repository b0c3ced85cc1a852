"""What ``pykvm run`` and ``pykvm boot`` share of their command lines."""

from __future__ import annotations

import sys
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import click

from . import exitcodes
from .common import debug_option, device_option, json_option

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from pykvm.devices.disk.spec import DiskSpec

    DiskParam = click.ParamType[DiskSpec]
else:
    DiskParam = click.ParamType

_UNSAID = ""
"""The value of --ioctls and --gdb without one."""


class RunCommand(click.Command):
    """A command whose ``--ioctls`` and ``--gdb`` take values only with ``=``, as GNU tools do.

    Click itself would take the next word for the value: ``run --ioctls hello`` would lose the name
    of the guest.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Make the missing value explicit, up to a ``--``."""
        end = args.index("--") if "--" in args else len(args)
        args = [
            f"{arg}={_UNSAID}" if arg in ("--ioctls", "--gdb") and at < end else arg
            for at, arg in enumerate(args)
        ]
        return super().parse_args(ctx, args)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Print the table of exit codes."""
        with formatter.section("Exit codes"):
            formatter.write_dl(exitcodes.TABLE, col_max=12)


class Disk(DiskParam):
    """A disk: ``PATH[,ro][,overlay][,cache=…][,format=…][,serial=…]``. The value is a DiskSpec."""

    name = "disk"

    def convert(self, value: Any, param: Any, ctx: Any) -> DiskSpec:
        """Parse it; the image is opened later."""
        from pykvm.devices.disk.spec import DiskSpec

        if isinstance(value, DiskSpec):
            return value
        try:
            return DiskSpec.parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


disk_option = click.option(
    "--disk",
    "disks",
    type=Disk(),
    multiple=True,
    metavar="PATH[,ro][,overlay][,…]",
    help="A disk: a file or block device, which the guest may write; with ro it may not, with "
    "overlay it may and what it writes is thrown away. More: cache=writethrough|none, "
    "format=qcow2|…, serial=TEXT. For several disks, several times.",
)

test_devices_option = click.option(
    "--test-devices",
    is_flag=True,
    help="QEMU's isa-debug-exit, pc-testdev and fw_cfg; a debug-exit with N exits with 2N+1.",
)

trace_option = click.option(
    "--trace",
    metavar="FILE",
    help="Write every exit into FILE: JSON lines, or, if its name ends in .json, Chrome's trace "
    'format. "pykvm trace summary FILE" tells what is in it.',
)

trace_filter_option = click.option(
    "--trace-filter",
    "trace_filters",
    multiple=True,
    metavar="EXIT[:FIRST[-LAST]][:r|:w]",
    help="Trace only such exits: io:0x3f8-0x3ff, mmio, hlt. For several kinds, several times.",
)

gdb_option = click.option(
    "--gdb",
    metavar="[=ADDRESS]",
    help="Wait for gdb at PORT, HOST:PORT or the PATH of a Unix socket, and let it run the guest. "
    "[default: 127.0.0.1:1234]",
)

gdb_anywhere_option = click.option(
    "--gdb-anywhere",
    is_flag=True,
    help="Let --gdb listen where other machines can connect. Who connects owns the guest.",
)


def watching(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options at the end of both: who watches the guest, and how it is all told."""
    for option in (
        debug_option,
        json_option,
        device_option,
        trace_filter_option,
        trace_option,
        gdb_anywhere_option,
        gdb_option,
    ):
        command = option(command)
    return command


@contextmanager
def ioctls_told(file: str | None) -> Iterator[None]:
    """Trace every ioctl into a file, or on standard error; None: do not."""
    if file is None:
        yield
        return
    from pykvm import kvm

    with nullcontext(sys.stderr) if file == _UNSAID else open(file, "w") as sink, kvm.trace(sink):
        yield
