"""Build the images that are shipped beside the sources: ``python guests/build.py [NAME…]``.

Run it after changing a source; a test compares the committed images with what this makes.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from pykvm import guestlib
from pykvm.assembler import asm_file


def digest(guest: guestlib.Guest) -> str:
    """SHA-256 of all that a guest in C is built from: compilers differ, sources do not."""
    include = guestlib.folder() / "include"
    files = [include / name for name in ("crt0.S", "guest.ld", "pykvm_guest.h", "runtime.c")]
    total = hashlib.sha256()
    for file in [*files, guest.path / "main.c"]:
        total.update(file.read_bytes())
    return total.hexdigest()


def build(guest: guestlib.Guest) -> Path:
    """Build one guest's image in its folder."""
    source = guest.source
    assert source is not None
    if source.suffix == ".c":
        image = guest.path / f"{guest.name}.elf"
        guestlib.build_c([source], image)
        (guest.path / "sources.sha256").write_text(digest(guest) + "\n", encoding="ascii")
        return image
    image = guest.path / f"{guest.name}.bin"
    mode = guest.mode
    assert mode in ("real16", "prot32", "long64")
    image.write_bytes(asm_file(source, mode, at=guest.at or 0))  # type: ignore[arg-type]
    return image


if __name__ == "__main__":
    for name in sys.argv[1:] or guestlib.names():
        made = build(guestlib.find(name))
        print(f"{made}: {made.stat().st_size} bytes")
