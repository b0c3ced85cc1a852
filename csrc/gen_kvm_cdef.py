"""Read linux/kvm.h with the C compiler and write it down as a cdef for cffi.

Nothing of the kernel's header is copied into this project. At build time the installed header is
preprocessed (``cc -E``), parsed with pycparser (which cffi brings along), and turned into

* a **preamble**: C that includes the header and adds what ``newer_names.py`` knows and an older
  header lacks. ``pykvm_kvm.h`` in the build folder holds it.
* a **cdef**: every ``struct kvm_*``, and every ``KVM_*`` / ``MSR_KVM_*`` name that the compiler
  itself accepts as an integer constant.

cffi then takes sizes, offsets and values from the compiler (structures end in ``...;``, but for
those with bit fields, which it compares with the compiler when they are first used), so a slip of
this generator cannot turn into a wrong layout. What needs care, and where it is done:

===========================================  ===================================================
trap                                         handled in
===========================================  ===================================================
array sizes that are expressions             ``_Cdef._array``: ``[...]``, the compiler counts
``__DECLARE_FLEX_ARRAY`` (an unnamed struct  ``_Cdef._members``: the empty struct, which is not C
around an empty struct and an array)         for cffi, is dropped
a named member of unnamed type               ``_Cdef._hoist``: it gets a typedef of its
(``kvm_run.system_event``), for which cffi   ``__typeof__``: ``kvm_run_system_event``; so cffi can
would compute the layout by itself           ask the compiler about it
a name that is macro, enumerator or both     ``constants``: one set of names, each tried out
a structure that grew members                ``preamble``: the older header's one is renamed away
===========================================  ===================================================
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from newer_names import CONSTANTS, STRUCTS
from pycparser import c_ast, c_generator, c_parser

#: The headers that are read, in this order. errno.h: linux/kvm_para.h names its values.
HEADERS = ("errno.h", "linux/kvm.h", "linux/kvm_para.h")

#: Names worth exposing. What else these headers define belongs to other interfaces.
_CONSTANT = re.compile(r"((MSR_)?KVM|GUEST_MEMFD_)\w+\Z")

#: Hides from pycparser what it does not know and what no layout here depends on: cffi asks the
#: compiler, which sees the header as it is.
_PLAIN_C = (
    "-D__attribute__(x)=",
    "-D__extension__=",
    "-D__signed__=signed",
    "-D__inline=inline",
    "-D__inline__=inline",
    "-U__SIZEOF_INT128__",
)


class BuildError(Exception):
    """The build cannot go on; the text says what is missing and what to install."""


class Compiler:
    """The C compiler, as a thing that answers questions about C text."""

    def __init__(self, command: str | None = None, flags: Iterable[str] = ()) -> None:
        """``command`` defaults to $CC, then to gcc; ``flags`` (-I…) are added to every call."""
        self.command = shlex.split(command or os.environ.get("CC") or "gcc")
        self.flags = tuple(flags)

    def run(self, source: str, *flags: str) -> subprocess.CompletedProcess[str]:
        """Feed C text to the compiler; its messages come in English, one a line."""
        command = [*self.command, "-std=gnu11", *self.flags, *flags, "-x", "c", "-"]
        environment = {**os.environ, "LC_ALL": "C"}
        try:
            return subprocess.run(
                command, input=source, capture_output=True, text=True, env=environment, check=False
            )
        except FileNotFoundError as error:
            raise BuildError(
                f"pykvm needs a C compiler, and there is no {self.command[0]!r} here.\n"
                "  Debian, Ubuntu:  apt install gcc libc6-dev\n"
                "  Fedora, RHEL:    dnf install gcc glibc-devel\n"
                "Another compiler can be named in the environment: CC=clang"
            ) from error

    def preprocess(self, source: str, *flags: str) -> str:
        """Return the preprocessed text."""
        result = self.run(source, "-E", *flags)
        if result.returncode:
            raise BuildError(f"{self.command[0]} -E failed:\n{result.stderr}")
        return result.stdout

    def accepts(self, source: str) -> bool:
        """Tell whether this C text compiles."""
        return self.run(source, "-fsyntax-only", "-w").returncode == 0

    def refused_lines(self, source: str) -> set[int]:
        """Return the numbers of the lines in which the compiler finds an error."""
        result = self.run(source, "-fsyntax-only", "-w")
        found = re.findall(r"^<stdin>:(\d+):(?:\d+:)? (?:fatal )?error:", result.stderr, re.M)
        if result.returncode and not found:
            raise BuildError(f"{self.command[0]} failed:\n{result.stderr}")
        return {int(number) for number in found}


def check_toolchain(compiler: Compiler) -> None:
    """Raise `BuildError` unless compiler, platform, kernel and Python headers are there."""
    if not compiler.accepts(
        "#if !defined(__linux__) || !defined(__x86_64__) || defined(__ILP32__)\n#error\n#endif\n"
    ):
        raise BuildError(
            f"pykvm is for Linux on x86-64; {compiler.command[0]} compiles for something else."
        )
    needs = (
        ("stdint.h", (), "the C library's headers", "libc6-dev", "glibc-devel"),
        ("linux/kvm.h", (), "the kernel's headers", "linux-libc-dev", "kernel-headers"),
        ("asm/kvm.h", (), "the kernel's headers", "linux-libc-dev", "kernel-headers"),
        (
            "Python.h",
            tuple(f"-I{sysconfig.get_path(which)}" for which in ("include", "platinclude")),
            "the headers of this Python",
            "python3-dev",
            "python3-devel",
        ),
    )
    for header, flags, what, debian, fedora in needs:
        result = compiler.run(f"#include <{header}>\n", "-E", "-w", *flags)
        if result.returncode:
            reason = result.stderr.partition("\n")[0]
            raise BuildError(
                f"pykvm needs {what}: <{header}> cannot be included ({reason}).\n"
                f"  Debian, Ubuntu:  apt install {debian}\n"
                f"  Fedora, RHEL:    dnf install {fedora}"
            )


@dataclass
class Header:
    """What a piece of C text declares, as far as the generator cares."""

    typedefs: dict[str, Any] = field(default_factory=dict)
    structs: dict[str, Any] = field(default_factory=dict)
    enumerators: list[str] = field(default_factory=list)
    macros: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, compiler: Compiler, source: str) -> Header:
        """Preprocess and parse C text."""
        header = cls()
        macros = compiler.preprocess(source, "-dM")
        header.macros = re.findall(r"^#define (\w+)(?= )", macros, re.M)
        tree = c_parser.CParser().parse(compiler.preprocess(source, *_PLAIN_C))
        for node in _walk(tree):
            if isinstance(node, c_ast.Typedef):
                header.typedefs[node.name] = node
            elif isinstance(node, c_ast.Struct | c_ast.Union) and node.name and node.decls:
                header.structs[node.name] = node
            elif isinstance(node, c_ast.Enumerator):
                header.enumerators.append(node.name)
        return header

    def fields(self, tag: str) -> set[str]:
        """Return the names of a structure's members, those of unnamed members included."""
        return set(_field_names(self.structs[tag])) if tag in self.structs else set()


