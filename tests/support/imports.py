"""Which module of a package imports which, and whether the direction is right.

Imports are read from the source, those inside functions as well: a lazy import in the wrong
direction ties two layers together just as much. Only what stands under ``if TYPE_CHECKING:`` is
left out, as it is never executed.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

#: What stands directly under the package and is not named in STOREYS: machine, cpu, result, …
_MACHINE = "machine"

#: The storeys from the ground up, as names below the package; "" is the package itself, the façade
#: over it all. A module imports from its own storey and from those below.
STOREYS = (
    {"errors"},
    {"_abi"},
    {"kvm", "memory"},
    {"arch", "boot", "devices"},
    {"snapshot", "debug"},
    {_MACHINE},
    {""},
    {"exec", "doctor"},
    {"manage"},
    {"cli", "__main__"},
)

#: Who may import ``_abi``, and why.
ABI_USERS = {
    "kvm": "ioctls and their structures",
    "memory": "mappings",
    "devices.bus": "fills the table of ranges that C looks addresses up in",
    "devices.claim": "fills the ranges",
    "devices.in_c": "small devices that C serves",
    "devices.ring": "drains the rings that C fills",
    "devices.disk.host": "fallocate and a block device's ioctls",
    "devices.serial": "the registers of a UART, which C serves",
    "devices.virtio.blk_fast": "plain block requests, which C serves",
    "devices.virtio.interrupt": "interrupts that C raises",
    "devices.virtio.queue": "rings in guest memory, which C walks",
    "devices.access": "what C makes of an access for its handler",
    "debug.trace": "the ring of exits that C fills",
    "debug.input_log": "the records of a log, as C writes them",
    "debug.planted": "tells C where a stop may be planted",
    "vcpu_thread": "drives the run loop in C",
    "cpu": "registers in the run page, by KVM_CAP_SYNC_REGS",
    "fuzzing": "drives the fuzz loop in C",
    "replay": "the log that C writes and follows",
    "snapshot": "the state of a vCPU as bytes, and the plan by which C puts it back",
    "machine": "the numbers of exit reasons and flags",
}

#: (who, whom): right by the storeys, or in the same one, and yet they must not meet.
FORBIDDEN = {("devices", "kvm"), ("boot", "kvm"), ("arch", "kvm"), ("arch", "memory")}

#: Libraries of the command line, which nothing else may load.
CLI_ONLY = ("click", "rich")


@dataclass(frozen=True)
class Import:
    """``module`` (dotted, below the package) imports ``target`` at ``line``."""

    module: str
    target: str  # absolute: "pykvm.kvm.vm", "click"
    line: int


class _Finder(ast.NodeVisitor):
    def __init__(self, dotted: str, is_package: bool) -> None:
        self.found: list[tuple[str, int]] = []
        self._package = dotted.split(".") if is_package else dotted.split(".")[:-1]

    def visit_If(self, node: ast.If) -> None:
        name = (
            node.test.attr if isinstance(node.test, ast.Attribute) else getattr(node.test, "id", "")
        )
        for child in node.orelse if name == "TYPE_CHECKING" else (*node.body, *node.orelse):
            self.visit(child)

    def visit_Import(self, node: ast.Import) -> None:
        self.found += [(alias.name, node.lineno) for alias in node.names]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = node.module or ""
        if node.level:
            up = self._package[: len(self._package) - node.level + 1]
            base = ".".join([*up, base] if base else up)
        # Each name may be a module of its own: "from . import kvm".
        self.found += [(f"{base}.{alias.name}", node.lineno) for alias in node.names]


def imports_of(root: Path) -> Iterator[Import]:
    """All imports that the modules of the package at ``root`` can execute."""
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        dotted = ".".join(parts[:-1] if is_package else parts)
        finder = _Finder(dotted, is_package)
        finder.visit(ast.parse(path.read_text(encoding="utf-8"), str(path)))
        module = dotted.partition(".")[2]
        for target, line in finder.found:
            yield Import(module, target, line)


def _storey(top: str) -> int:
    known = any(top in names for names in STOREYS)
    return next(n for n, names in enumerate(STOREYS) if (top if known else _MACHINE) in names)


def _may_use_abi(module: str) -> bool:
    return any(f"{module}.".startswith(f"{user}.") for user in ("_abi", *ABI_USERS))


def _submodule(root: Path, target: str) -> str:
    """The module below the package that ``target`` names: its last part may be a mere name."""
    parts = target.split(".")[1:]
    while parts:
        path = root.joinpath(*parts)
        if path.is_dir() or path.with_suffix(".py").exists():
            break
        parts.pop()
    return ".".join(parts)


def wrong_imports(root: Path) -> list[str]:
    """Every import of the package at ``root`` that points the wrong way, in words."""
    wrong: dict[str, None] = {}  # in order, each once: "from x import a, b" is two imports
    for found in imports_of(root):
        here = found.module.partition(".")[0]
        who = f"{root.name}.{found.module}".rstrip(".") + f":{found.line}"
        library = found.target.partition(".")[0]
        if library in CLI_ONLY and here != "cli":
            wrong[f"{who} imports {library}, which only the command line may"] = None
        if library != root.name:
            continue
        target = _submodule(root, found.target)
        there = target.partition(".")[0]
        whom = f"{root.name}.{target}".rstrip(".")
        if _storey(there) > _storey(here):
            wrong[f"{who} imports {whom}, which stands above it"] = None
        elif there == "_abi" and not _may_use_abi(found.module):
            wrong[f"{who} imports {whom}, which only {', '.join(ABI_USERS)} may"] = None
        elif (here, there) in FORBIDDEN:
            wrong[f"{who} imports {whom}, and {here} must not know {there}"] = None
    return list(wrong)
