"""Machine code from text, through the GNU assembler.

``asm()`` runs ``as`` and ``ld`` (GNU binutils) on files that exist only in memory, and remembers
what it built. The syntax is Intel's without prefixes unless asked otherwise; ``;`` and the end of
a line separate statements, ``#`` starts a comment.

The module is not called ``asm``: importing a submodule of that name would put the module where
the function ``pykvm.asm`` is.
"""

from __future__ import annotations

import functools
import os
import re
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pykvm.boot import elf
from pykvm.errors import AsmError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Literal

    Mode = Literal["long64", "prot32", "real16"]
    Syntax = Literal["intel", "att"]

_DIRECTIVE = {"long64": ".code64", "prot32": ".code32", "real16": ".code16"}
# As directives: with the option -msyntax=intel, as does not know `es:[bx]` nor `jmp 8:label`.
_SYNTAX = {"intel": ".intel_syntax noprefix", "att": ".att_syntax prefix"}
_INSTALL = (
    "GNU binutils is not installed: {!r} was not found on PATH. Install it with "
    "`apt install binutils` (Debian, Ubuntu), `dnf install binutils` (Fedora) or "
    "`apk add binutils` (Alpine); guests that are shipped or built before need none."
)

# A build takes about 20 ms. Only a source that makes `as` itself loop (.rept of .rept) gets here.
_TIMEOUT_SECONDS = 30.0
_CACHED = 256
_ERRORS_SHOWN = 5

# One output section, so that code and data stay side by side in the order flat images want, the
# caller's own sections last, and .bss becomes zeros in the image. PHDRS keeps the ELF headers out
# of the loaded bytes.
_SCRIPT = """
PHDRS {{ image PT_LOAD FLAGS(7); }}
SECTIONS {{
  /DISCARD/ : {{ *(.note .note.*) *(.comment) *(.eh_frame) *(.debug*) }}
  . = {at:#x};
  .image : {{
    *(.text .text.*) *(.rodata .rodata.*) *(.data .data.*) *(.bss .bss.*) *(COMMON) *(*)
  }} :image
}}
"""

_AS_ERROR = re.compile(
    r"^(?P<file>.+?):(?P<line>\d+): (?:Fatal )?(?:[Ee]rror|Warning): (?P<what>.*)$"
)
_STDIN = "{standard input}"
_UNDEFINED = re.compile(r"undefined reference to [`'](?P<name>[^']+)'")
_PREPROCESSOR = re.compile(
    r"^[ \t]*#(?:include\s*[<\"]|define\s+\w|if(?:def|ndef)?\s)", re.MULTILINE
)


class Code(bytes):
    """Machine code, linked for one address. It is bytes, and remembers how it was built.

    Attributes:
        mode: the mode it starts in: ``"long64"``, ``"prot32"`` or ``"real16"``.
        at: the guest address it was linked for.
        symbols: label or constant → value; a label's value is its address, so it can be given to
            a hook or a breakpoint as it stands.
    """

    mode: str
    at: int
    symbols: Mapping[str, int]

    def __new__(
        cls,
        data: bytes = b"",
        *,
        mode: str = "long64",
        at: int = 0,
        symbols: Mapping[str, int] | None = None,
    ) -> Code:
        """Wrap bytes that are machine code already; ``asm()`` makes one from text."""
        self = super().__new__(cls, data)
        self.mode = mode
        self.at = at
        self.symbols = MappingProxyType(dict(symbols or {}))  # one object serves all callers
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _code, (bytes(self), self.mode, self.at, dict(self.symbols))

    def __repr__(self) -> str:
        return f"<Code {self.mode} at={self.at:#x} {len(self)} bytes: {self[:16].hex(' ')}>"


def _code(data: bytes, mode: str, at: int, symbols: dict[str, int]) -> Code:
    """Make a pickled one again."""
    return Code(data, mode=mode, at=at, symbols=symbols)


def asm(
    text: str,
    mode: Mode = "long64",
    *,
    at: int = 0,
    syntax: Syntax = "intel",
    symbols: Mapping[str, int] | None = None,
    include: str | os.PathLike[str] | None = None,
) -> Code:
    """Assemble ``text`` and link it for address ``at``.

    Args:
        text: the source. Sections .text, .rodata, .data, .bss and others end up in this order in
            one image; .bss as zeros.
        mode: the mode the first instruction runs in. ``.code16``, ``.code32`` and ``.code64`` in
            the text switch, for guests that change mode.
        at: the address the first byte will have, so that absolute references are right.
        syntax: ``"intel"`` (no prefixes) or ``"att"``.
        symbols: constants that the text may use by name.
        include: a folder where ``.include`` and ``.incbin`` look for files. Such a build is not
            cached, because those files may change.

    Raises AsmError with the offending line and the assembler's words, for a symbol that nobody
    defines, and when binutils is not installed.
    """
    if mode not in _DIRECTIVE:
        raise AsmError(f"mode {mode!r}: expected one of {', '.join(_DIRECTIVE)}")
    if syntax not in _SYNTAX:
        raise AsmError(f"syntax {syntax!r}: expected one of {', '.join(_SYNTAX)}")
    if not 0 <= at < 1 << 64:
        raise AsmError(f"at={at:#x}: expected an address of 64 bits")
    if _PREPROCESSOR.search(text):
        raise AsmError(
            "the source uses C preprocessor directives, which the assembler takes for comments: "
            "use .include, .equ, .if and .macro"
        )
    constants = tuple(sorted((symbols or {}).items()))
    if include is not None:
        return _build(text, mode, at, syntax, constants, os.fspath(include))
    return _build_once(text, mode, at, syntax, constants)