def _walk(node: Any) -> Iterator[Any]:
    yield node
    for child in node:
        yield from _walk(child)


def _field_names(struct: Any) -> Iterator[str]:
    for member in struct.decls or ():
        if member.name:
            yield member.name
        elif isinstance(member.type, c_ast.Struct | c_ast.Union):
            yield from _field_names(member.type)


def constants(compiler: Compiler, source: str, header: Header) -> list[str]:
    """Return the names that the compiler takes for integer constants, sorted."""
    names = sorted({*header.macros, *header.enumerators})
    names = [name for name in names if _CONSTANT.match(name)]

    def probe(some: list[str]) -> list[str]:
        first = source.count("\n") + 1
        tries = "".join(f'_Static_assert((({name}) | 0) || 1, "");\n' for name in some)
        refused = compiler.refused_lines(source + tries)
        return [name for line, name in enumerate(some, first) if line not in refused]

    # A refused line may swallow the ones behind it, or drag one down with it: so those that pass
    # are asked again until all do, and those that fail are asked again one by one.
    good = names
    while (passed := probe(good)) != good:
        good = passed
    good += [name for name in names if name not in good and probe([name])]
    return sorted(good)


def preamble(compiler: Compiler) -> str:
    """Return C text that includes the headers and adds the names they are too old for.

    The header wins: only a name it lacks is supplied, or one that it defines by a macro which only
    the kernel has (KVM_PMU_MASKED_ENTRY_EXCLUDE in Linux 6.1). A structure that has grown since
    is replaced whole; its size, which is part of the ioctl number, stayed the same.
    """
    includes = "".join(f"#include <{name}>\n" for name in HEADERS)
    header = Header.read(compiler, includes)
    known = set(constants(compiler, includes, header))
    lines = ["/* Generated by csrc/gen_kvm_cdef.py from linux/kvm.h and csrc/newer_names.py. */"]
    lines += ["#ifndef PYKVM_KVM_H", "#define PYKVM_KVM_H"]
    missing = []
    renamed = []
    for struct in STRUCTS:
        ours = Header.read(compiler, f"#include <linux/types.h>\n{struct.text}").fields(struct.tag)
        if not ours <= header.fields(struct.tag):
            missing.append(struct)
            if struct.tag in header.structs:
                renamed.append(struct.tag)
    lines += [f"#define {tag} {tag}_of_older_header" for tag in renamed]
    lines.append(includes.rstrip())
    lines += [f"#undef {tag}" for tag in renamed]
    for struct in missing:
        lines.append(f"/* Linux {struct.since} */\n{struct.text}")
        if struct.tag in renamed:
            old = f"struct {struct.tag}_of_older_header"
            lines.append(
                f"_Static_assert(sizeof(struct {struct.tag}) == sizeof({old}), "
                f'"struct {struct.tag} changed its size");'
            )
    for constant in CONSTANTS:
        if constant.name not in known:
            if constant.name in header.macros:
                lines.append(f"#undef {constant.name}")
            lines.append(f"#define {constant.name} {constant.value}  /* Linux {constant.since} */")
    lines.append("#endif")
    return "\n".join(lines) + "\n"


