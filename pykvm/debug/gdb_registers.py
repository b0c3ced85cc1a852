"""Registers as gdb wants them: descriptions (target.xml), and the bytes of ``g`` and ``p``.

The features are gdb's own, ``org.gnu.gdb.i386.*`` ("Debugging with GDB", G.5.8), whose registers
and order they fix, and one of ours for control registers.
"""

from __future__ import annotations

from pykvm.debug import floating

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from pykvm.cpu import Cpu

_GENERAL64 = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", "r8", "r9", "r10", "r11",
              "r12", "r13", "r14", "r15", "rip")  # fmt: skip
_GENERAL32 = ("eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi", "eip")
_SEGMENTS = ("cs", "ss", "ds", "es", "fs", "gs")
_FPU = ("fctrl", "fstat", "ftag", "fiseg", "fioff", "foseg", "fooff", "fop")
_SYSTEM = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer")
_POINTERS = {"rip": "code_ptr", "eip": "code_ptr", "rsp": "data_ptr", "esp": "data_ptr",
             "rbp": "data_ptr", "ebp": "data_ptr"}  # fmt: skip
_VECTOR = """
  <vector id="v4f" type="ieee_single" count="4"/>
  <vector id="v2d" type="ieee_double" count="2"/>
  <vector id="v16i8" type="int8" count="16"/>
  <vector id="v8i16" type="int16" count="8"/>
  <vector id="v4i32" type="int32" count="4"/>
  <vector id="v2i64" type="int64" count="2"/>
  <union id="vec128">
    <field name="v4_float" type="v4f"/>
    <field name="v2_double" type="v2d"/>
    <field name="v16_int8" type="v16i8"/>
    <field name="v8_int16" type="v8i16"/>
    <field name="v4_int32" type="v4i32"/>
    <field name="v2_int64" type="v2i64"/>
    <field name="uint128" type="uint128"/>
  </union>"""


class Register:
    """One register: its name, how many bytes gdb gives it, and the feature that it belongs to."""

    __slots__ = ("feature", "name", "size", "type")

    def __init__(self, name: str, size: int, type: str, feature: str) -> None:
        self.name, self.size, self.type, self.feature = name, size, type, feature


def layout(bits: int) -> list[Register]:
    """The registers of a processor of 32 or 64 bits, in gdb's order."""
    core, sse = "org.gnu.gdb.i386.core", "org.gnu.gdb.i386.sse"
    word = bits // 8
    found = [
        Register(name, word, _POINTERS.get(name, f"int{bits}"), core)
        for name in (_GENERAL64 if bits == 64 else _GENERAL32)
    ]
    found.append(Register("eflags", 4, "int32", core))
    found += [Register(name, 4, "int32", core) for name in _SEGMENTS]
    found += [Register(f"st{n}", 10, "i387_ext", core) for n in range(8)]
    found += [Register(name, 4, "int", core) for name in _FPU]
    found += [Register(f"xmm{n}", 16, "vec128", sse) for n in range(16 if bits == 64 else 8)]
    found.append(Register("mxcsr", 4, "int", sse))
    if bits == 64:
        segments = "org.gnu.gdb.i386.segments"
        found += [Register(name, 8, "int", segments) for name in ("fs_base", "gs_base")]
    return found + [Register(name, 8, "int", "org.pykvm.system") for name in _SYSTEM]


def description(bits: int) -> str:
    """target.xml."""
    arch = "i386:x86-64" if bits == 64 else "i386"
    lines = ['<?xml version="1.0"?>', '<!DOCTYPE target SYSTEM "gdb-target.dtd">',
             '<target version="1.0">', f"<architecture>{arch}</architecture>"]  # fmt: skip
    feature = ""
    for register in layout(bits):
        if register.feature != feature:
            if feature:
                lines.append("</feature>")
            feature = register.feature
            lines.append(f'<feature name="{feature}">{_VECTOR if "sse" in feature else ""}')
        lines.append(
            f'  <reg name="{register.name}" bitsize="{8 * register.size}" type="{register.type}"/>'
        )
    return "\n".join([*lines, "</feature>", "</target>", ""])


