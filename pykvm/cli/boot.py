"""``pykvm boot``: boot a kernel, its serial console on this terminal, its end in the exit code."""

from __future__ import annotations

import os
import select
import sys
import threading
import time
from typing import TYPE_CHECKING

import click

from pykvm import result as reasons

from . import exitcodes
from .common import (
    Count,
    Seconds,
    Size,
    debug_option,
    device_option,
    disk_option,
    json_option,
    test_devices_option,
    write_json,
)
from .run import RunCommand

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pykvm.devices.disk.spec import DiskSpec
    from pykvm.machine import Machine
    from pykvm.result import RunResult

DEFAULT_CMDLINE = "console=ttyS0 panic=-1"
"""A console that is seen, and a panic that ends the run instead of waiting for somebody."""

DOUBT_AFTER = 1.0
"""Seconds after which a kernel that still runs makes us ask whether this KVM can run it at all."""


@click.command(cls=RunCommand)
@click.argument("kernel", type=click.Path(exists=True, dir_okay=False))
@click.option(
    "--initrd", type=click.Path(exists=True, dir_okay=False), help="The initial RAM disk."
)
@click.option(
    "--append",
    metavar="TEXT",
    default=DEFAULT_CMDLINE,
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
    device: str,
    as_json: bool,
) -> None:
    """Boot a kernel: bzImage, ELF vmlinux, PVH or multiboot image.

    The serial console is on standard output and input, raw if that is a terminal; there Ctrl-A x
    quits, Ctrl-A b sends a BREAK. The end of the run is told on standard error and by the exit
    code. A stock kernel on a KVM that cannot run one is given up after a second.
    """
    from contextlib import nullcontext

    from pykvm.machine import Machine

    from .run import _trace
    from .signals import EndingSignals
    from .terminal import Terminal

    began = time.monotonic()
    output = _Output(None if as_json else sys.stdout.fileno())
    with nullcontext() if ioctls is None else _trace(ioctls):
        try:
            m = Machine(
                memory,
                cpus=cpus,
                irqchip=irqchip,
                pit=irqchip == "kernel",
                features=cpu_features,
                path=device,
            )
        except ValueError as error:
            raise click.UsageError(str(error)) from error
        with m:
            for disk in disks:
                m.disk(disk)
            plan = m.boot(
                kernel,
                initrd=initrd,
                cmdline=append,
                protocol=protocol,
                kaslr=kaslr,
                cache=not no_cache,
                system_map=system_map,
                output=output,
            )
            if test_devices:
                m.test_devices()
            if verbose:
                for line in [repr(plan), *plan.notes]:
                    click.echo(f"pykvm: {line}", err=True)
                click.echo(f"pykvm: ready after {time.monotonic() - began:.3f} s", err=True)
            output.on_error = m.stop
            commands = {b"x": lambda: m.stop(reasons.INTERRUPTED), b"b": m.console.send_break}
            with (
                EndingSignals(m, output.give_up),
                Terminal(m.console.write, commands),
                nullcontext() if force else _Doubt(m),
            ):
                result = m.run(timeout)
            panic, lines = m.pc.panic if m.pc is not None else "", m.console.lines(10)
    code = exitcodes.exit_code(result, as_qemu=test_devices)
    if output.error is not None:
        raise output.error
    if as_json:
        write_json(_describe(kernel, result, code, panic, b"".join(output.kept)))
    else:
        output.close_line()
        _tell(kernel, result, panic, lines, verbose)
    raise click.exceptions.Exit(code)


