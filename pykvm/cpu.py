"""A vCPU as its registers: ``cpu.rax``, ``cpu.al``, ``cpu.cs.base``, ``cpu.cr0``, ``cpu.msr[…]``.

Registers live in the run page that KVM shares with us (KVM_CAP_SYNC_REGS, api.rst 5.): the first
one that is read after an exit costs an ioctl and asks KVM to leave them there at every later exit;
a changed one is marked, and KVM takes it over on the next entry. Registers that nobody asks for
cost nothing.
"""

from __future__ import annotations

from _thread import get_ident

from pykvm._abi import ffi, lib
from pykvm._abi._cpython import GeneralRegisters
from pykvm.errors import BusyError, ClosedError
from pykvm.kvm.ioctl import call
from pykvm.registers import Control, SegmentSlot, TableSlot
from pykvm.result import CpuState
from pykvm.vcpu_thread import Runner

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pykvm.arch.x86_64.modes import Entry
    from pykvm.arch.x86_64.rules import Finding
    from pykvm.arch.x86_64.walk import Walk
    from pykvm.kvm import Vcpu
    from pykvm.memory import GuestMemory

REGS: int = lib.KVM_SYNC_X86_REGS
SREGS: int = lib.KVM_SYNC_X86_SREGS
_NOT_STARTED = (lib.KVM_MP_STATE_UNINITIALIZED, lib.KVM_MP_STATE_INIT_RECEIVED)
EVENTS: int = lib.KVM_SYNC_X86_EVENTS