class Bank:
    """The registers of one vCPU, to read and to write.

    What KVM keeps together is fetched once; :meth:`set` writes back what was changed.
    """

    def __init__(self, cpu: Cpu) -> None:
        self._cpu = cpu
        self._fpu: Any = None
        self._fpu_changed = False

    def _floating(self) -> Any:
        if self._fpu is None:
            self._fpu = self._cpu.vcpu.get_fpu()
        return self._fpu

    def read(self, register: Register) -> bytes:
        """Its bytes."""
        name, size = register.name, register.size
        if name.startswith("st"):
            return bytes(self._floating().fpr[int(name[2:])])[:10]
        if name.startswith("xmm"):
            return bytes(self._floating().xmm[int(name[3:])])
        return (self._value(name) & (1 << 8 * size) - 1).to_bytes(size, "little")

    def _value(self, name: str) -> int:
        cpu: Any = self._cpu
        if name in _SEGMENTS:
            return int(getattr(cpu, name).selector)
        if name.endswith("_base"):
            return int(getattr(cpu, name[:2]).base)
        if name == "eflags":
            return int(cpu.rflags)
        if name in _FPU or name == "mxcsr":
            return self._control(name)
        return int(getattr(cpu, name))

    def _control(self, name: str) -> int:
        fpu = self._floating()
        if name == "ftag":  # two bits a register: 0 valid, 3 empty; KVM has one
            return sum((0 if fpu.ftwx >> n & 1 else 3) << 2 * n for n in range(8))
        plain = {"fctrl": "fcw", "fstat": "fsw", "fop": "last_opcode", "fioff": "last_ip",
                 "fooff": "last_dp", "mxcsr": "mxcsr"}  # fmt: skip
        return int(getattr(fpu, plain[name])) if name in plain else 0

    def write(self, register: Register, data: bytes) -> None:
        """Set it; a segment register's selector only, without loading a descriptor."""
        name, value = register.name, int.from_bytes(data, "little")
        cpu: Any = self._cpu
        if name.startswith(("st", "xmm")):
            fpu = self._floating()
            row = fpu.fpr[int(name[2:])] if name[0] == "s" else fpu.xmm[int(name[3:])]
            for n, byte in enumerate(data):
                row[n] = byte
            self._fpu_changed = True
        elif name in _SEGMENTS:
            if getattr(cpu, name).selector != value & 0xFFFF:
                getattr(cpu, name).selector = value & 0xFFFF
        elif name.endswith("_base"):
            if getattr(cpu, name[:2]).base != value:
                getattr(cpu, name[:2]).base = value
        elif name in ("fctrl", "fstat", "mxcsr", "ftag"):
            fpu = self._floating()
            if name == "ftag":
                fpu.ftwx = sum((value >> 2 * n & 3 != 3) << n for n in range(8))
            else:
                short = {"fctrl": "fcw", "fstat": "fsw"}.get(name)
                setattr(fpu, short or name, value & 0xFFFF if short else value)
            self._fpu_changed = True
        elif name == "cr8" and value > 15:
            raise ValueError(f"CR8 has four bits, not {value:#x}")  # only KVM_RUN would refuse it
        elif name not in _FPU:
            whole = "rflags" if name == "eflags" else name
            if getattr(cpu, whole) != value:
                setattr(cpu, whole, value)

    def set(self, wanted: Iterable[tuple[Register, bytes]]) -> None:
        """Set registers, and tell KVM.

        Raises:
            ValueError, PykvmError: no processor can have that.
        """
        for register, data in wanted:
            self.write(register, data)
        self._cpu.flush()
        if self._fpu_changed:
            floating.set_fpu(self._cpu.vcpu, self._fpu)
            self._fpu_changed = False
