"""How long does a script with a plain ``import pykvm`` take to its guest's first byte?

From starting the interpreter until the byte comes through the pipe. The reference is the same
interpreter with nothing to do, ``python -c pass``, until it has ended. Both find bytecode in a
cache, as they do where pykvm is installed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter_ns

from benches.measure import OF_DIFFERENCE, BenchError, Goal, Result, Sampler, compare, take_turns

C_ONLY = False

# mov al, 'H'; out 0xe9, al; hlt
SCRIPT = """\
import pykvm

with pykvm.Machine(memory="2M") as m:
    m.load(bytes.fromhex("b048 e6e9 f4"), at=0x8000)
    m.cpu.enter("real16", entry=0x8000)
    m.on_pio(0xE9, lambda exit: print(chr(exit.value), end="", flush=True))
    m.run(timeout=5).check()
"""


def measure(pairs: int) -> Iterator[Result]:
    """One process each."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "script.py"
        script.write_text(SCRIPT)
        commands = [sys.executable, str(script)], [sys.executable, "-c", "pass"]
        environment = _environment(folder)
        ours, bare = (
            _process(command, environment, first)
            for command, first in zip(commands, (b"H", b""), strict=True)
        )
        yield compare(
            "first-byte/script",
            "ms",
            *take_turns([ours, bare], pairs),
            goal=Goal(10, OF_DIFFERENCE),
            note="reference: python -c pass, to its end",
        )


def _environment(cache: str) -> dict[str, str]:
    checkout = str(Path(__file__).resolve().parents[1])
    paths = [checkout, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONPYCACHEPREFIX": cache,
    }
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    return environment


def _process(command: list[str], environment: dict[str, str], first: bytes) -> Sampler:
    def sample() -> float:
        start = perf_counter_ns()
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, bufsize=0) as child:
            assert child.stdout is not None
            byte = child.stdout.read(1)
            elapsed = perf_counter_ns() - start
        if byte != first or child.returncode:
            raise BenchError(f"{command} wrote {byte!r} and ended with {child.returncode}")
        return elapsed / 1e6

    return sample