class _Cdef:
    """Writes structures down for cffi, each after those it is made of."""

    def __init__(self, header: Header) -> None:
        self.header = header
        self.lines: list[str] = []
        #: typedefs that the preamble must add: ``(name, expression it is the type of)``
        self.hoisted: list[tuple[str, str]] = []
        self._done: set[str] = set()
        self._c = c_generator.CGenerator()

    def struct(self, tag: str) -> None:
        """Write ``struct tag`` (or union), and first what it needs."""
        if tag in self._done:
            return
        self._done.add(tag)
        node = self.header.structs[tag]
        kind = "union" if isinstance(node, c_ast.Union) else "struct"
        body = self._members(node, tag, f"(*({kind} {tag} *)0)", 1)
        self.lines.append(f"{kind} {tag} {{\n{body}{_rest(node)}}};")

    def _members(self, node: Any, name: str, access: str, depth: int) -> str:
        """Write the members of a structure, each in a line.

        ``name`` begins the names of those it hoists; ``access`` is a C expression of its type.
        """
        text = ""
        indent = "\t" * depth
        for member in node.decls:
            inner = member.type
            if isinstance(inner, c_ast.Struct | c_ast.Union) and not member.name:
                if not inner.decls:
                    continue
                kind = "union" if isinstance(inner, c_ast.Union) else "struct"
                body = self._members(inner, name, access, depth + 1)
                text += f"{indent}{kind} {{\n{body}{indent}}};\n"
            elif not _is_empty(inner):
                text += f"{indent}{self._member(member, name, access)};\n"
        return text

    def _member(self, member: Any, name: str, access: str) -> str:
        """Write one named member: its type, its name, its dimensions or bits."""
        dims = ""
        stars = ""
        access = f"{access}.{member.name}"
        node = member.type
        while not isinstance(node, c_ast.TypeDecl):
            if isinstance(node, c_ast.ArrayDecl):
                dims += self._array(node.dim)
                access += "[0]"
            elif isinstance(node, c_ast.PtrDecl):
                stars += "*"
                access = f"(*{access})"
            else:
                raise BuildError(f"cannot express {access}: {self._c.visit(member)}")
            node = node.type
        base = node.type
        if isinstance(base, c_ast.Struct | c_ast.Union):
            kind = "union" if isinstance(base, c_ast.Union) else "struct"
            if base.name:
                if not stars and base.name in self.header.structs:
                    self.struct(base.name)
                text = f"{kind} {base.name}"
            else:
                text = self._hoist(base, f"{name}_{member.name}", access)
        elif isinstance(base, c_ast.Enum):
            text = "unsigned int"
        else:
            text = " ".join(base.names)
            self._typedef(text)
        bits = f" : {self._c.visit(member.bitsize)}" if member.bitsize else ""
        return f"{text} {stars}{member.name}{dims}{bits}"

    def _array(self, dim: Any) -> str:
        if dim is None:
            return "[]"
        return f"[{dim.value}]" if isinstance(dim, c_ast.Constant) else "[...]"

    def _hoist(self, node: Any, name: str, access: str) -> str:
        """Give a member's unnamed type the name ``<structure>_<member>``, and write it down."""
        body = self._members(node, name, access, 1)
        kind = "union" if isinstance(node, c_ast.Union) else "struct"
        self.lines.append(f"typedef {kind} {{\n{body}{_rest(node)}}} {name};")
        self.hoisted.append((name, access))
        return name

    def _typedef(self, name: str) -> None:
        if name not in self.header.typedefs or name in self._done:
            return
        self._done.add(name)
        node = self.header.typedefs[name]
        inner = node.type.type
        if isinstance(inner, c_ast.IdentifierType):
            self._typedef(" ".join(inner.names))
        self.lines.append(f"{self._c.visit(node)};")


