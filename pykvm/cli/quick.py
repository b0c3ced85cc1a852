"""A command line of ``pykvm boot`` read without click, which takes longer to load than the rest.

Only what is plain and right is understood here: every option once, spelled out, with a value that
is one. Anything else is click's to read, and to explain: ``--help``, ``--json``, whatever is wrong.
"""

from __future__ import annotations

import gc
import os
import stat
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any


class NotPlain(Exception):
    """Something for click."""


def _file(text: str) -> str:
    try:
        is_folder = stat.S_ISDIR(os.stat(text).st_mode)
    except OSError:
        raise NotPlain from None
    if is_folder or not os.access(text, os.R_OK):
        raise NotPlain
    return text


def _size(text: str) -> int:
    from pykvm.memory.units import parse_size

    return parse_size(text)


def _count(text: str) -> int:
    number = int(text, 0)
    if number < 1:
        raise NotPlain
    return number


def _seconds(text: str) -> float:
    number = float("inf") if text == "none" else float(text)
    if not number >= 0:
        raise NotPlain
    return number


def _one_of(*choices: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in choices:
            raise NotPlain
        return text

    return read


_VALUES: dict[str, Callable[[str], Any]] = {
    "--initrd": _file,
    "--append": str,
    "--memory": _size,
    "--cpus": _count,
    "--cpu-features": str,
    "--protocol": _one_of("auto", "bzimage", "vmlinux", "pvh", "multiboot"),
    "--irqchip": _one_of("kernel", "split"),
    "--system-map": _file,
    "--timeout": _seconds,
    "--device": str,
}
_FLAGS = {
    "--kaslr": "kaslr",
    "--no-cache": "no_cache",
    "--force": "force",
    "--verbose": "verbose",
    "-v": "verbose",
}


def _defaults() -> dict[str, Any]:
    from .booting import DEFAULT_CMDLINE

    return {
        "initrd": None,
        "append": DEFAULT_CMDLINE,
        "memory": 512 << 20,
        "cpus": 1,
        "cpu_features": "",
        "protocol": "auto",
        "irqchip": "kernel",
        "test_devices": False,
        "kaslr": False,
        "no_cache": False,
        "system_map": None,
        "timeout": None,
        "force": False,
        "verbose": False,
        "device": "/dev/kvm",
        "as_json": False,
        "disks": (),
        "gdb": None,
        "gdb_anywhere": False,
        "trace": None,
        "trace_filters": (),
    }


def parse(words: Sequence[str]) -> dict[str, Any] | None:
    """The arguments of ``booting.boot`` for the words after ``boot``; None for click to read."""
    try:
        return _parse(words)
    except (NotPlain, ValueError):
        return None


def _parse(words: Sequence[str]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    rest = iter(words)
    for word in rest:
        name, equals, text = word.partition("=")
        value: Any = True
        if word in _FLAGS:
            key = _FLAGS[word]
        elif name in _VALUES:
            if not equals:
                text = next(rest, "-")
            if text[:1] == "-":
                raise NotPlain
            key, value = name[2:].replace("-", "_"), _VALUES[name](text)
        elif word[:1] != "-":
            key, value = "kernel", _file(word)
        else:
            raise NotPlain
        if key in given:
            raise NotPlain
        given[key] = value
    if "kernel" not in given:
        raise NotPlain
    return {**_defaults(), **given}


def main() -> None:
    """The entry point, ``pykvm``: ends the process with the exit code."""
    try:
        _main()
    except KeyboardInterrupt:  # while modules come: later it is an end like others
        from . import exitcodes

        sys.exit(exitcodes.INTERRUPTED)


def _main() -> None:
    options = parse(sys.argv[2:]) if sys.argv[1:2] == ["boot"] else None
    if options is not None:
        gc.disable()  # while modules come: they are no garbage. booting enables it for the run
        from . import booting

        try:
            code = _run(booting.boot, options)
        except booting.UsageProblem:
            code = None  # nothing was done yet: click says it, in its way
        if code is not None:
            sys.exit(code)
    from .main import main as whole

    whole()


def _run(boot: Callable[..., int], options: dict[str, Any]) -> int:
    """Boot; errors are told as ``common.Cli`` does."""
    from pykvm.errors import PykvmError

    from . import exitcodes
    from .failures import message, settle_output, tell

    try:
        return boot(**options)
    except KeyboardInterrupt:
        return exitcodes.INTERRUPTED
    except BrokenPipeError:
        settle_output()
        return exitcodes.BROKEN_PIPE
    except (PykvmError, LookupError, OSError) as error:
        settle_output()
        if isinstance(error, (KeyError, IndexError)):
            raise
        tell(f"pykvm: {message(error)}")
        return exitcodes.ERROR
