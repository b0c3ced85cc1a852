"""``python benches/run.py [--json FILE] [--pairs N] [--list] [--c-only] [--strict] [NAME…]``.

Exit status: 0; 1 if a bench could not run, or, with ``--strict``, if a goal does not hold. One
that needs what is not here (a KVM that runs stock kernels) fails only if it was named.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benches.measure import MIN_PAIRS, NotHere, Result, table, to_json

QUESTIONS = (
    "fake-loop",
    "c-action",
    "trace",
    "handler",
    "registers",
    "doorbell",
    "blk-request",
    "busy-thread",
    "vring",
    "snapshot-reset",
    "snapshot-unstable",
    "snapshot-fork",
    "snapshot-restore",
    "first-exit",
    "first-byte",
    "boot-startup",
    "boot-warm",
    "boot-cold",
    "console-bytes",
    "blk-qemu",
)
"""One file each, in this order."""

PAIRS = 21


def load(name: str) -> ModuleType:
    """The module that answers a question; its ``measure(pairs)`` yields results."""
    return import_module(f"benches.{name.replace('-', '_')}")


def backend(sys_module: str = "/sys/module") -> str:
    """What runs the guests: KVM's modules and the kernel's release."""
    try:
        modules = sorted(name for name in os.listdir(sys_module) if name.startswith("kvm_"))
    except OSError:
        modules = []
    names = " ".join(modules).replace("_", "-") or "no KVM module seen"
    return f"{names}, Linux {platform.release()}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benches/run.py",
        description="Measure pykvm against references in C.",
        epilog="Exit status: 1 if a bench could not run, or with --strict if a goal does not hold.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="questions; default all")
    parser.add_argument("--list", action="store_true", help="list the questions")
    parser.add_argument("--json", metavar="FILE", help="write the results here too")
    parser.add_argument(
        "--pairs",
        type=int,
        default=PAIRS,
        metavar="N",
        help=f"samples of each (%(default)s; below {MIN_PAIRS} only for trying things out)",
    )
    parser.add_argument(
        "--c-only",
        action="store_true",
        help="only C against C: where Python itself is slowed down, as under an emulated processor",
    )
    parser.add_argument("--strict", action="store_true", help="fail if a goal does not hold")
    return parser


def select(names: Sequence[str], c_only: bool) -> list[tuple[str, ModuleType]]:
    """The questions asked for. Raises ValueError for one that there is not."""
    unknown = set(names) - set(QUESTIONS)
    if unknown:
        raise ValueError(f"no such bench: {', '.join(sorted(unknown))} (see --list)")
    chosen = [(name, load(name)) for name in QUESTIONS if not names or name in names]
    return [(name, module) for name, module in chosen if module.C_ONLY or not c_only]


def _list() -> None:
    for name in QUESTIONS:
        module = load(name)
        question = (module.__doc__ or "").partition("\n")[0]
        print(f"{name:12} {question}{'' if module.C_ONLY else ' [host only]'}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.list:
        _list()
        return 0
    if options.pairs < 1:
        parser.error(f"--pairs must be at least 1, not {options.pairs}")
    try:
        chosen = select(options.names, options.c_only)
    except ValueError as error:
        parser.error(str(error))

    where = backend()
    load_average = os.getloadavg()[0]
    print(f"{where}; {platform.python_implementation()} {platform.python_version()}; ", end="")
    print(f"{os.cpu_count()} CPUs, load {load_average:.2f}, {options.pairs} pairs")
    if options.pairs < MIN_PAIRS:
        print(f"fewer than {MIN_PAIRS} pairs: not figures to rely on")
    results: list[Result] = []
    failed: list[str] = []
    absent: list[str] = []
    for name, module in chosen:
        print(f"  {name} …", file=sys.stderr, flush=True)
        try:
            results.extend(module.measure(options.pairs))
        except NotHere as error:
            (failed if name in options.names else absent).append(f"{name} ({error})")
        except Exception:
            failed.append(name)
            traceback.print_exc()
    print(table(results))
    if options.json:
        Path(options.json).write_text(to_json(results, where))
    missed = [result.name for result in results if result.holds is False]
    if missed:
        print(f"missed: {', '.join(missed)}")
    if absent:
        print(f"not here: {', '.join(absent)}")
    if failed:
        print(f"could not run: {', '.join(failed)}")
    return 1 if failed or (options.strict and missed) else 0


if __name__ == "__main__":
    sys.exit(main())
