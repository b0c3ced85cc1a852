"""``pykvm run``: run a guest, its console on standard output, its end in the exit code."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from pykvm import result as reasons
from pykvm.errors import AsmError, BootError, CapabilityError, PykvmError, VcpuExitError

from . import exitcodes
from .common import Count, Seconds, Size, write_json
from .failures import tell
from .machine_options import RunCommand, disk_option, ioctls_told, test_devices_option, watching
from .output import ConsoleOutput, standard_output

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from pykvm.devices.disk.spec import DiskSpec
    from pykvm.guestlib import Guest
    from pykvm.machine import Machine
    from pykvm.result import RunResult


def _complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
    """What the shell offers for NAME|FILE: the guests' names, and files."""
    from click.shell_completion import CompletionItem

    from pykvm import guestlib

    found = [guestlib.find(name) for name in guestlib.names() if name.startswith(incomplete)]
    return [
        *(CompletionItem(guest.name, help=guest.summary) for guest in found),
        CompletionItem(incomplete, type="file"),
    ]


@click.command(cls=RunCommand)
@click.argument("guest", metavar="NAME|FILE", shell_complete=_complete)
@click.option(
    "--mode",
    type=click.Choice(["real16", "prot32", "long64"]),
    help="The processor's mode to start in. [default: long64; an ELF file says its own]",
)
@click.option(
    "--at",
    type=Size(),
    metavar="GPA",
    help="Where to load a flat image. [default: 0x7c00 in real16, else 0x8000]",
)
@disk_option
@click.option("--memory", type=Size(), metavar="SIZE", help="RAM, from address 0 on. [default: 2M]")
@click.option("--cpus", type=Count(1), metavar="N", help="Virtual processors. [default: 1]")
@click.option(
    "--irqchip",
    type=click.Choice(["none", "kernel", "split"]),
    help="Interrupt controllers; split: the IOAPIC in this process, no PIC. [default: none]",
)
@click.option("--pit", is_flag=True, help="An interval timer. Implies --irqchip kernel.")
@click.option(
    "--pic",
    type=click.Choice(["reset", "bios"]),
    help="The PIC as after a reset, or as a BIOS leaves it, which implies --irqchip kernel."
    " [default: reset]",
)
@test_devices_option
@click.option(
    "--ring",
    type=click.Choice(["0", "3"]),
    help="The privilege level to start in. [default: 0]",
)
@click.option(
    "--iopl",
    type=click.Choice(["0", "1", "2", "3"]),
    help="The I/O privilege level; 3 lets ring 3 use ports. [default: that of --ring]",
)
@click.option(
    "--timeout", type=Seconds(), metavar="S", help="Seconds to run, or none. [default: 5]"
)
@click.option(
    "--max-exits", type=Count(0), metavar="N", help="Exits each processor may make. [default: any]"
)
@click.option(
    "--ioctls",
    metavar="[=FILE]",
    help="Print every ioctl, as strace would, on standard error or into FILE.",
)
@watching
def run(
    guest: str,
    mode: str | None,
    at: int | None,
    disks: tuple[DiskSpec, ...],
    memory: int | None,
    cpus: int | None,
    irqchip: str | None,
    pit: bool,
    pic: str | None,
    test_devices: bool,
    ring: str | None,
    iopl: str | None,
    timeout: float | None,
    max_exits: int | None,
    ioctls: str | None,
    gdb: str | None,
    gdb_anywhere: bool,
    trace: str | None,
    trace_filters: tuple[str, ...],
    device: str,
    as_json: bool,
) -> None:
    """Run a guest: one that comes with pykvm, or a file.

    A file is an ELF executable, an assembler source (.S, .s, .asm; Intel syntax), or else a flat
    binary. A name wins over a file: write ./hello for a file of that name. The defaults below are
    those of a file; a guest that comes with pykvm has its own.

    What the guest writes to port 0xe9 comes on standard output as it is. It ends by HLT, or by
    writing its exit code to port 0xf4; with --test-devices N written there gives exit code 2N+1, as
    of QEMU. A line on standard error says how it ended. With --json the output is in the JSON, as
    UTF-8 with surrogate escapes for what is none.

    Numbers may be decimal or with 0x; sizes and addresses also with K, M, G.
    """
    from pykvm import guestlib

    found = guestlib.resolve(
        guest,
        mode=mode,
        at=at,
        memory=None if memory is None else str(memory),
        timeout=timeout,
    )
    if at is not None and _is_elf(found):
        raise click.UsageError("--at is for flat images: an ELF file says where it goes")
    if cpus is not None:
        found.cpus = cpus
    found.pit = found.pit or pit
    found.pic = pic or found.pic
    if irqchip is not None:
        found.irqchip = None if irqchip == "none" else irqchip
    elif (pit or pic == "bios") and not found.irqchip:
        found.irqchip = "kernel"
    if ring is not None:
        found.ring = found.iopl = int(ring)
    if iopl is not None:
        found.iopl = int(iopl)
    with ioctls_told(ioctls):
        result, output = _run(
            found,
            max_exits,
            device,
            disks,
            test_devices,
            (trace, trace_filters),
            None if gdb is None else (gdb, gdb_anywhere),
            captured=as_json,
        )
    if output.error is not None:
        raise output.error
    code = exitcodes.exit_code(result, as_qemu=test_devices)
    if as_json:
        write_json(_describe(found, result, code, output.text))
    else:
        output.close_line()
        tell(_summary(found, result))
    raise click.exceptions.Exit(code)


