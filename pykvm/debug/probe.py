"""How a guest can be stopped here: asked of a tiny guest, for each way and each mode, once.

What api.rst 4.87 (KVM_SET_GUEST_DEBUG) offers is not what every KVM does: a debug register may
never match where KVM emulates, INT3 may be none of the emulator's instructions, a single step may
end in a shutdown. So every way is tried, in a guest of its own, before it is relied on.
"""

from __future__ import annotations

from pykvm import kvm

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

HARDWARE = "hardware"
"""A debug register that matches execution (DR7.RW = 00)."""
WATCH = "watch"
"""A debug register that matches writes (DR7.RW = 01): a trap, after the instruction."""
SOFTWARE = "software"
"""INT3 in the code, and KVM_GUESTDBG_USE_SW_BP."""
PORT = "port"
"""IN AL,DX in the code, one byte as INT3 is: it exits wherever ports do."""
STEP = "step"
"""KVM_GUESTDBG_SINGLESTEP."""

STEP_ON = "step on"
"""Single steps that go on behind an instruction that KVM emulates, though it is told once only."""

WAYS = (HARDWARE, WATCH, SOFTWARE, PORT, STEP)

MODES = ("real16", "prot32", "prot32/3", "long64", "long64/3")
"""Processor modes, with the ring behind the slash where it is not 0."""

INT3 = 0xCC
IN_AL_DX = 0xEC

_ENTRY, _CELL, _END_PORT = 0x8000, 0x20000 - 0x1000, 0xE9
_TARGET = _ENTRY + 1
_DOORBELL = 0x20000
"""Behind the memory."""
_SECONDS = 2.0
_STORES = {
    "real16": b"\xc6\x07\x01",  # mov byte [bx], 1
    "prot32": b"\xc6\x03\x01",  # mov byte [ebx], 1
    "long64": b"\xc6\x03\x01",  # mov byte [rbx], 1
}
_RAX = 0x1234

_known: dict[tuple[str, str, str], str] = {}


def mode_of(sregs: Any) -> str:
    """Which of MODES a vCPU is in, by its ``struct kvm_sregs``."""
    if not sregs.cr0 & 1:
        return "real16"
    ring = "/3" if sregs.ss.dpl == 3 else ""
    long = sregs.efer & 1 << 10 and sregs.cs.l
    return ("long64" if long else "prot32") + ring


def obstacle(way: str, mode: str, make: Callable[[], Any], where: str = "") -> str:
    """Why a guest cannot be stopped this way in this mode: "" if it can.

    Args:
        way: one of WAYS, or STEP_ON.
        mode: one of MODES.
        make: makes a ``Machine`` of 128 KiB and one vCPU, on the KVM in question.
        where: that KVM's name, under which the answer is kept.
    """
    key = where, way, mode
    if key not in _known:
        _known[key] = _try(way, mode, make)
    return _known[key]


def _try(way: str, mode: str, make: Callable[[], Any]) -> str:
    with make() as m:
        name, _, ring = mode.partition("/")
        code = b"\x90\x90" + _STORES[name] + b"\x90\xe6" + bytes([_END_PORT]) + b"\xeb\xfe"
        m.load(code, at=_ENTRY)
        m.cpu.enter(name, entry=_ENTRY, ring=int(ring or 0), iopl=3)
        m.cpu.rax, m.cpu.rdx = _RAX, 0x3F8
        m.cpu.rbx = _CELL
        if name == "real16":
            m.cpu.ds.base, m.cpu.rbx = _CELL - 0x100, 0x100
        m.on_exit(kvm.KVM_EXIT_DEBUG, lambda exit: False)
        m.pio.stop(_END_PORT, tag="debug-exit")
        try:
            return _TRIES[way](m)
        except kvm.KvmError as error:
            return f"{error}"


def _debug(m: Any, control: int, *registers: int) -> None:
    if control:
        control |= kvm.KVM_GUESTDBG_ENABLE
    m.cpu.vcpu.set_guest_debug(control, registers)


