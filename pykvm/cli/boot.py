"""``pykvm boot``: boot a kernel, its serial console on this terminal, its end in the exit code.

Its options are read a second time in ``quick.py``: a test holds the two together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from . import booting
from .common import (
    Count,
    Seconds,
    Size,
    debug_option,
    device_option,
    disk_option,
    gdb_anywhere_option,
    gdb_option,
    json_option,
    test_devices_option,
    trace_filter_option,
    trace_option,
)
from .run import RunCommand

if TYPE_CHECKING:
    from pykvm.devices.disk.spec import DiskSpec


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
@gdb_option
@gdb_anywhere_option
@trace_option
@trace_filter_option
@device_option
@json_option
@debug_option
def boot(
    kernel: str,
    initrd: str | None,
    append: str,
    disks: tuple[DiskSpec, ...],
    memory: int,
    cpus: int,
    cpu_features: str,
    protocol: str,
    irqchip: str,
    test_devices: bool,
    kaslr: bool,
    no_cache: bool,
    system_map: str | None,
    timeout: float | None,
    force: bool,
    ioctls: str | None,
    verbose: bool,
    gdb: str | None,
    gdb_anywhere: bool,
    trace: str | None,
    trace_filters: tuple[str, ...],
    device: str,
    as_json: bool,
) -> None:
    """Boot a kernel: bzImage, ELF vmlinux, PVH or multiboot image.

    The serial console is on standard output and input, raw if that is a terminal; there Ctrl-A x
    quits, Ctrl-A b sends a BREAK. The end of the run is told on standard error and by the exit
    code. A stock kernel on a KVM that cannot run one is given up after a second.
    """
    from contextlib import nullcontext

    from .run import _trace

    with nullcontext() if ioctls is None else _trace(ioctls):
        try:
            code = booting.boot(
                kernel,
                initrd=initrd,
                append=append,
                memory=memory,
                cpus=cpus,
                cpu_features=cpu_features,
                protocol=protocol,
                irqchip=irqchip,
                test_devices=test_devices,
                kaslr=kaslr,
                no_cache=no_cache,
                system_map=system_map,
                timeout=timeout,
                force=force,
                verbose=verbose,
                device=device,
                as_json=as_json,
                disks=disks,
                gdb=gdb,
                gdb_anywhere=gdb_anywhere,
                trace=trace,
                trace_filters=trace_filters,
            )
        except booting.UsageProblem as error:
            raise click.UsageError(str(error)) from error
    raise click.exceptions.Exit(code)