class Cpu(GeneralRegisters):
    """One vCPU of a machine.

    Registers read and write as integers; a smaller part of one behaves as the hardware has it
    (writing ``eax`` clears the upper half of ``rax``, writing ``al`` leaves the rest).

    A vCPU that is stopped may be used from any thread. While it runs, only handlers that run in
    its own thread may touch it; others get a :class:`~pykvm.errors.BusyError`.

    Attributes:
        index: 0 for the first.
        entered: whether :meth:`enter` or a register write made it ready to run.
        ended: why it cannot go on (a triple fault, say) until :meth:`enter`, or "".
    """

    __slots__ = (
        "_gigapages", "_power_on", "_regs", "_regs_at", "_run", "_runner", "_sregs", "_sregs_at",
        "_supported", "_vcpu", "ended", "index", "memory",
    )  # fmt: skip

    def __init__(
        self,
        index: int,
        vcpu: Vcpu,
        runner: Runner,
        memory: GuestMemory,
        supported: list[Any],
        gigapages: bool,
        power_on: dict[str, bytes] | None = None,
    ) -> None:
        self.index = index
        self.memory = memory
        self.ended = ""
        self._vcpu = vcpu
        self._runner = runner
        self.bind(runner.address)
        self._supported = supported
        self._gigapages = gigapages
        self._power_on = power_on  # what the same vCPU said before it ran; None: ask it
        self._run = run = vcpu.kvm_run
        self._regs = run.s.regs.regs
        self._sregs = run.s.regs.sregs
        self._regs_at = -1  # value of c.entries when the page held them
        self._sregs_at = -1

    # ---- the run page --------------------------------------------------------------------------

    def load_regs(self) -> Any:
        """The general registers, up to date: ``struct kvm_regs`` in the run page."""
        c = self._runner.c
        owner = c.owner
        if owner and owner != get_ident():
            raise self._busy()
        entries = c.entries
        if self._regs_at != entries:
            run = self._run
            valid = run.kvm_valid_regs
            if not valid & REGS:
                if not run.kvm_dirty_regs & REGS:  # else the last entry refused what is here
                    self._fetch("KVM_GET_REGS", self._regs)
                run.kvm_valid_regs = valid | REGS
            self._regs_at = entries
        return self._regs

    def load_sregs(self) -> Any:
        """The segment and control registers, up to date: ``struct kvm_sregs`` in the run page."""
        c = self._runner.c
        owner = c.owner
        if owner and owner != get_ident():
            raise self._busy()
        entries = c.entries
        if self._sregs_at != entries:
            run = self._run
            valid = run.kvm_valid_regs
            if not valid & SREGS:
                if not run.kvm_dirty_regs & SREGS:  # else the last entry refused what is here
                    self._fetch("KVM_GET_SREGS", self._sregs)
                run.kvm_valid_regs = valid | SREGS
            self._sregs_at = entries
        return self._sregs

    def dirty(self, which: int) -> None:
        """Have KVM take over the changed registers (REGS, SREGS) on the next entry."""
        self._run.kvm_dirty_regs |= which
        self.entered = True

    def put_back(self, entered: bool, ended: str) -> None:
        """A snapshot was restored: what is remembered of the registers is not so any more."""
        self._run.kvm_valid_regs = 0
        self._regs_at = self._sregs_at = -1
        self._power_on = None
        self.entered, self.ended = entered, ended

    def close(self) -> None:
        """Let go of the run page; the machine calls this."""
        self._runner = _CLOSED
        self.bind(0)
        self._run = self._regs = self._sregs = None

    def _mine(self) -> None:
        owner = self._runner.c.owner
        if owner and owner != get_ident():
            raise self._busy()

    def _busy(self) -> BusyError:
        return BusyError(f"cpu {self.index} is running in another thread: stop() it first")

    def _fetch(self, name: str, struct: Any) -> None:
        power_on = self._power_on
        if power_on is None or self._runner.c.entries:
            call(self._vcpu, name, ffi.addressof(struct))
            return
        known = power_on.get(name)
        if known is None:
            call(self._vcpu, name, ffi.addressof(struct))
            power_on[name] = ffi.buffer(ffi.addressof(struct))[:]
        else:
            ffi.memmove(ffi.addressof(struct), known, len(known))

    def flush(self) -> None:
        """Write changed registers back now, by KVM_SET_REGS and KVM_SET_SREGS.

        Raises:
            VcpuExitError: KVM refuses the segment and control registers; the message explains.
        """
        self._mine()
        run = self._run
        if run.kvm_dirty_regs & SREGS:
            from pykvm.errors import KvmError

            try:
                self._vcpu.set_sregs(ffi.addressof(self._sregs))
                run.cr8 = self._sregs.cr8  # which KVM takes from here on entry (api.rst, 5.)
            except KvmError as error:
                from pykvm.diagnose import refused

                raise refused(self, "KVM_SET_SREGS") from error
        if run.kvm_dirty_regs & REGS:
            self._vcpu.set_regs(ffi.addressof(self._regs))
        if run.kvm_dirty_regs & EVENTS:  # a snapshot was restored; after REGS, which drop some
            self._vcpu.set_vcpu_events(ffi.addressof(run.s.regs.events))
        run.kvm_dirty_regs = 0

    @property
    def supported(self) -> list[Any]:
        """The CPUID leaves that it was made from; [] without any."""
        return self._supported

    @property
    def vcpu(self) -> Vcpu:
        """The :class:`pykvm.kvm.Vcpu` below, for every other ioctl.

        Changed registers are written back first, and are read anew afterwards.
        """
        self.flush()
        self._power_on = None
        self._run.kvm_valid_regs = 0
        self._regs_at = self._sregs_at = -1
        return self._vcpu

    # ---- registers -----------------------------------------------------------------------------

    cr0, cr2, cr3, cr4, cr8 = (
        Control("cr0"), Control("cr2"), Control("cr3"), Control("cr4"), Control("cr8"),
    )  # fmt: skip
    efer, apic_base = Control("efer"), Control("apic_base")

    cs, ds, es = SegmentSlot("cs"), SegmentSlot("ds"), SegmentSlot("es")
    fs, gs, ss = SegmentSlot("fs"), SegmentSlot("gs"), SegmentSlot("ss")
    tr, ldt = SegmentSlot("tr"), SegmentSlot("ldt")
    gdt, idt = TableSlot("gdt"), TableSlot("idt")

    @property
    def msr(self) -> MsrView:
        """MSRs by number or name: ``cpu.msr[0xC0000080]``, ``cpu.msr["EFER"]``."""
        return MsrView(self)

    @property
    def regs(self) -> str:
        """The general registers, RIP and RFLAGS as a printable block."""
        from pykvm.arch.x86_64.regs import format_regs

        return Text(format_regs(self.load_regs()))

    @property
    def sregs(self) -> str:
        """The segment, descriptor-table and control registers as a printable block."""
        from pykvm.arch.x86_64.regs import format_sregs

        return Text(format_sregs(self.load_sregs()))

    # ---- modes, checks, translation ------------------------------------------------------------

    def enter(
        self,
        mode: str,
        entry: int,
        *,
        ring: int = 0,
        iopl: int = 0,
        stack: int | None = None,
        tables: int = 0,
        **options: Any,
    ) -> Entry:
        """Make the vCPU ready to run at ``entry`` in a processor mode.

        Args:
            mode: ``"real16"``, ``"prot32"`` (flat, paging off) or ``"long64"`` (identity-mapped).
            entry: guest-physical address of the first instruction.
            ring: 0, or 3 for native speed on back ends that emulate ring 0.
            iopl: I/O privilege level; 3 lets ring 3 use ports.
            stack: initial RSP; below the entry by default.
            tables: page-aligned guest-physical address of the block for GDT, TSS and page tables;
                which addresses are used stands in ``pykvm.arch.x86_64.layout``.
            options: more, see ``pykvm.arch.x86_64.modes.enter``.

        Returns:
            What was set up: GDT, TSS and page tables, with readable reprs.

        Raises:
            ValueError: unknown mode, entry out of reach for it, and the like.
            GuestMemoryError: the tables do not lie in RAM.
        """
        c = self._runner.c  # but the first, all may wait for a start-up IPI
        if c.entries or self.index or c.access.pending:
            self._forget_history()
        # One machine after the other is entered alike: what that made is copied then.
        key = None if options else (mode, entry, ring, iopl, stack, tables, self._gigapages)
        sregs, regs = self.load_sregs(), self.load_regs()
        known = _entered.get(key) if key else None
        if known:
            before, segments, cr0, cr3, cr4, efer = known
            set_up = before.again(regs, self.memory)
            ffi.memmove(ffi.addressof(sregs), segments, _SEGMENTS)
            sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = cr0, cr3, cr4, efer
        else:
            from pykvm.arch.x86_64 import modes

            if mode == "long64" and "gigapages" not in options:
                options["gigapages"] = self._gigapages
            set_up = modes.enter(
                mode, sregs=sregs, regs=regs, memory=self.memory, entry=entry, ring=ring,
                iopl=iopl, stack=stack, tables=tables, **options,
            )  # fmt: skip
            if key:
                if len(_entered) >= _MOST_KEPT:
                    _entered.clear()
                segments = ffi.buffer(ffi.addressof(sregs), _SEGMENTS)[:]
                _entered[key] = (
                    set_up.of(None),
                    segments,
                    sregs.cr0,
                    sregs.cr3,
                    sregs.cr4,
                    sregs.efer,
                )
        self.dirty(REGS | SREGS)
        self.ended = ""
        if self._runner.debug is not None:
            self._runner.debug.entered(self)
        return set_up

    def _forget_history(self) -> None:
        """What a vCPU that ran drags along: a half-done access, a pending exception, a halt."""
        self._runner.complete()
        vcpu = self._vcpu
        vcpu.set_vcpu_events(ffi.new("struct kvm_vcpu_events *"))
        self._run.kvm_dirty_regs &= ~EVENTS
        if vcpu.get_mp_state() != lib.KVM_MP_STATE_RUNNABLE:
            vcpu.set_mp_state(lib.KVM_MP_STATE_RUNNABLE)
        self._regs_at = self._sregs_at = -1

    def check(self) -> list[Finding]:
        """What VMX, SVM or KVM would refuse about the registers as they stand; [] if nothing.

        Pure: nothing is run. Every finding names the rule, its clause and the remedy.
        """
        from pykvm.arch.x86_64 import rules

        regs = self.load_regs()
        return rules.check(self.load_sregs(), regs.rip, regs.rflags, **self.offers())

    def offers(self) -> dict[str, Any]:
        """What CPUID lets the registers hold: ``phys_bits``, and ``features`` (None: no CPUID)."""
        from pykvm.arch.x86_64 import cpuid

        known = cpuid.features(self._supported) if self._supported else None
        return {"phys_bits": cpuid.phys_bits(self._supported), "features": known}

    def translate(self, gva: int, access: str = "r") -> Walk:
        """Walk the page tables for a guest-virtual (linear) address.

        Returns:
            The walk: ``.gpa`` or ``.fault``, and step by step when printed.
        """
        from pykvm.arch.x86_64.walk import walk_sregs

        return walk_sregs(self.memory, self.load_sregs(), gva, access)

    def code(self, length: int = 16) -> bytes:
        """The bytes at CS:RIP, as many as are readable."""
        from pykvm.arch.x86_64.walk import read_virtual

        sregs = self.load_sregs()
        return read_virtual(self.memory, sregs, sregs.cs.base + self.load_regs().rip, length)

    def state(self, halted: bool = False) -> CpuState:
        """Where the vCPU is, for a result. ``halted``: it is known to have executed HLT."""
        regs = self.load_regs()
        waiting = False
        if not halted and not (halted := self._runner.halted):
            state = self._vcpu.get_mp_state()
            halted = state == lib.KVM_MP_STATE_HALTED
            waiting = state in _NOT_STARTED
        interrupts = bool(regs.rflags & 1 << 9)
        return CpuState(self.index, regs.rip, self.code(), halted, interrupts, waiting=waiting)

    def __repr__(self) -> str:
        return (
            f"<Cpu {self.index}{' ' + self.ended if self.ended else ''}>\n{self.regs}\n{self.sregs}"
        )


_entered: dict[tuple[Any, ...], tuple[Entry, bytes, int, int, int, int]] = {}
"""What enter() made, by its arguments: segments as bytes, CR0, CR3, CR4, EFER; and the rest."""
_MOST_KEPT = 16
_SEGMENTS = ffi.offsetof("struct kvm_sregs", "cr0")
"""Bytes of all segment and descriptor-table registers, which come first."""


class _Closed:
    """The runner of a machine that is closed."""

    @property
    def c(self) -> Any:
        raise ClosedError("this machine is closed")


_CLOSED: Any = _Closed()


class Text(str):
    """A string whose repr is itself, so that it prints well at a prompt."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


class MsrView:
    """``cpu.msr``: one KVM_GET_MSRS or KVM_SET_MSRS an access."""

    __slots__ = ("_cpu",)

    def __init__(self, cpu: Cpu) -> None:
        self._cpu = cpu

    def __getitem__(self, which: int | str) -> int:
        from pykvm.arch.x86_64.msrs import number

        index = number(which)
        return self._cpu.vcpu.get_msrs([index])[index]

    def __setitem__(self, which: int | str, value: int) -> None:
        from pykvm.arch.x86_64.msrs import number

        self._cpu.vcpu.set_msrs({number(which): value})