def _run(m: Any) -> str:
    """Run on: "debug", "port", "end", or in words what else happened."""
    result = m.run(_SECONDS)
    if result.reason == "exit" and result.exit.reason == kvm.KVM_EXIT_DEBUG:
        return "debug"
    if result.reason == "unclaimed":
        return "port"
    if result.reason == "debug-exit":
        return "end"
    return f"the guest ended with {result.reason!r}"


def _stops_at(m: Any, what: str, address: int) -> str:
    """Run to a stop of the kind ``what`` at an address: "", or what came instead."""
    got = _run(m)
    if got == what:
        at = m.cpu.rip
        return "" if at == address else f"it stopped at {at:#x} instead of {address:#x}"
    return "it was not stopped" if got == "end" else got


def _ends_well(m: Any) -> str:
    """Run to the guest's end: "", or what a stop has spoiled."""
    got = _run(m)
    if got != "end":
        return f"after the stop it does not go on: {got}"
    if m.cpu.rax != _RAX or m.mem[_CELL] != 1:
        return "after the stop it goes on wrongly"
    return ""


def _hardware(m: Any) -> str:
    _debug(m, kvm.KVM_GUESTDBG_USE_HW_BP, _TARGET, 0, 0, 0, 0, 0, 0, 0x401)
    problem = _stops_at(m, "debug", _TARGET)
    if not problem:
        _debug(m, 0)
        problem = _ends_well(m)
    return problem


def _watch(m: Any) -> str:
    _debug(m, kvm.KVM_GUESTDBG_USE_HW_BP, _CELL, 0, 0, 0, 0, 0, 0, 0x401 | 1 << 16)
    problem = _stops_at(m, "debug", _ENTRY + 5)
    if not problem:
        if m.mem[_CELL] != 1:
            return "it stopped before the write"
        _debug(m, 0)
        problem = _ends_well(m)
    return problem


def _software(m: Any) -> str:
    _debug(m, kvm.KVM_GUESTDBG_USE_SW_BP)
    m.mem[_TARGET] = INT3
    problem = _stops_at(m, "debug", _TARGET)
    if not problem:
        m.mem[_TARGET] = 0x90
        problem = _ends_well(m)
    return problem


def _port(m: Any) -> str:
    m.mem[_TARGET] = IN_AL_DX
    problem = _stops_at(m, "port", _TARGET)
    if not problem:
        m.mem[_TARGET] = 0x90
        m.cpu._runner.complete()
        m.cpu.rip, m.cpu.rax = _TARGET, _RAX
        problem = _ends_well(m)
    return problem


def _step(m: Any) -> str:
    _debug(m, kvm.KVM_GUESTDBG_SINGLESTEP)
    for address in (_ENTRY + 1, _ENTRY + 2, _ENTRY + 5, _ENTRY + 6):
        problem = _stops_at(m, "debug", address)
        if problem:
            return problem
    _debug(m, 0)
    return _ends_well(m)


def _step_on(m: Any) -> str:
    import os

    # A write to an ioeventfd: emulated by every KVM, and no exit.
    doorbell = os.eventfd(0)
    try:
        m.vm.ioeventfd(_DOORBELL, 1, doorbell)
        m.cpu.rbx += _DOORBELL - _CELL
        if not m.cpu.cr0 & 1:
            m.cpu.rbx, m.cpu.ds.base = 0, _DOORBELL
        _debug(m, kvm.KVM_GUESTDBG_SINGLESTEP)
        for address in (_ENTRY + 1, _ENTRY + 2, _ENTRY + 5, _ENTRY + 6):
            problem = _stops_at(m, "debug", address)
            if problem:
                return problem
    finally:
        os.close(doorbell)
    return ""


_TRIES = {
    HARDWARE: _hardware,
    WATCH: _watch,
    SOFTWARE: _software,
    PORT: _port,
    STEP: _step,
    STEP_ON: _step_on,
}
