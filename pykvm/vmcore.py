"""A machine from memory and registers that were taken elsewhere: a core file, or a raw dump.

::

    m = pykvm.vmcore.machine("guest.core")                    # as it was dumped
    m = pykvm.vmcore.machine("ram.bin", registers={"rip": 0x1000, "cr3": 0x2000, ...})
"""

from __future__ import annotations

import os

from pykvm.cpu import SREGS
from pykvm.errors import SnapshotError
from pykvm.machine import Machine
from pykvm.memory import GuestMemory
from pykvm.memory.units import PAGE_SIZE
from pykvm.snapshot import vmcore

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

_GENERAL = frozenset(vmcore.QEMU_REGS)
_CONTROLS = ("cr0", "cr2", "cr3", "cr4", "efer")
_LME, _LMA, _PG = 1 << 8, 1 << 10, 1 << 31
_PIECE = 1 << 20


def machine(
    path: str | os.PathLike[str],
    registers: Mapping[str, Any] | None = None,
    *,
    at: int = 0,
    **options: Any,
) -> Machine:
    """Make a machine of a memory dump.

    Args:
        path: an ELF core file as ``Machine.dump``, QEMU's dump-guest-memory or kdump (not
            compressed) write it, or else memory as it is, from guest-physical ``at`` on.
        registers: values that go over the file's: general registers, ``cr0``, ``cr2``, ``cr3``,
            ``cr4``, ``efer``, and segments, ``gdt`` and ``idt`` as (selector, limit, flags, base),
            flags as in the upper half of a descriptor (bits 8 to 23).
        at: of a raw dump.
        options: as for ``Machine``; by default as many vCPUs as the file has registers of.

    A core file has no MSRs, no FPU and no devices: what needs them does not go on as it was. EFER
    is made from CR0 and CS where nobody says it.

    Raises:
        SnapshotError: the file is damaged, or a register is none.
    """
    name = os.fspath(path)
    fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
    memory = GuestMemory()
    try:
        if os.pread(fd, 4, 0) == b"\x7fELF":
            core = vmcore.read(fd, name)
        else:
            size = os.fstat(fd).st_size
            core = vmcore.Core([(at, size, 0, size)], [])
        _load(fd, core, memory, name)
        cpus = core.cpus or [{}]
        made = Machine(memory, **{"cpus": len(cpus), **options})
    except BaseException:
        memory.close()
        raise
    finally:
        os.close(fd)
    try:
        for number, cpu in enumerate(made.cpus):
            values = {**(cpus[number] if number < len(cpus) else {}), **(registers or {})}
            if values:
                _set(cpu, values)
    except BaseException:
        made.close()
        raise
    return made


def _load(fd: int, core: vmcore.Core, memory: GuestMemory, name: str) -> None:
    """RAM wherever the file has some, in whole pages."""
    spans: list[list[int]] = []
    for gpa, length, _, _ in core.segments:
        first, end = gpa // PAGE_SIZE * PAGE_SIZE, -(-(gpa + length) // PAGE_SIZE) * PAGE_SIZE
        if spans and first <= spans[-1][1]:
            spans[-1][1] = max(end, spans[-1][1])
        else:
            spans.append([first, end])
    if not spans:
        raise SnapshotError(f"{name}: has no memory")
    for first, end in spans:
        memory.add(first, end - first)
    for gpa, _, offset, length in core.segments:
        for start in range(0, length, _PIECE):
            data = os.pread(fd, min(_PIECE, length - start), offset + start)
            if data.count(0) != len(data):
                memory.load(gpa + start, data)


def _set(cpu: Any, values: Mapping[str, Any]) -> None:
    sregs = cpu.load_sregs()
    known = {**values}
    known.pop("cr1", None)
    known.pop("orig_rax", None)
    for base in ("fs_base", "gs_base"):
        if base in known:
            getattr(sregs, base[:2]).base = known.pop(base)
    for name, value in known.items():
        if name in _GENERAL:
            setattr(cpu, name, value)
        elif name in _CONTROLS:
            setattr(sregs, name, value)
        elif name in vmcore.QEMU_SEGMENTS:
            _segment(getattr(sregs, name), name, value)
        else:
            raise SnapshotError(f"there is no register {name!r}")
    if "efer" not in known and "cr0" in known and known["cr0"] & _PG and sregs.cs.l:
        sregs.efer |= _LME | _LMA
    cpu.dirty(SREGS)


def _segment(segment: Any, name: str, value: Any) -> None:
    if isinstance(value, int):  # NT_PRSTATUS has no more than the selector
        segment.selector = value
        return
    selector, limit, flags, base = value
    segment.base, segment.limit = base, limit & (0xFFFF if name in ("gdt", "idt") else 0xFFFFFFFF)
    if name in ("gdt", "idt"):
        return
    segment.selector = selector
    segment.type, segment.s, segment.dpl = flags >> 8 & 15, flags >> 12 & 1, flags >> 13 & 3
    segment.present, segment.avl = flags >> 15 & 1, flags >> 20 & 1
    segment.l, segment.db, segment.g = flags >> 21 & 1, flags >> 22 & 1, flags >> 23 & 1
    segment.unusable = not segment.present
