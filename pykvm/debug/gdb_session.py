"""A conversation with gdb: packets in, what they ask of the machine, answers out.

Threads are vCPUs: thread 1 is vCPU 0. All of them stand still whenever one is stopped. Nothing
that comes in raises: what makes no sense is answered with an error, what is not known with nothing,
as the protocol wants it.
"""

from __future__ import annotations

from pykvm.debug import probe
from pykvm.debug.disassembly import bits_of
from pykvm.debug.gdb_packets import SIZE, number, numbers, unhex
from pykvm.debug.gdb_registers import Bank, Register, description, layout
from pykvm.errors import CapabilityError, PykvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pykvm.cpu import Cpu
    from pykvm.debugging import Debugging
    from pykvm.result import RunResult

SIGINT, SIGILL, SIGTRAP, SIGABRT, SIGSEGV = 2, 4, 5, 6, 11
_OK = b"OK"
_SIGNALS = {
    "internal-error": SIGILL, "failed-entry": SIGILL, "panic": SIGABRT, "shutdown": SIGSEGV,
    "stopped": SIGINT, "interrupted": SIGINT, "timeout": SIGINT,
}  # fmt: skip
_ENDS = ("halted", "power-off", "reboot", "debug-exit")
HELP = "help, ways (how this KVM can stop the guest), registers (control and segment registers)\n"


