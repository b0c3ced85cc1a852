"""The same guest on KVM and on Unicorn (the extra ``pykvm-vmm[emulator]``), step by step.

KVM makes a step, then Unicorn makes it too, and the general registers are compared. What neither
the guest nor the emulator decides is taken over from KVM: what ports and devices answer, time,
CPUID, and the flags that an instruction leaves undefined.
"""

from __future__ import annotations

from pykvm.debug.disassembly import bits_of
from pykvm.debug.instructions import Executed, Recorder, registers
from pykvm.debug.stops import STEP, Stop
from pykvm.errors import CapabilityError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pykvm.cpu import Cpu
    from pykvm.debug.debugger import Debugger
    from pykvm.result import RunResult

CF, PF, AF, ZF, SF, OF = 1, 1 << 2, 1 << 4, 1 << 6, 1 << 7, 1 << 11
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

#: Instructions whose result is the platform's.
_PLATFORM = ("in", "ins", "insb", "insd", "insw", "cpuid", "rdtsc", "rdtscp", "rdrand", "rdseed",
             "rdmsr", "rdpmc", "xgetbv", "smsw", "sgdt", "sidt", "str", "sldt")  # fmt: skip


class Comparison:
    """How far both went together.

    Attributes:
        steps: instructions that both executed with the same result.
        divergence: the first that they did not, or None.
        differs: of that one, register → (KVM's value, Unicorn's).
        error: what Unicorn cannot do, in its words, or "".
        result: how KVM's run ended.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.divergence: Executed | None = None
        self.differs: dict[str, tuple[int, int]] = {}
        self.error = ""
        self.result: RunResult | None = None

    @property
    def same(self) -> bool:
        """Whether they never differed."""
        return self.divergence is None and not self.error

    def __repr__(self) -> str:
        text = f"<Comparison: {self.steps} steps the same"
        if self.error:
            text += f", then Unicorn stops: {self.error}"
        if self.divergence is not None:
            told = ", ".join(
                f"{name} {kvm:#x} on KVM, {other:#x} on Unicorn"
                for name, (kvm, other) in self.differs.items()
            )
            text += f", then {self.divergence.instruction!r}: {told}"
        return text + ">"


def compare(
    debugger: Debugger, cpu: Cpu, limit: int, stepping: Callable[[Any], RunResult]
) -> Comparison:
    """See ``Machine.compare_with_unicorn``; ``stepping(look)`` runs by single steps."""
    done = Comparison()
    recorder = Recorder(debugger, cpu, limit)
    other = _Emulator(debugger, cpu)

    def look(cpu: Cpu) -> Stop | None:
        recorder.note(cpu)
        last = recorder.executed.pop()
        kvm = {**registers(cpu), "rip": cpu.rip}
        done.error = other.step(last.text, kvm)
        if not done.error:
            done.differs = other.differences(last.text, kvm)
            if done.differs:
                done.divergence = last
            else:
                done.steps += 1
        if done.error or done.differs or done.steps >= limit:
            return Stop(STEP, cpu.index, debugger.address(cpu))
        return None

    done.result = stepping(look)
    return done


class _Emulator:
    """Unicorn, in the state of a vCPU, with a copy of its memory at the same addresses."""

    def __init__(self, debugger: Debugger, cpu: Cpu) -> None:
        from importlib import import_module

        try:
            unicorn: Any = import_module("unicorn")
            x86_const: Any = import_module("unicorn.x86_const")
        except ImportError:
            text = "unicorn is not installed: pip install 'pykvm-vmm[emulator]'"
            raise CapabilityError(text) from None
        self._error = unicorn.UcError
        sregs = cpu.load_sregs()
        self._bits = bits_of(sregs)
        mode = {16: unicorn.UC_MODE_16, 32: unicorn.UC_MODE_32, 64: unicorn.UC_MODE_64}[self._bits]
        self._uc: Any = unicorn.Uc(unicorn.UC_ARCH_X86, mode)
        self._base = 0 if self._bits == 64 else sregs.cs.base
        for region in cpu.memory.regions:
            if not _is_flat(debugger, cpu, region.guest_phys_addr):
                continue
            start, size = region.guest_phys_addr, region.memory_size
            self._uc.mem_map(start, size)
            with debugger.planted.lifted():
                self._uc.mem_write(start, bytes(cpu.memory.read(start, size)))
        self._ids = {
            name: getattr(x86_const, f"UC_X86_REG_{name.upper()}")
            for name in (*registers(cpu), "rip")
            if name != "rflags"
        }
        self._ids["rflags"] = x86_const.UC_X86_REG_EFLAGS
        if self._bits != 64:
            names = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", "rip")
            self._ids = {
                name: getattr(x86_const, f"UC_X86_REG_E{name[1:].upper()}") for name in names
            }
            self._ids["rflags"] = x86_const.UC_X86_REG_EFLAGS
        if self._bits == 16:
            for name in ("cs", "ds", "es", "ss", "fs", "gs"):
                selector = getattr(sregs, name).selector
                self._uc.reg_write(getattr(x86_const, f"UC_X86_REG_{name.upper()}"), selector)
        elif self._bits == 64:
            self._uc.reg_write(x86_const.UC_X86_REG_FS_BASE, sregs.fs.base)
            self._uc.reg_write(x86_const.UC_X86_REG_GS_BASE, sregs.gs.base)
        self._uc.hook_add(
            unicorn.UC_HOOK_INSN, lambda uc, port, size, data: 0, None, 1, 0,
            x86_const.UC_X86_INS_IN,
        )  # fmt: skip
        self._uc.hook_add(
            unicorn.UC_HOOK_INSN, lambda uc, port, size, value, data: None, None, 1, 0,
            x86_const.UC_X86_INS_OUT,
        )  # fmt: skip
        self._put({**registers(cpu), "rip": cpu.rip})

    def _put(self, values: dict[str, int]) -> None:
        for name, number in self._ids.items():
            if name in values:
                self._uc.reg_write(number, values[name])

    def step(self, text: str, kvm: dict[str, int]) -> str:
        """Execute one instruction: "", or why not."""
        begin = self._base + self._uc.reg_read(self._ids["rip"])
        try:
            self._uc.emu_start(begin, (1 << 64) - 1, count=1)
        except self._error as error:
            return f"{error} at {begin:#x}: {text}"
        if _name(text) in _PLATFORM:
            self._put(kvm)
        return ""

    def differences(self, text: str, kvm: dict[str, int]) -> dict[str, tuple[int, int]]:
        """Registers that differ; undefined flags are taken over from KVM."""
        compared = _COMPARED & ~_UNDEFINED.get(_name(text), 0)
        found = {}
        mask = (1 << max(32, self._bits)) - 1
        for name, number in self._ids.items():
            mine, its = kvm[name] & mask, self._uc.reg_read(number) & mask
            if name == "rflags":
                self._uc.reg_write(number, its & compared | mine & ~compared)
                mine, its = mine & compared, its & compared
            if mine != its:
                found[name] = mine, its
        return found


def _name(text: str) -> str:
    """The mnemonic, without its prefixes."""
    words = text.split()
    while len(words) > 1 and words[0] in ("lock", "rep", "repe", "repne", "repz", "repnz"):
        words.pop(0)
    return words[0] if words else ""


def _is_flat(debugger: Debugger, cpu: Cpu, gpa: int) -> bool:
    """Whether the linear address is the guest-physical one: only such memory can be shown."""
    return debugger.gpa(cpu, gpa) == gpa
