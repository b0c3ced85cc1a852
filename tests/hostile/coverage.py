"""Which branches of the device code in Python were taken both ways, by the interpreter's trace."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType, ModuleType
from typing import Any

Branches = dict[int, tuple[int, int, int]]
"""Of a file: line of an if, while or for → last line of its test, first and last of its body."""


class BranchCoverage:
    """Counts outcomes of ``if``, ``while`` and ``for``: into the body, or past it.

    Args:
        modules: whose code is looked at.
    """

    def __init__(self, modules: Sequence[ModuleType]) -> None:
        self._files: dict[str, Branches] = {}
        self._seen: set[tuple[str, int, bool]] = set()
        for module in modules:
            assert module.__file__ is not None
            with open(module.__file__, encoding="utf-8") as file:
                self._files[module.__file__] = _branches(ast.parse(file.read()))

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Look at what this thread does within the ``with``; it is slow."""
        before = sys.gettrace()
        sys.settrace(self._enter)
        try:
            yield
        finally:
            sys.settrace(before)

    @property
    def taken(self) -> int:
        """Outcomes seen."""
        return len(self._seen)

    @property
    def total(self) -> int:
        """Outcomes there are."""
        return 2 * sum(map(len, self._files.values()))

    def missing(self) -> list[str]:
        """Outcomes not seen, as ``file:line into`` or ``past``."""
        return [
            f"{name.rpartition('/')[2]}:{line} {'into' if into else 'past'}"
            for name, branches in self._files.items()
            for line in branches
            for into in (True, False)
            if (name, line, into) not in self._seen
        ]

    def _enter(self, frame: FrameType, event: str, argument: object) -> Any:
        name = frame.f_code.co_filename
        branches = self._files.get(name)
        if branches is None:
            return None
        seen = self._seen
        last = 0

        def local(frame: FrameType, event: str, argument: object) -> Any:
            nonlocal last
            if event not in ("line", "return"):
                return local
            line = frame.f_lineno if event == "line" else 0
            if last:
                test_end, first, end = branches[last]
                if last < line <= test_end:
                    return local  # still the test
                seen.add((name, last, first <= line <= end))
            last = line if line in branches else 0
            return local

        return local


def _branches(tree: ast.AST) -> Branches:
    found: Branches = {}
    for node in ast.walk(tree):
        if not isinstance(node, (ast.If, ast.While, ast.For)) or _is_type_checking(node):
            continue
        test = node.iter if isinstance(node, ast.For) else node.test
        end = node.body[-1].end_lineno
        assert test.end_lineno is not None and end is not None
        found[node.lineno] = (test.end_lineno, node.body[0].lineno, end)
    return found


def _is_type_checking(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
    )