class Session:
    """One connection's state.

    Args:
        machine: the machine, which nobody else runs meanwhile.
        resume: runs it: called with a function that does, from which it may be interrupted.

    Attributes:
        acks: whether packets are still acknowledged.
        over: gdb has left: ``"detached"`` or ``"killed"``; the guest has ended: ``"ended"``.
        result: of the last run, or None.
    """

    def __init__(
        self, machine: Debugging, resume: Callable[[Callable[[], RunResult]], RunResult]
    ) -> None:
        self._m = machine
        self._resume = resume
        self._debugger = machine.debugger
        booted = machine.pc is not None and machine.pc.is_linux
        self._bits = 64 if booted else max(32, bits_of(machine.cpus[0].load_sregs()))
        self._registers = layout(self._bits)
        self._thread = 0  # of registers and memory
        self._stopped = b"T05thread:1;"
        self._points: dict[tuple[int, int, int], Any] = {}
        self._says_swbreak = False
        self.acks = True
        self.over = ""
        self.result: RunResult | None = None
        self._raised: Exception | None = None  # by what the script has the guest's exits served by

    @property
    def _cpu(self) -> Cpu:
        return self._m.cpus[self._thread]

    def answer(self, packet: bytes) -> list[bytes]:
        """The answers to a packet: payloads, in order.

        Raises:
            Exception: what a handler, a hook or a condition of a breakpoint raised.
        """
        try:
            return self._answer(packet)
        except (ValueError, LookupError, OverflowError, PykvmError) as error:
            if error is self._raised:
                raise
            return [b"E01"]

    def close(self) -> None:
        """Take away what gdb had put in."""
        for point in self._points.values():
            point.delete()
        self._points.clear()

    def _answer(self, packet: bytes) -> list[bytes]:
        kind, rest = packet[:1], packet[1:]
        simple = _SIMPLE.get(kind)
        if simple is not None:
            return [simple(self, rest)]
        if kind in (b"c", b"s", b"C", b"S"):
            return self._old_resume(kind.lower(), rest)
        if packet.startswith(b"vCont;"):
            return self._vcont(packet[6:])
        for name, answer in _NAMED:
            if packet.startswith(name):
                given = answer(self, packet[len(name) :])
                return given if isinstance(given, list) else [given]
        return [b""]

    # ---- who and what ----------------------------------------------------------------------------

    def _supported(self, rest: bytes) -> bytes:
        self._says_swbreak = b"swbreak+" in rest
        return (
            b"PacketSize=%x;qXfer:features:read+;vContSupported+;swbreak+;hwbreak+"
            b";QStartNoAckMode+" % SIZE
        )

    def _no_acks(self, rest: bytes) -> bytes:
        self.acks = False
        return _OK

    def _features(self, rest: bytes) -> bytes:
        name, _, where = rest.partition(b":")
        if name != b"target.xml":
            return b"E00"
        offset, length = numbers(where, 2)
        text = description(self._bits).encode()
        piece = text[offset : offset + min(length, SIZE // 2)]
        return (b"m" if offset + len(piece) < len(text) else b"l") + piece

    def _threads(self, rest: bytes) -> bytes:
        return b"m" + b",".join(b"%x" % (cpu.index + 1) for cpu in self._m.cpus)

    def _thread_of(self, text: bytes) -> int:
        """Index of the vCPU of a thread id; 0 and -1, "any" and "all", are the current one."""
        if text in (b"-1", b"0", b""):
            return self._thread
        index = number(text) - 1
        if not 0 <= index < len(self._m.cpus):
            raise ValueError(f"there is no thread {text!r}")
        return index

    def _select(self, rest: bytes) -> bytes:
        index = self._thread_of(rest[1:])
        if rest[:1] == b"g":
            self._thread = index
        return _OK

    def _alive(self, rest: bytes) -> bytes:
        self._thread_of(rest)
        return _OK

    def _about(self, rest: bytes) -> bytes:
        cpu = self._m.cpus[self._thread_of(rest)]
        name = self._m.symbols.name(cpu.rip)
        text = f"vcpu {cpu.index}, {probe.mode_of(cpu.load_sregs())}{' ' + name if name else ''}"
        return text.encode().hex().encode()

    def _monitor(self, rest: bytes) -> list[bytes]:
        command = unhex(rest).decode("utf-8", "replace").strip()
        if command == "ways":
            mode = probe.mode_of(self._cpu.load_sregs())
            lines = [
                f"{mode}, {way}: {self._debugger.obstacle(way, self._cpu) or 'works'}\n"
                for way in probe.WAYS
            ]
            text = "".join(lines)
        elif command in ("registers", "regs"):
            text = f"{self._cpu.sregs}\n"
        else:
            text = HELP
        return [*_console(text), _OK]

    # ---- registers and memory --------------------------------------------------------------------

    def _read_all(self, rest: bytes) -> bytes:
        bank = Bank(self._cpu)
        return b"".join(bank.read(register) for register in self._registers).hex().encode()

    def _write_all(self, rest: bytes) -> bytes:
        data, at, wanted = unhex(rest), 0, []
        for register in self._registers:
            piece = data[at : at + register.size]
            if len(piece) == register.size:
                wanted.append((register, piece))
            at += register.size
        return self._set(wanted)

    def _read_one(self, rest: bytes) -> bytes:
        return Bank(self._cpu).read(self._registers[number(rest)]).hex().encode()

    def _write_one(self, rest: bytes) -> bytes:
        which, _, value = rest.partition(b"=")
        register, data = self._registers[number(which)], unhex(value)
        if len(data) != register.size:
            raise ValueError(f"{register.name} has {register.size} bytes")
        return self._set([(register, data)])

    def _set(self, wanted: list[tuple[Register, bytes]]) -> bytes:
        """Set registers now: what KVM refuses is an error of the packet, and changes none."""
        bank = Bank(self._cpu)
        before = [(register, bank.read(register)) for register, _ in wanted]
        try:
            bank.set(wanted)
        except (ValueError, PykvmError):
            bank.set(before)
            raise
        return _OK

    def _pieces(self, address: int, length: int) -> list[tuple[int, int]]:
        """Guest-physical pieces of a linear range, page by page, up to what is not RAM."""
        pieces = []
        mask = (1 << 64) - 1
        while length > 0:
            here = address & mask
            gpa = self._debugger.gpa(self._cpu, here)
            if gpa is None:
                gpa = self._m._kernel_gpa(here)
            if gpa is None:
                break
            size = min(length, 0x1000 - here % 0x1000)
            pieces.append((gpa, size))
            address, length = address + size, length - size
        return pieces

    def _read_memory(self, rest: bytes) -> bytes:
        address, length = numbers(rest, 2)
        data = b""
        for gpa, size in self._pieces(address, min(length, SIZE // 2)):
            data += self._debugger.planted.hide(gpa, self._m.memory.read(gpa, size))
        if length and not data:
            raise ValueError(f"nothing is mapped at {address:#x}")
        return data.hex().encode()

    def _write_memory(self, rest: bytes, binary: bool = False) -> bytes:
        where, _, text = rest.partition(b":")
        address, length = numbers(where, 2)
        data = text if binary else unhex(text)
        if len(data) != length:
            raise ValueError(f"{length} bytes are said, {len(data)} given")
        pieces = self._pieces(address, length)
        if sum(size for _, size in pieces) != length:
            raise ValueError(f"{length} bytes at {address:#x}: not all of it is mapped")
        at = 0
        for gpa, size in pieces:
            self._m.memory.load(gpa, data[at : at + size])
            self._debugger.planted.wrote(gpa, data[at : at + size])
            at += size
        return _OK

    # ---- breakpoints -----------------------------------------------------------------------------

    def _insert(self, rest: bytes) -> bytes:
        kind, address, length = numbers(rest.split(b";")[0], 3)
        key = kind, address, length
        if key in self._points:
            return _OK
        if kind in (0, 1):
            how = "auto"
            if kind == 1 and not self._debugger.obstacle(probe.HARDWARE, self._cpu):
                how = probe.HARDWARE
            gpa = self._debugger.gpa(self._cpu, address)
            if gpa is None:
                gpa = self._m._kernel_gpa(address)
            point: Any = self._debugger.breakpoint(address, how=how, gpa=gpa, cpu=self._cpu)
        elif kind in (2, 4):
            access = "w" if kind == 2 else "rw"
            point = self._debugger.watch(address, length, access, cpu=self._cpu)
        else:
            return b""  # reads alone are nothing that the processor can watch
        self._points[key] = point
        return _OK

    def _remove(self, rest: bytes) -> bytes:
        kind, address, length = numbers(rest.split(b";")[0], 3)
        point = self._points.pop((kind, address, length), None)
        if point is not None:
            point.delete()
        return _OK

    # ---- running ---------------------------------------------------------------------------------

    def _old_resume(self, kind: bytes, rest: bytes) -> list[bytes]:
        if b";" in rest:
            rest = rest.partition(b";")[2]
        elif kind in (b"C", b"S"):
            rest = b""
        if rest and len(rest) > 2:
            self._cpu.rip = number(rest)
        return self._go(self._thread if kind == b"s" else None)

    def _vcont(self, rest: bytes) -> list[bytes]:
        """One thread to step: then the others stand still. Else all go on."""
        for action in rest.split(b";"):
            verb, _, thread = action.partition(b":")
            if verb[:1] in (b"s", b"S"):
                return self._go(self._thread_of(thread))
            if verb[:1] not in (b"c", b"C"):
                raise ValueError(f"vCont: {action!r}")
        return self._go(None)

    def _go(self, step: int | None) -> list[bytes]:
        try:
            if step is None:
                result = self._resume(self._m.run)
            else:
                result = self._resume(lambda: self._m.step(cpu=step, timeout=None))
        except CapabilityError as error:
            return [*_console(f"{error}\n"), b"E01"]
        except Exception as error:
            self._raised = error
            raise
        self.result = result
        self._thread = result.cpu
        return self._told(result)

    def _told(self, result: RunResult) -> list[bytes]:
        """The stop as gdb is told of it; before that, in words, what it has no word for."""
        if result.reason in _ENDS or (result.reason == "stopped" and result.code is not None):
            self.over = "ended"
            return [b"W%02x" % ((result.code or 0) & 0xFF)]
        before = []
        if result.reason not in ("breakpoint", "watchpoint", "step", "stopped", "interrupted"):
            before = _console(f"{result.error or result}\n")
        text = b"T%02xthread:%x;" % (_SIGNALS.get(result.reason, SIGTRAP), result.cpu + 1)
        point = getattr(result.exit, "point", None)
        if result.reason == "watchpoint" and point is not None:
            text += b"%s:%x;" % (b"watch" if point.access == "w" else b"awatch", point.address)
        elif result.reason == "breakpoint" and self._says_swbreak:
            hardware = point is not None and point.way == probe.HARDWARE
            text += b"hwbreak:;" if hardware else b"swbreak:;"
        self._stopped = text
        return [*before, text]

    def _detach(self, rest: bytes) -> bytes:
        self.close()
        self.over = "detached"
        return _OK

    def _kill(self, rest: bytes) -> bytes:
        self.close()
        self.over = "killed"
        return _OK


def _console(text: str) -> list[bytes]:
    raw = text.encode()
    step = SIZE // 2 - 8
    return [b"O" + raw[at : at + step].hex().encode() for at in range(0, len(raw), step)]


_SIMPLE: dict[bytes, Callable[[Session, bytes], bytes]] = {
    b"?": lambda session, rest: session._stopped,
    b"g": Session._read_all,
    b"G": Session._write_all,
    b"p": Session._read_one,
    b"P": Session._write_one,
    b"m": Session._read_memory,
    b"M": Session._write_memory,
    b"X": lambda session, rest: session._write_memory(rest, binary=True),
    b"H": Session._select,
    b"T": Session._alive,
    b"Z": Session._insert,
    b"z": Session._remove,
    b"D": Session._detach,
    b"k": Session._kill,
}
_NAMED: tuple[tuple[bytes, Callable[[Session, bytes], Any]], ...] = (
    (b"qSupported", Session._supported),
    (b"QStartNoAckMode", Session._no_acks),
    (b"qXfer:features:read:", Session._features),
    (b"qfThreadInfo", Session._threads),
    (b"qsThreadInfo", lambda session, rest: b"l"),
    (b"qThreadExtraInfo,", Session._about),
    (b"qC", lambda session, rest: b"" if rest else b"QC%x" % (session._thread + 1)),
    (b"qAttached", lambda session, rest: b"1"),
    (b"qSymbol", lambda session, rest: _OK),
    (b"qRcmd,", Session._monitor),
    (b"vCont?", lambda session, rest: b"vCont;c;C;s;S"),
    (b"vKill", Session._kill),
)