def asm_file(
    path: str | os.PathLike[str],
    mode: Mode = "long64",
    *,
    at: int = 0,
    syntax: Syntax = "intel",
    symbols: Mapping[str, int] | None = None,
) -> Code:
    """Assemble a source file; ``.include`` looks in its folder. See ``asm``.

    There is no C preprocessor: a file for ``as``, in the Intel syntax unless it says otherwise.
    """
    with open(path, encoding="utf-8") as file:
        text = file.read()
    folder = os.path.dirname(os.path.abspath(path))
    return asm(text, mode, at=at, syntax=syntax, symbols=symbols, include=folder)


def _build(
    text: str,
    mode: str,
    at: int,
    syntax: str,
    constants: tuple[tuple[str, int], ...],
    include: str | None = None,
) -> Code:
    """Run the assembler and the linker on memfds: nothing to clean up, whatever happens."""
    source = text.replace("\r\n", "\n")
    fds: list[int] = []
    try:
        for name in ("object", "script", "image"):
            fds.append(os.memfd_create(f"pykvm-asm-{name}", os.MFD_CLOEXEC))
        obj, script, image = (f"/proc/self/fd/{fd}" for fd in fds)
        command = ["as", "--64", "--fatal-warnings", "-o", obj]
        for name, value in constants:
            command += ["--defsym", f"{name}={value:#x}"]
        if include is not None:
            command += ["-I", include]
        # The directives share the first line, so that the assembler counts lines as the caller.
        first = f"{_DIRECTIVE[mode]}; {_SYNTAX[syntax]}"
        errors = _run([*command, "-"], fds, f"{first}; {source}\n")
        if errors is not None:
            raise AsmError(_explain_as(errors, source))
        os.write(fds[1], _SCRIPT.format(at=at).encode())
        entry = f"--entry={at:#x}"
        errors = _run(["ld", "-m", "elf_x86_64", "-T", script, entry, "-o", image, obj], fds)
        if errors is not None:
            raise AsmError(_explain_ld(errors, source))
        data = os.pread(fds[2], os.fstat(fds[2]).st_size, 0)
    finally:
        for fd in fds:
            os.close(fd)
    linked, names = elf.flatten(data)
    return Code(linked, mode=mode, at=at, symbols=names)


# In memory only: a process that assembles pays 20 ms for its first, and one that minds has bytes.
_build_once = functools.lru_cache(maxsize=_CACHED)(_build)


def _run(command: list[str], fds: list[int], text: str | None = None) -> str | None:
    """Run one tool: None when it succeeded, else what it printed."""
    import subprocess

    try:
        done = subprocess.run(
            command,
            input="" if text is None else text,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            pass_fds=fds,
            env={**os.environ, "LC_ALL": "C"},
            timeout=_TIMEOUT_SECONDS,
            check=False,
        )
    except FileNotFoundError:
        raise AsmError(_INSTALL.format(command[0])) from None
    except subprocess.TimeoutExpired:
        raise AsmError(f"{command[0]} was still busy after {_TIMEOUT_SECONDS:.0f} s") from None
    if done.returncode == 0:
        return None
    return done.stderr.strip() or f"{command[0]} ended with status {done.returncode}"


def _explain_as(errors: str, source: str) -> str:
    """The assembler's complaints, each with the line it is about."""
    lines = source.split("\n")
    found = []
    for line in errors.splitlines():
        match = _AS_ERROR.match(line)
        if match is None:
            continue
        number = int(match["line"])
        if match["file"] == _STDIN:
            quoted = lines[number - 1].strip() if number <= len(lines) else ""
            found.append(f"line {number}: {match['what']}\n    {quoted}")
        else:
            found.append(f"{match['file']}, line {number}: {match['what']}")
    if not found:
        return errors.replace(_STDIN, "the source")
    found = list(dict.fromkeys(found))  # a macro repeats itself
    more = len(found) - _ERRORS_SHOWN
    if more > 0:
        found[_ERRORS_SHOWN:] = [f"and {more} more"]
    return "\n".join(found)


def _explain_ld(errors: str, source: str) -> str:
    """The linker's complaints; an undefined symbol with the first line that uses it."""
    undefined = list(dict.fromkeys(match["name"] for match in _UNDEFINED.finditer(errors)))
    if not undefined:
        lines = [line for line in errors.splitlines() if "warning:" not in line]
        return re.sub(r"(?m)^ld: |/proc/self/fd/\d+: ?", "", "\n".join(lines))
    found = []
    for name in undefined:
        word = re.compile(rf"(?<![\w.$]){re.escape(name)}(?![\w.$])")
        for number, line in enumerate(source.split("\n"), 1):
            if word.search(line):
                found.append(f"line {number}: undefined symbol {name!r}\n    {line.strip()}")
                break
        else:
            found.append(f"undefined symbol {name!r}")
    return "\n".join(found)
