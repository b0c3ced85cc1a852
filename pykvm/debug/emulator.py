"""Unicorn in the state of a vCPU, going where KVM went: the other half of a comparison.

It is slow and forgets nothing: a copy of the guest's memory, one call of Unicorn an instruction.
"""

from __future__ import annotations

import struct

from pykvm.debug.disassembly import Instruction, bits_of, instruction
from pykvm.debug.instructions import registers
from pykvm.errors import CapabilityError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pykvm.cpu import Cpu
    from pykvm.debug.debugger import Debugger

CF, PF, AF, ZF, SF, OF = 1, 1 << 2, 1 << 4, 1 << 6, 1 << 7, 1 << 11
TF, IF, AC = 1 << 8, 1 << 9, 1 << 18
_ALL = CF | PF | AF | ZF | SF | OF
_COMPARED = _ALL | 1 << 10  # and DF

#: Flags that an instruction leaves undefined (SDM Vol. 1, appendix A).
_UNDEFINED = {
    "and": AF, "or": AF, "xor": AF, "test": AF, "andn": AF | PF, "mul": SF | ZF | AF | PF,
    "imul": SF | ZF | AF | PF, "div": _ALL, "idiv": _ALL, "bsf": _ALL & ~ZF, "bsr": _ALL & ~ZF,
    "shl": AF | OF | CF, "sal": AF | OF | CF, "shr": AF | OF | CF, "sar": AF | OF | CF,
    "shld": AF | OF | CF, "shrd": AF | OF | CF, "rol": OF, "ror": OF, "rcl": OF, "rcr": OF,
    "bt": _ALL & ~(CF | ZF), "bts": _ALL & ~(CF | ZF), "btr": _ALL & ~(CF | ZF),
    "btc": _ALL & ~(CF | ZF), "aaa": OF | SF | ZF | PF, "aas": OF | SF | ZF | PF,
    "aad": OF | AF | CF, "aam": OF | AF | CF, "daa": OF, "das": OF,
}  # fmt: skip

#: Instructions whose result is the platform's; control and debug registers are too.
_PLATFORM = ("in", "ins", "insb", "insd", "insw", "cpuid", "rdtsc", "rdtscp", "rdrand", "rdseed",
             "rdmsr", "rdpmc", "xgetbv", "smsw", "sgdt", "sidt", "str", "sldt")  # fmt: skip
_PREFIXES = ("lock", "rep", "repe", "repne", "repz", "repnz")
_SEGMENTS = ("cs", "ds", "es", "ss", "fs", "gs")
_TABLES = {"gdtr": "gdt", "idtr": "idt"}

ITERATIONS = 1 << 16
"""Of a repeated string instruction, how many are followed in one step; KVM emulates 1024."""
HANDLER = 10_000
"""Instructions of an interrupt's handler that are followed where KVM makes one step of it."""


