"""Put together what is compiled into ``pykvm._abi._native``: cffi's part and our own C.

``setup.py`` uses this; by itself, ``python csrc/build_ffi.py FOLDER`` writes the generated files
into a folder, to be looked at.
"""

from __future__ import annotations

import os
import re
import sys
from glob import glob

from cffi import FFI
from gen_kvm_cdef import BuildError, Compiler, Generated, check_toolchain, generate

MODULE = "pykvm._abi._native"

#: This folder. setuptools wants its own paths relative, so see `sources` for those.
HERE = os.path.dirname(os.path.abspath(__file__))


def sources() -> list[str]:
    """Return our C files, relative to the folder of setup.py."""
    return [f"csrc/{os.path.basename(path)}" for path in sorted(glob(f"{HERE}/*.c"))]


def seam() -> str:
    """Return what pykvm.h and its parts mean for cffi, in the order of its includes."""
    with open(f"{HERE}/pykvm.h", encoding="utf-8") as file:
        parts = re.findall(r'^#include "(seam/\w+\.h)"$', file.read(), re.MULTILINE)
    return "".join(map(_cdef, parts))


def _cdef(part: str) -> str:
    with open(f"{HERE}/{part}", encoding="utf-8") as file:
        text = file.read()
    begin, end = "/* cdef: begin */", "/* cdef: end */"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise BuildError(f"csrc/{part} needs {begin!r} and {end!r}, once each")
    return text[text.index(begin) + len(begin) : text.index(end)]


def write(folder: str, compiler: Compiler | None = None) -> Generated:
    """Write ``pykvm_kvm.h`` and ``_native.c`` into a folder, and return what was generated."""
    compiler = compiler or Compiler()
    check_toolchain(compiler)
    generated = generate(compiler)
    os.makedirs(folder, exist_ok=True)
    with open(f"{folder}/pykvm_kvm.h", "w", encoding="utf-8") as file:
        file.write(generated.preamble)
    builder = FFI()
    builder.cdef(generated.cdef)
    builder.cdef(seam())
    builder.set_source(MODULE, '#include "pykvm_kvm.h"\n#include "pykvm.h"\n')
    builder.emit_c_code(f"{folder}/_native.c")
    return generated


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python csrc/build_ffi.py FOLDER")
    write(sys.argv[1])