def _rest(node: Any) -> str:
    """Write cffi's "ask the compiler". It cannot ask about bits; those cffi checks against it."""
    return "" if any(member.bitsize for member in node.decls) else "\t...;\n"


def _is_empty(node: Any) -> bool:
    """Tell the ``struct { } __empty_name`` that __DECLARE_FLEX_ARRAY makes."""
    inner = getattr(node, "type", None)
    return isinstance(inner, c_ast.Struct) and not inner.name and not inner.decls


@dataclass(frozen=True)
class Generated:
    """What the generator found: C text for the build, and the names in it for the tests."""

    preamble: str
    cdef: str
    #: the C names of all structures: ``struct kvm_regs``, and ``kvm_run_io`` for unnamed ones
    structs: tuple[str, ...]
    constants: tuple[str, ...]


def generate(compiler: Compiler) -> Generated:
    """Read the installed headers and return preamble, cdef and names."""
    source = preamble(compiler)
    header = Header.read(compiler, source)
    out = _Cdef(header)
    tags = [tag for tag in header.structs if tag.startswith(("kvm_", "pykvm_"))]
    tags = [tag for tag in tags if not tag.endswith("_of_older_header")]
    for tag in tags:
        out.struct(tag)
    typedefs = "".join(f"typedef __typeof__({what}) {name};\n" for name, what in out.hoisted)
    source = source.removesuffix("#endif\n") + typedefs + "#endif\n"
    names = constants(compiler, source, header)
    cdef = "\n".join([*out.lines, *(f"#define {name} ..." for name in names), ""])
    unions = {tag for tag in tags if isinstance(header.structs[tag], c_ast.Union)}
    structs = [f"{'union' if tag in unions else 'struct'} {tag}" for tag in tags]
    structs += [name for name, _ in out.hoisted]
    return Generated(source, cdef, tuple(structs), tuple(names))
