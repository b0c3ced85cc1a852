"""What ``pykvm boot`` does, once its command line has been read.

Without click, and so without half of what a command's start would cost: see ``quick.py``.
"""

from __future__ import annotations

import gc
import os
import threading
import time

from pykvm import result as reasons

from . import exitcodes
from .failures import tell
from .output import ConsoleOutput, standard_output

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from pykvm.devices.disk.spec import DiskSpec
    from pykvm.machine import Machine
    from pykvm.result import RunResult

DEFAULT_CMDLINE = "console=ttyS0 panic=-1"
"""A console that is seen, and a panic that ends the run instead of waiting for somebody."""

DOUBT_AFTER = 1.0
"""Seconds after which a kernel that still runs makes us ask whether this KVM can run it at all."""
DOUBT_LATER = 4.0
"""Seconds more for one that has used a port by then."""


class UsageProblem(Exception):
    """The command line asks for what cannot be; nothing has been done."""


def boot(
    kernel: str,
    *,
    initrd: str | None,
    append: str,
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
    verbose: bool,
    device: str,
    as_json: bool,
    disks: Iterable[DiskSpec] = (),
    trace: str | None = None,
    trace_filters: tuple[str, ...] = (),
    gdb: str | None = None,
    gdb_anywhere: bool = False,
) -> int:
    """Boot a kernel, and tell how it ended.

    Args: as the command's options are.

    Returns:
        The exit code.

    Raises:
        UsageProblem: before anything was done.
    """
    from pykvm.machine import Machine

    from .signals import EndingSignals
    from .terminal import Terminal

    began = time.monotonic()
    output = ConsoleOutput(None if as_json else standard_output())
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
        raise UsageProblem(str(error)) from error
    with output, m:
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
        noted = len(plan.notes)
        if verbose:
            for line in [repr(plan), *plan.notes]:
                tell(f"pykvm: {line}")
            tell(f"pykvm: ready after {time.monotonic() - began:.3f} s")
        output.on_error = m.stop
        gc.enable()
        commands = {b"x": lambda: m.stop(reasons.INTERRUPTED), b"b": m.console.send_break}
        with (
            _Traced(m, trace, trace_filters),
            EndingSignals(m, output.give_up),
            Terminal(m.console.write, commands),
            _Doubt(m, force or gdb is not None),
        ):
            result = m.run(timeout) if gdb is None else _debug(m, gdb, gdb_anywhere, timeout)
        panic, lines = m.pc.panic if m.pc is not None else "", m.console.lines(10)
    code = exitcodes.exit_code(result, as_qemu=test_devices)
    if output.error is not None:
        raise output.error
    if as_json:
        import json

        told = _describe(kernel, result, code, panic, output.text)
        print(json.dumps(told, indent=2), flush=True)
    else:
        output.close_line()
        _tell(kernel, result, panic, lines, verbose)
        for note in plan.notes[noted:] if verbose else ():
            tell(f"pykvm: {note}")
    return code


def _debug(m: Machine, address: str, anywhere: bool, timeout: float | None) -> RunResult:
    from pykvm.debug.gdb import run_under_gdb

    try:
        return run_under_gdb(
            m, address, lambda text: tell(f"pykvm: {text}"), anywhere=anywhere, timeout=timeout
        )
    except ValueError as error:
        raise UsageProblem(str(error)) from error


class _Traced:
    """For the length of a ``with``: every exit into a file, if one is named."""

    def __init__(self, machine: Machine, file: str | None, filters: tuple[str, ...]) -> None:
        self._traced: Any = None
        if file is not None:
            from pykvm.debug.export import traced

            try:
                self._traced = traced(machine, file, filters)
            except ValueError as error:
                raise UsageProblem(str(error)) from error

    def __enter__(self) -> None:
        if self._traced is not None:
            self._traced.__enter__()

    def __exit__(self, *exc: object) -> None:
        if self._traced is not None:
            self._traced.__exit__(*exc)


class _Doubt:
    """For the length of a ``with``: ends the run of a kernel that can never get anywhere here.

    Not if ``force`` is set, and not at once: most kernels have booted before anybody asks, and
    asking takes a guest of its own. Nor soon where the kernel has come to use a port: it would only
    be slowed down.
    """

    def __init__(self, machine: Machine, force: bool) -> None:
        self._machine = machine
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        if not force and machine.pc is not None and machine.pc.is_linux:
            self._thread = threading.Thread(target=self._ask, name="doubt", daemon=True)

    def _ask(self) -> None:
        if self._over.wait(DOUBT_AFTER):
            return
        if any(claim.hits for claim in self._machine.pio) and self._over.wait(DOUBT_LATER):
            return
        from pykvm.suitability import ring0_is_emulated

        if ring0_is_emulated(self._machine.kvm.path):
            self._machine.stop(reasons.UNSUPPORTED)

    def __enter__(self) -> None:
        if self._thread is not None:
            self._thread.start()

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()


def _tell(kernel: str, result: RunResult, panic: str, lines: list[str], verbose: bool) -> None:
    name = os.path.basename(kernel)
    code = "" if result.reason != reasons.DEBUG_EXIT else f" {result.code}"
    tell(f"pykvm: {name}: {result.reason}{code} after {result.seconds:.3g} s")
    if panic:
        tell(f"  {panic}")
    if result.advice and result.reason not in _EXPLAINED:
        tell(f"  {result.advice}")
    for cpu in result.cpus:
        tell(f"  {cpu!r}")
    if result.reason in reasons.WATCHED and lines:
        tell("  the console's last lines:")
        for line in lines:
            tell(f"  | {line}")
    if result.reason in _EXPLAINED:
        tell(str(result.error))
    if verbose:
        phases = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in result.timings.items())
        tell(f"pykvm: {phases}; {result.exits} exits")


_EXPLAINED = (reasons.SHUTDOWN, reasons.FAILED_ENTRY, reasons.INTERNAL_ERROR)


def _describe(
    kernel: str, result: RunResult, exit_code: int, panic: str, console: str
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
                "waiting": cpu.waiting,
                "interrupts": cpu.interrupts,
            }
            for cpu in result.cpus
        ],
        "devices": result.devices,
        "error": None if result.error is None else str(result.error),
        "console": console,
    }