class Emulator:
    """Unicorn, in the state of a vCPU, with a copy of its memory at the same addresses.

    Raises:
        CapabilityError: Unicorn is not installed, or cannot be put into that state.
    """

    def __init__(self, debugger: Debugger, cpu: Cpu) -> None:
        from importlib import import_module

        try:
            unicorn: Any = import_module("unicorn")
            self._x86: Any = import_module("unicorn.x86_const")
        except ImportError:
            text = "unicorn is not installed: pip install 'pykvm-vmm[emulator]'"
            raise CapabilityError(text) from None
        sregs = cpu.load_sregs()
        problem = obstacle(sregs)
        if problem:
            raise CapabilityError(problem)
        self._debugger, self._cpu, self._error = debugger, cpu, unicorn.UcError
        self._bits = bits_of(sregs)
        mode = {16: unicorn.UC_MODE_16, 32: unicorn.UC_MODE_32, 64: unicorn.UC_MODE_64}[self._bits]
        self._uc: Any = unicorn.Uc(unicorn.UC_ARCH_X86, mode)
        for region in cpu.memory.regions:
            # Only memory whose linear address is the guest-physical one can be shown.
            start, size = region.guest_phys_addr, region.memory_size
            if debugger.gpa(cpu, start) == start:
                self._uc.mem_map(start, size)
                with debugger.planted.lifted():
                    self._uc.mem_write(start, bytes(cpu.memory.read(start, size)))
        self._ids = {
            name: self._id(name if self._bits == 64 else "e" + name[1:])
            for name in (*registers(cpu), "rip")
            if name != "rflags" and (self._bits == 64 or not name[1:].isdigit())
        }
        self._ids["rflags"] = self._id("eflags")
        for name, table in _TABLES.items():
            at = getattr(sregs, table)
            self._uc.reg_write(self._id(name), (0, at.base, at.limit, 0))
        if self._bits == 16:
            for name in _SEGMENTS:
                self._uc.reg_write(self._id(name), getattr(sregs, name).selector)
        elif self._bits == 64:
            self._uc.reg_write(self._id("fs_base"), sregs.fs.base)
            self._uc.reg_write(self._id("gs_base"), sregs.gs.base)
        self._written: list[tuple[int, int]] = []
        self._vector: int | None = None
        self._last = ""
        self._hook(unicorn)
        self._put()

    def _id(self, name: str) -> int:
        number: int = getattr(self._x86, f"UC_X86_REG_{name.upper()}")
        return number

    def _hook(self, unicorn: Any) -> None:
        def interrupted(uc: Any, vector: int, data: object) -> None:
            self._vector = vector
            uc.emu_stop()

        def wrote(uc: Any, access: int, address: int, size: int, value: int, data: object) -> None:
            self._written.append((address, size))

        hook, ports = self._uc.hook_add, unicorn.UC_HOOK_INSN
        hook(unicorn.UC_HOOK_INTR, interrupted)
        hook(unicorn.UC_HOOK_MEM_WRITE, wrote)
        hook(ports, lambda uc, port, size, data: 0, None, 1, 0, self._x86.UC_X86_INS_IN)
        hook(ports, lambda uc, port, size, value, data: None, None, 1, 0, self._x86.UC_X86_INS_OUT)

    # ---- registers and memory --------------------------------------------------------------------

    def _get(self, name: str) -> int:
        value: int = self._uc.reg_read(self._ids[name])
        return value

    def _put(self) -> None:
        """Take the registers over from KVM."""
        for name, value in {**registers(self._cpu), "rip": self._cpu.rip}.items():
            if name in self._ids:
                self._uc.reg_write(self._ids[name], value & ~TF if name == "rflags" else value)

    def _store(self, address: int, data: bytes) -> None:
        self._uc.mem_write(address, data)
        self._uc.ctl_remove_cache(address, address + len(data))  # it may have been code

    def _place(self) -> tuple[int, int]:
        """CS in 16-bit code, and the instruction pointer."""
        if self._bits != 16:
            return 0, self._get("rip")
        return self._uc.reg_read(self._id("cs")), self._get("rip") & 0xFFFF

    def _place_of_kvm(self) -> tuple[int, int]:
        if self._bits != 16:
            return 0, self._cpu.rip
        return self._cpu.load_sregs().cs.selector, self._cpu.rip & 0xFFFF

    def is_outgrown(self) -> bool:
        """Whether the vCPU now executes code of other operands: another Unicorn must follow it."""
        return bits_of(self._cpu.load_sregs()) != self._bits

    # ---- steps -----------------------------------------------------------------------------------

    def step(self, done: Instruction) -> str:
        """Execute the instruction that KVM's last step began with: "", or why not.

        KVM's step may have been longer: all of a string instruction, where KVM emulates it; the
        instruction behind a load of SS, which holds traps back; an interrupt's handler up to
        behind its IRET, where the processor clears TF with it. Unicorn goes on to where KVM is.
        """
        begin = self._place()
        problem = self._execute(done.text)
        if done.text.startswith("rep"):
            for _ in range(ITERATIONS):
                if problem or not self._lags(begin):
                    break
                problem = self._execute(done.text)
        elif self._vector is not None:
            problem = problem or self._follow(HANDLER, handler=True)
        elif _holds_traps_back(done.text):
            problem = problem or self._follow(1)
        return problem

    def _lags(self, begin: tuple[int, int]) -> bool:
        """Whether a string instruction that began there is further on KVM."""
        if self._place() != begin:
            return False
        return self._place_of_kvm() != begin or self._get("rcx") > self._kvm("rcx")

    def _kvm(self, name: str) -> int:
        value: int = getattr(self._cpu, name)
        return value & (1 << max(32, self._bits)) - 1

    def _follow(self, limit: int, handler: bool = False) -> str:
        """Go on to where KVM is, by so many instructions at most; else stay, for they differ."""
        sregs = self._cpu.load_sregs()
        here, last = self._uc.context_save(), self._last
        for _ in range(limit + 1):
            place = self._place()
            if place == self._place_of_kvm() and self._get("rsp") == self._kvm("rsp"):
                return ""
            address = place[0] * 16 + place[1]
            now = instruction(self._cpu.memory, sregs, address, self._debugger.planted)
            if handler and _is_platform(now.text):
                return (
                    f"an interrupt's handler is one step on this KVM: what {now.text!r} at "
                    f"{address:#x} got is not known"
                )
            if self._execute(now.text):
                break
        self._uc.context_restore(here)
        self._last = last
        return ""

    def _execute(self, text: str) -> str:
        cs, ip = self._place()
        begin = cs * 16 + ip
        self._written.clear()
        self._vector = None
        self._last = text
        try:
            self._uc.emu_start(begin, (1 << 64) - 1, count=1)
        except self._error as error:
            return f"{error} at {begin:#x}: {text}"
        if self._vector is not None:
            problem = self._interrupt(self._vector)
            return f"{problem} at {begin:#x}: {text}" if problem else ""
        name = _name(text)
        if _is_platform(text) and not name.startswith("ins"):  # that has its answer in memory only
            self._put()
        if _is_platform(text) or name.startswith("pushf"):  # with the TF of our steps
            memory = self._cpu.memory
            for address, size in self._written:
                if memory.covers(address, size):
                    self._store(address, memory.read(address, size))
        flags = self._get("rflags")
        if flags & TF:
            self._uc.reg_write(self._ids["rflags"], flags & ~TF)
        return ""

    def _interrupt(self, vector: int) -> str:
        """Interrupt or exception in real mode (SDM Vol. 3A §21.1.4): "", or why not."""
        if self._bits != 16 or self._uc.reg_read(self._id("cr0")) & 1:
            return f"Unicorn is not followed through interrupt {vector:#x} in protected mode"
        _, base, limit, _ = self._uc.reg_read(self._id("idtr"))
        if 4 * vector + 3 > limit:
            return f"interrupt {vector:#x} is behind the end of the vector table"
        cs, ip = self._place()
        esp, flags = self._get("rsp"), self._get("rflags")
        stack = self._uc.reg_read(self._id("ss")) * 16
        try:
            for word in (flags, cs, ip):
                esp = esp & ~0xFFFF | esp - 2 & 0xFFFF
                self._store(stack + (esp & 0xFFFF), struct.pack("<H", word & 0xFFFF))
            ip, cs = struct.unpack("<HH", self._uc.mem_read(base + 4 * vector, 4))
        except self._error as error:
            return f"interrupt {vector:#x}: {error}"
        for name, value in (("cs", cs), ("esp", esp), ("eip", ip)):
            self._uc.reg_write(self._id(name), value)
        self._uc.reg_write(self._ids["rflags"], flags & ~(IF | TF | AC))
        return ""

    def differences(self) -> dict[str, tuple[int, int]]:
        """Registers that differ; undefined flags are taken over from KVM."""
        compared = _COMPARED & ~_UNDEFINED.get(_name(self._last), 0)
        kvm = {**registers(self._cpu), "rip": self._cpu.rip}
        found = {}
        for name, number in self._ids.items():
            mask = 0xFFFF if name == "rip" and self._bits == 16 else (1 << max(32, self._bits)) - 1
            mine, its = kvm[name] & mask, self._get(name) & mask
            if name == "rflags":
                self._uc.reg_write(number, its & compared | mine & ~compared & ~TF)
                mine, its = mine & compared, its & compared
            if mine != its:
                found[name] = mine, its
        if self._bits == 16:
            sregs = self._cpu.load_sregs()
            for name in _SEGMENTS:
                mine, its = getattr(sregs, name).selector, self._uc.reg_read(self._id(name))
                if mine != its:
                    found[name] = mine, its
        return found


def obstacle(sregs: Any) -> str:
    """Why Unicorn cannot begin with these segments: "" if it can. It takes no descriptors."""
    bits = bits_of(sregs)
    if bits == 64:
        return ""
    if bits == 16 and sregs.cr0 & 1:
        return "Unicorn cannot begin in 16-bit protected mode"
    for name in _SEGMENTS:
        segment = getattr(sregs, name)
        if segment.base != (segment.selector << 4 if bits == 16 else 0):
            rule = "of its selector times 16" if bits == 16 else "of 0"
            return (
                f"{name} has base {segment.base:#x} with selector {segment.selector:#x}: "
                f"here Unicorn knows no other base than one {rule}"
            )
    return ""


def _is_platform(text: str) -> bool:
    name = _name(text)
    source = text.rpartition(", ")[2]
    return name in _PLATFORM or (name == "mov" and source[:2] in ("cr", "dr"))


def _holds_traps_back(text: str) -> bool:
    return text.startswith(("mov ss,", "pop ss", "lss "))


def _name(text: str) -> str:
    """The mnemonic, without its prefixes."""
    words = text.split()
    while len(words) > 1 and words[0] in _PREFIXES:
        words.pop(0)
    return words[0] if words else ""
