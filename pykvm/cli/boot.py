"""``pykvm boot``: boot a kernel, its serial console on this terminal, its end in the exit code.

Its options are read a second time in ``quick.py``: a test holds the two together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from . import booting
from .common import Count, Seconds, Size
from .machine_options import RunCommand, disk_option, ioctls_told, test_devices_option, watching

if TYPE_CHECKING:
    from typing import Any


@click.command(cls=RunCommand)
@click.argument("kernel", type=click.Path(exists=True, dir_okay=False))
@click.option(
    "--initrd", type=click.Path(exists=True, dir_okay=False), help="The initial RAM disk."
)
@click.option(
    "--append",
    metavar="TEXT",
    default=booting.DEFAULT_CMDLINE,
    show_default=True,
    help="The kernel's command line.",
)
@disk_option
@click.option("--memory", type=Size(), default="512M", show_default=True, help="RAM.")
@click.option("--cpus", type=Count(1), default=1, show_default=True, help="Virtual processors.")
@click.option(
    "--cpu-features", default="", metavar="-A,-B", help="CPUID features to hide, -xsave,-avx."
)
@click.option(
    "--protocol",
    type=click.Choice(["auto", "bzimage", "vmlinux", "pvh", "multiboot"]),
    default="auto",
    show_default=True,
    help="How to start the kernel.",
)
@click.option(
    "--irqchip",
    type=click.Choice(["kernel", "split"]),
    default="kernel",
    show_default=True,
    help="Interrupt controllers; split: the IOAPIC in this process, no PIC, no PIT.",
)
@test_devices_option
@click.option("--kaslr", is_flag=True, help="Let the image unpack and place itself (slower).")
@click.option("--no-cache", is_flag=True, help="Do not keep the unpacked kernel.")
@click.option("--system-map", type=click.Path(exists=True), help="Names for where it hangs.")
@click.option("--timeout", type=Seconds(), metavar="S", help="Seconds to run. [default: any]")
@click.option("--force", is_flag=True, help="Go on where this KVM cannot run a stock kernel.")
@click.option("--ioctls", metavar="[=FILE]", help="Print every ioctl, as strace would.")
@click.option("-v", "--verbose", is_flag=True, help="Tell the phases and what they took.")
@watching
def boot(ioctls: str | None, **options: Any) -> None:
    """Boot a kernel: bzImage, ELF vmlinux, PVH or multiboot image.

    The serial console is on standard output and input, raw if that is a terminal; there Ctrl-A x
    quits, Ctrl-A b sends a BREAK. The end of the run is told on standard error and by the exit
    code. A stock kernel on a KVM that cannot run one is given up after a second.
    """
    with ioctls_told(ioctls):
        try:
            code = booting.boot(**options)
        except booting.UsageProblem as error:
            raise click.UsageError(str(error)) from error
    raise click.exceptions.Exit(code)
