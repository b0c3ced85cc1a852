"""Compile ``csrc/vring.c`` apart from the module: watched, covered, and with bugs planted."""

from __future__ import annotations

import ctypes
import hashlib
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pykvm._abi import ffi

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"

Patch = tuple[str, str]
"""What stands in vring.c, exactly once, and what takes its place."""

REGIONS, KNOWN, READS = 16, 16, 4096

FUNCTIONS = {
    "enable": "int(*)(struct pykvm_vring *)",
    "disable": "void(*)(struct pykvm_vring *)",
    "pop": "int(*)(struct pykvm_vring *, struct pykvm_chain *)",
    "push": "int(*)(struct pykvm_vring *, uint32_t, uint32_t, uint32_t)",
    "should_interrupt": "int(*)(struct pykvm_vring *)",
    "waiting": "int(*)(struct pykvm_vring *)",
}


class _Span(ctypes.Structure):
    _fields_ = [("host", ctypes.c_uint64), ("size", ctypes.c_uint64), ("gpa", ctypes.c_uint64)]


class _Read(ctypes.Structure):
    _fields_ = [("gpa", ctypes.c_uint64), ("size", ctypes.c_uint64)]


class Watch(ctypes.Structure):
    """``struct watch`` of watch.c."""

    _fields_ = [
        ("regions", _Span * REGIONS),
        ("known", _Span * KNOWN),
        ("region_count", ctypes.c_uint32),
        ("known_count", ctypes.c_uint32),
        ("armed", ctypes.c_uint32),
        ("poke_bytes", ctypes.c_uint32),
        ("trigger", ctypes.c_uint64),
        ("poke_host", ctypes.c_uint64),
        ("poke", ctypes.c_uint8 * 8),
        ("due", ctypes.c_uint32),
        ("accesses", ctypes.c_uint32),
        ("reads", ctypes.c_uint32),
        ("strays", ctypes.c_uint32),
        ("runaway", ctypes.c_uint32),
        ("stray", ctypes.c_uint64),
        ("read", _Read * READS),
    ]


class BuildError(Exception):
    """A patch does not fit any more, or there is no compiler."""


class Variant:
    """A vring.c of its own, with the functions that ``Queue`` calls.

    Attributes:
        watch: what is seen of each call, and what is to happen in the middle of one.
        folder: where it was built; branch coverage ends up there.
    """

    pykvm_vring_enable: Any
    pykvm_vring_disable: Any
    pykvm_vring_pop: Any
    pykvm_vring_push: Any
    pykvm_vring_should_interrupt: Any
    pykvm_vring_waiting: Any

    def __init__(self, patches: Sequence[Patch] = ()) -> None:
        source = patched(patches)
        watcher = (HERE / "watch.c").read_text()
        mark = hashlib.sha256((source + watcher).encode()).hexdigest()[:12]
        self.folder = Path(tempfile.mkdtemp(prefix=f"pykvm-hostile-{mark}-"))
        library = self._build(source)
        self._library = ctypes.CDLL(str(library))
        self.watch = Watch.in_dll(self._library, "watch")
        for name, kind in FUNCTIONS.items():
            address = ctypes.cast(getattr(self._library, f"watched_{name}"), ctypes.c_void_p).value
            setattr(self, f"pykvm_vring_{name}", ffi.cast(kind, address))

    def _build(self, source: str) -> Path:
        folder = self.folder
        (folder / "pykvm_kvm.h").write_text("")  # nothing of KVM is needed here
        (folder / "vring.c").write_text(source)
        common = ["gcc", "-std=gnu11", "-g", "-fPIC", f"-I{folder}", f"-I{CSRC}", "-w"]
        _run(
            [*common, "-O0", "--coverage", "-fsanitize=thread", "-c", "vring.c", "-o", "vring.o"],
            folder,
        )
        _run([*common, "-O2", "-DCOVERAGE", "-c", str(HERE / "watch.c"), "-o", "watch.o"], folder)
        _run(["gcc", "-shared", "--coverage", "vring.o", "watch.o", "-o", "vring.so"], folder)
        return folder / "vring.so"

    def branches(self) -> tuple[int, int]:
        """How many branches of vring.c were taken so far, and how many there are."""
        self._library.coverage_dump()
        _run(["gcov", "-b", "-c", "--json-format", "vring.o"], self.folder)
        taken = total = 0
        for packed in self.folder.glob("*.gcov.json.gz"):
            import gzip

            for file in json.loads(gzip.decompress(packed.read_bytes()))["files"]:
                if Path(file["file"]).name != "vring.c":
                    continue
                for line in file["lines"]:
                    total += len(line["branches"])
                    taken += sum(branch["count"] > 0 for branch in line["branches"])
        return taken, total

    def close(self) -> None:
        """Delete what was built; the library stays loaded."""
        shutil.rmtree(self.folder, ignore_errors=True)


def patched(patches: Sequence[Patch]) -> str:
    """The text of vring.c with the patches applied.

    Raises BuildError for one that does not fit exactly once.
    """
    source = (CSRC / "vring.c").read_text()
    for old, new in patches:
        words = re.compile(r"\s+".join(map(re.escape, old.split())))
        if len(words.findall(source)) != 1:
            raise BuildError(f"{len(words.findall(source))} places in vring.c look like {old!r}")
        source = words.sub(lambda match, new=new: new, source)  # type: ignore[misc]
    return source


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stderr}")