def _is_elf(guest: Guest) -> bool:
    from pykvm.boot import elf

    with open(guest.image, "rb") as file:
        return elf.is_elf(file.read(4))


def _run(
    guest: Guest,
    max_exits: int | None,
    device: str,
    disks: tuple[DiskSpec, ...],
    test_devices: bool,
    trace: tuple[str | None, tuple[str, ...]],
    gdb: tuple[str, bool] | None,
    *,
    captured: bool,
) -> tuple[RunResult, ConsoleOutput]:
    """Run a guest on a machine of its own.

    Returns:
        How it ended, and what became of its console.
    """
    from pykvm.debug.export import traced
    from pykvm.guestlib import EXIT_PORT

    from .signals import EndingSignals

    with (
        _machine(guest, device) as m,
        ConsoleOutput(None if captured else standard_output()) as output,
    ):
        output.on_error = m.stop
        with _console(m, output) as show:
            if test_devices:
                m.test_devices(byte_ports=False)  # the console is in their midst
            else:
                m.debug_exit(EXIT_PORT)
            with _usage():
                for disk in disks:
                    m.disk(disk)
                try:
                    guest.prepare(m, show)
                except (AsmError, BootError) as error:
                    raise type(error)(f"{guest.name}: {error}") from error
            with _usage():
                watched = traced(m, *trace)
            with watched, EndingSignals(m, output.give_up):
                if gdb is None:
                    result = m.run(guest.timeout, max_exits=max_exits)
                else:
                    with _usage():
                        result = _under_gdb(m, gdb, guest.timeout, max_exits)
        return result, output


def _under_gdb(
    m: Machine, gdb: tuple[str, bool], timeout: float | None, max_exits: int | None
) -> RunResult:
    from pykvm.debug.gdb import run_under_gdb

    return run_under_gdb(
        m,
        gdb[0],
        lambda text: tell(f"pykvm: {text}"),
        anywhere=gdb[1],
        timeout=timeout,
        max_exits=max_exits,
    )


@contextmanager
def _usage() -> Iterator[None]:
    """A value that the library refuses came from the command line: tell it as wrong usage."""
    try:
        yield
    except PykvmError:
        raise
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def _machine(guest: Guest, device: str) -> Machine:
    try:
        with _usage():
            return guest.machine(device)
    except CapabilityError as error:
        if error.capability:
            raise
        from pykvm.doctor import diagnose  # it knows better what to do

        problem = diagnose(device)
        if problem is None:
            raise
        lines = [problem.what, *(f"  - {remedy}" for remedy in problem.remedies)]
        raise CapabilityError("\n".join(lines)) from error


@contextmanager
def _console(m: Machine, output: ConsoleOutput) -> Iterator[Callable[[bytes], object]]:
    """Pass on what is written to the console's port.

    Yields:
        A function for what comes from elsewhere, in its order.
    """
    from pykvm.guestlib import CONSOLE_PORT

    if not output.captures:
        m.on_pio(CONSOLE_PORT, lambda access: output(access.data) if access.is_write else None)
        yield output
        return
    fifo = m.pio.fifo(CONSOLE_PORT)  # nobody reads along: C keeps it

    def show(data: bytes) -> None:
        output(fifo.read())
        output(data)

    yield show
    output(fifo.read())


# ---- telling how it ended ----------------------------------------------------------------------


def _summary(guest: Guest, result: RunResult) -> str:
    """A line that says why the run ended, exits and time; below it what explains a failure."""
    return "\n".join([_headline(guest, result), *_details(result)])


def _headline(guest: Guest, result: RunResult) -> str:
    text = f"pykvm: {guest.name}: {result.reason}"
    if result.code is not None:
        text += f" {result.code}"
    if result.exit is not None and result.reason in (reasons.UNCLAIMED, reasons.OTHER_EXIT):
        text += f" {result.exit!r}"
    if guest.cpus > 1:
        text += f" on cpu {result.cpu}"
    text += f" after {result.exits} exit{'s' * (result.exits != 1)}, {_time(result.seconds)}"
    as_expected = (result.reason, result.code) == (guest.expected_reason, guest.expected_code)
    if as_expected and not result.ok:
        text += ", as it should"
    return text


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 0.9995 else f"{seconds * 1000:.3g} ms"


def _details(result: RunResult) -> Iterator[str]:
    yield from (f"  {cpu!r}" for cpu in result.cpus)
    if isinstance(result.error, VcpuExitError):
        yield str(result.error)
    elif result.error is not None:  # the result in words, and below it perhaps a remedy
        hint = str(result.error).removeprefix(str(result)).strip()
        if hint:
            yield f"  {hint}"


def _describe(guest: Guest, result: RunResult, exit_code: int, console: str) -> dict[str, Any]:
    return {
        "guest": guest.name,
        "reason": result.reason,
        "code": result.code,
        "exit_code": exit_code,
        "exits": result.exits,
        "seconds": result.seconds,
        "cpu": result.cpu,
        "exit": None if result.exit is None else repr(result.exit),
        "cpus": [
            {
                "index": cpu.index,
                "rip": cpu.rip,
                "code": cpu.code.hex(),
                "halted": cpu.halted,
                "interrupts": cpu.interrupts,
            }
            for cpu in result.cpus
        ],
        "devices": result.devices,
        "error": None if result.error is None else str(result.error),
        "console": console,
    }