class _Doubt:
    """For the length of a ``with``: ends the run of a kernel that can never get anywhere here.

    Not at once: most kernels have booted before anybody asks, and asking takes a guest of its own.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._timer = threading.Timer(DOUBT_AFTER, self._ask)
        self._timer.daemon = True

    def _ask(self) -> None:
        from pykvm.suitability import ring0_is_emulated

        pc = self._machine.pc
        if pc is not None and pc.is_linux and ring0_is_emulated(self._machine.kvm.path):
            self._machine.stop(reasons.UNSUPPORTED)

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *exc: object) -> None:
        self._timer.cancel()
        self._timer.join()


class _Output:
    """Standard output as it comes, or kept for JSON. What fails is told at the end.

    Attributes:
        kept: what came, for JSON.
        error: why nothing more can be written, or None.
        on_error: called when that happens.
    """

    PIECE = 4096
    """PIPE_BUF: a pipe that select() finds writable takes so much without blocking (pipe(7))."""
    PATIENCE = 0.2
    """Seconds that a reader still has after give_up()."""

    def __init__(self, fd: int | None) -> None:
        self._fd = fd
        self._last = b""
        self._given_up = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        self.kept: list[bytes] = []
        self.error: OSError | None = None
        self.on_error: Callable[[], object] = lambda: None

    def __call__(self, data: bytes) -> None:
        self._last = data[-1:]
        if self._fd is None:
            self.kept.append(data)
            return
        while data and self.error is None:
            try:
                if not self._ready(self._fd):
                    return
                data = data[os.write(self._fd, data[: self.PIECE]) :]
            except BlockingIOError:
                pass  # somebody else made it so, and wrote in between
            except OSError as error:
                self.error = error
                self.on_error()

    def _ready(self, fd: int) -> bool:
        """Wait until it can be written to; False if nobody waits for that any longer."""
        poll = select.poll()
        poll.register(fd, select.POLLOUT)
        if not self._given_up:
            poll.register(self._wake, select.POLLIN)
            if any(ready == fd for ready, _ in poll.poll()):
                return True
            poll.unregister(self._wake)
        return bool(poll.poll(self.PATIENCE * 1000))

    def give_up(self) -> None:
        """Wait no longer for a reader that does not read. Safe in a signal's handler."""
        self._given_up = True
        os.eventfd_write(self._wake, 1)

    def close_line(self) -> None:
        """On a terminal, keep our closing line apart from a last line that has no end."""
        if self._last not in (b"", b"\n") and sys.stdout.isatty():
            click.echo(err=True)


def _tell(kernel: str, result: RunResult, panic: str, lines: list[str], verbose: bool) -> None:
    name = os.path.basename(kernel)
    code = "" if result.reason != reasons.DEBUG_EXIT else f" {result.code}"
    click.echo(f"pykvm: {name}: {result.reason}{code} after {result.seconds:.3g} s", err=True)
    if panic:
        click.echo(f"  {panic}", err=True)
    if result.advice and result.reason not in _EXPLAINED:
        click.echo(f"  {result.advice}", err=True)
    for cpu in result.cpus:
        click.echo(f"  {cpu!r}", err=True)
    if result.reason in reasons.WATCHED and lines:
        click.echo("  the console's last lines:", err=True)
        for line in lines:
            click.echo(f"  | {line}", err=True)
    if result.reason in _EXPLAINED:
        click.echo(str(result.error), err=True)
    if verbose:
        phases = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in result.timings.items())
        click.echo(f"pykvm: {phases}; {result.exits} exits", err=True)


_EXPLAINED = (reasons.SHUTDOWN, reasons.FAILED_ENTRY, reasons.INTERNAL_ERROR)


def _describe(
    kernel: str, result: RunResult, exit_code: int, panic: str, console: bytes
) -> dict[str, Any]:
    return {
        "kernel": kernel,
        "reason": result.reason,
        "code": result.code,
        "exit_code": exit_code,
        "panic": panic,
        "advice": result.advice,
        "exits": result.exits,
        "seconds": result.seconds,
        "timings": result.timings,
        "cpus": [
            {
                "index": cpu.index,
                "rip": cpu.rip,
                "symbol": cpu.symbol,
                "halted": cpu.halted,
                "interrupts": cpu.interrupts,
            }
            for cpu in result.cpus
        ],
        "devices": result.devices,
        "error": None if result.error is None else str(result.error),
        "console": console.decode("utf-8", "surrogateescape"),
    }
