"""What watches a guest and stops it: traces, breakpoints, steps, gdb. A part of ``Machine``."""

from __future__ import annotations

from pykvm.errors import ClosedError
from pykvm.runs import Runs

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Mapping
    from typing import Any

    from pykvm.cpu import Cpu
    from pykvm.debug.coverage import Block, Coverage
    from pykvm.debug.debugger import Debugger
    from pykvm.debug.differential import Comparison
    from pykvm.debug.gdb import GdbServer
    from pykvm.debug.instructions import InstructionTrace
    from pykvm.debug.planted import Planted
    from pykvm.debug.stops import Breakpoint, Watchpoint
    from pykvm.debug.trace import Trace
    from pykvm.result import RunResult
    from pykvm.symbols import Symbols

KERNEL_MAP = 0xFFFFFFFF80000000
"""Where Linux maps physical address 0 for its own text (__START_KERNEL_map), without KASLR."""


class Debugging(Runs):
    """The watching half of a :class:`~pykvm.Machine`; the work is done in :mod:`pykvm.debug`."""

    _symbols: Symbols | None
    _images: list[Callable[[], Mapping[str, int]]]
    _traces: list[Trace]

    def trace(self, *filters: str, last: int = 1 << 20, rip: bool = False) -> Trace:
        """Write down every exit of every vCPU while a ``with`` block lasts.

        ::

            with m.trace("io:0x3f8-0x3ff", "mmio") as trace:
                m.run(timeout=1)
            print(trace.summary())
            trace.save("boot.json")     # for ui.perfetto.dev

        It is done in C and costs an exit some 100 ns; nothing while none is on.

        Args:
            filters: which exits: ``EXIT[:ADDRESS[-ADDRESS]][:r|:w]``, an exit named as KVM's are
                (``io``, ``mmio``, ``hlt``, ``x86_rdmsr``, …) or ``any``. None: all of them.
            last: how many events of each vCPU are kept: the last ones. 64 bytes each.
            rip: note the instruction pointer of each, for which KVM then stores the general
                registers at every exit. Without it an event has one where they are stored anyway.
                It is what KVM has at the exit: of reads the instruction, of writes on most back
                ends the one behind it.

        Returns:
            The trace: ``.events``, ``.lost``, ``.stats`` (KVM's own), ``.summary()``, ``.save()``.

        Raises:
            ValueError: a filter makes no sense; or, on entry, another trace is on.
        """
        from pykvm.debug.trace import Trace

        vcpus = [runner.c for runner in self._runners]
        trace = Trace(vcpus, filters, last=last, rip=rip, stats=self.kvm_stats)
        if not self._running:
            self._traces.clear()
        self._traces.append(trace)  # a vCPU that runs may still write to one that has ended
        return trace

    def kvm_stats(self) -> dict[str, dict[str, int]]:
        """KVM's own statistics now (api.rst 4.133): ``{"vm": {…}, "cpu 0": {…}}``.

        Histograms are left out. Empty where there is no KVM_CAP_BINARY_STATS_FD.
        """
        if not self.vm.check_extension("KVM_CAP_BINARY_STATS_FD"):
            return {}
        found = {}
        sources: list[tuple[str, Any]] = [("vm", self.vm)]
        sources += [(f"cpu {r.c.index}", r.vcpu) for r in self._runners]
        for name, source in sources:
            with source.get_stats_fd() as stats:
                values = stats.read()
            found[name] = {key: value for key, value in values.items() if isinstance(value, int)}
        return found

    # ---- stopping --------------------------------------------------------------------------------

    @property
    def debugger(self) -> Debugger:
        """What stops this machine; made when it is first used, and from then on in every run."""
        if self._debugger is None:
            from pykvm.debug.debugger import Debugger

            kind, path = type(self), self.kvm.path
            self._debugger = Debugger(self, lambda: kind("128K", path=path))  # type: ignore[call-arg]
        return self._debugger

    @property
    def planted(self) -> Planted:
        """The stops that are planted in the guest's memory; for who copies or rewrites that."""
        return self.debugger.planted

    def breakpoint(
        self,
        where: int | str,
        condition: Callable[[Cpu], object] | None = None,
        *,
        how: str = "auto",
        once: bool = False,
        gpa: int | None = None,
    ) -> Breakpoint:
        """Stop runs before the instruction at an address.

        ::

            point = m.breakpoint("main", lambda cpu: cpu.rdi > 2)
            result = m.run(timeout=1)        # reason "breakpoint", result.exit.point is point

        A run that begins at a breakpoint which it has told of goes on; one that begins at another,
        set meanwhile or stepped to, is stopped at once. How it stops the guest is found
        out by trying, see docs/debugging.md.

        Args:
            where: linear address, or the name of a symbol (``"main"``, ``"main+0x10"``).
            condition: called with the vCPU, which is stopped; the run goes on where it is false.
            how: ``"port"``: a byte planted in memory; ``"hardware"``: a debug register, of which
                there are four; ``"step"``: single steps all the way, slow; ``"auto"``: the first
                of these that works here.
            once: take it away once it has stopped a run.
            gpa: where its code lies, for an address that the page tables do not map yet. Of a
                Linux kernel that was booted without KASLR it is known.

        Raises:
            CapabilityError: no way works; says of each why.
            LookupError: there is no such symbol.
        """
        address = self.resolve(where)
        if gpa is None and self.debugger.gpa(self.cpus[0], address) is None:
            gpa = self._kernel_gpa(address)
        return self.debugger.breakpoint(
            address,
            condition,
            how=how,
            once=once,
            gpa=gpa,
            name=where if isinstance(where, str) else "",
        )

    def _kernel_gpa(self, address: int) -> int | None:
        """Where a booted kernel's text lies before its own page tables are there."""
        gpa = address - KERNEL_MAP
        if self.pc is None or not self.pc.is_linux or self.pc.plan is None or gpa < 0:
            return None
        if self.pc.plan.protocol == "bzimage":
            return None  # it unpacks itself, to where it likes
        start, size = self.pc.plan.kernel
        return gpa if start <= gpa < start + size else None

    def watch(
        self, where: int | str, length: int = 1, access: str = "w", *, how: str = "auto"
    ) -> Watchpoint:
        """Stop runs after an instruction that writes to memory.

        The run ends with reason "watchpoint", ``result.exit`` is the stop.

        Args:
            where: linear address, or a symbol.
            length: bytes; by single steps 64 KiB at most.
            access: ``"w"``: writes, with single steps only those that change something; ``"rw"``:
                reads too.
            how: ``"watch"``: a debug register; ``"step"``: single steps, and a look after each,
                slow; several vCPUs take turns then, and with an irqchip cannot; ``"auto"``: the
                first of these that works here.

        Raises:
            CapabilityError, LookupError: as of :meth:`breakpoint`.
        """
        return self.debugger.watch(self.resolve(where), length, access, how=how)

    def step(self, count: int = 1, *, cpu: int = 0, timeout: float | None = 10.0) -> RunResult:
        """Execute so many instructions of one vCPU; the others stand still.

        Args:
            count: how many at most. Each costs an exit: docs/determinism.md says what that is.
            cpu: which vCPU.
            timeout: seconds; None where the count alone is to be the limit.

        Returns:
            A result with reason "step"; or what else ended it: "breakpoint" where a step arrives
            at one, "halted", "timeout", … ``result.steps`` are those that were executed.

        Raises:
            CapabilityError: this KVM cannot in this mode; says why.
        """
        if count < 1:
            raise ValueError(f"count {count}: at least one instruction")
        left = count

        def look(cpu: Cpu) -> Any:
            nonlocal left
            left -= 1
            return None if left else _step_of(cpu)

        return self._stepping(self.cpus[cpu], look, timeout)

    def run_until(
        self, where: int | str | Callable[[Cpu], object], timeout: float | None = None
    ) -> RunResult:
        """Run until an address is reached, or, by single steps, until a condition holds.

        Args:
            where: linear address, a symbol, or a function that is called with the first vCPU after
                each of its instructions. Where a vCPU stands already does not count.
            timeout: seconds.

        Returns:
            A result with reason "breakpoint" or "step"; or what else ended it.
        """
        if callable(where):
            wanted = where
            return self._stepping(
                self.cpus[0], lambda cpu: _step_of(cpu) if wanted(cpu) else None, timeout
            )
        point = self.breakpoint(where, once=True)
        self.debugger.pass_over(point)
        try:
            return self.run(timeout)
        finally:
            point.delete()

    def _stepping(self, cpu: Cpu, look: Callable[[Cpu], Any], timeout: float | None) -> RunResult:
        debugger = self.debugger
        steps = 0

        def counted(cpu: Cpu) -> Any:
            nonlocal steps
            steps += 1
            return look(cpu)

        debugger.steps(cpu, counted)
        try:
            result = self.run(timeout)
        finally:
            debugger.steps(cpu, None)
        result.steps = steps
        return result

    def instructions(
        self, limit: int = 1000, *, cpu: int = 0, timeout: float | None = 10.0
    ) -> InstructionTrace:
        """Execute instructions of one vCPU by single steps, and write them down.

        Needs capstone: ``pip install 'pykvm-vmm[debug]'``.

        Args:
            limit: how many at most.
            cpu: which vCPU; the others stand still.
            timeout: seconds.

        Returns:
            What it executed, with what changed in its registers; prints as a listing.

        Raises:
            CapabilityError: no single steps here, or no capstone.
        """
        from pykvm.debug.instructions import record

        if limit < 1:
            raise ValueError(f"limit {limit}: at least one instruction")
        which = self.cpus[cpu]
        return record(
            self.debugger,
            which,
            limit,
            lambda look: self._stepping(which, look, timeout),
            self.symbols,
        )

    def coverage(self, blocks: Iterable[Block | tuple[int, int] | int]) -> Coverage:
        """Find out which blocks of code are reached while a ``with`` block lasts.

        ::

            blocks = find_blocks(m.mem.read(entry, length), entry)   # pykvm.debug.coverage
            with m.coverage(blocks) as covered:
                m.run(timeout=1)
            covered.save("guest.drcov")

        A stop is planted at every block and taken away when it is hit: each costs one exit.

        Args:
            blocks: addresses, ``(address, size)``, or what ``find_blocks`` gives. They must be
                starts of instructions.
        """
        from pykvm.debug.coverage import Coverage

        return Coverage(self.debugger, blocks)

    def compare_with_unicorn(
        self, limit: int = 1000, *, timeout: float | None = 10.0
    ) -> Comparison:
        """Run the first vCPU by single steps, and Unicorn beside it, to the first difference.

        For guests in real mode, without paging, or with an identity map. In protected and long mode
        interrupts and exceptions are KVM's alone: Unicorn stops there. Needs unicorn and capstone.

        Args:
            limit: instructions at most.
            timeout: seconds.

        Raises:
            CapabilityError: no single steps here, a library is missing, or Unicorn cannot begin
                in the state that the vCPU is in: a segment of real mode with a base of its own.
        """
        from pykvm.debug.differential import compare

        cpu = self.cpus[0]
        return compare(self.debugger, cpu, limit, lambda look: self._stepping(cpu, look, timeout))

    def call(self, where: int | str, *arguments: int, timeout: float | None = 5.0) -> int:
        """Call a function of the guest as C does, and put its registers back afterwards.

        The first vCPU calls it, from where it stands, on its own stack. In 64-bit mode the first
        six arguments go into RDI, RSI, RDX, RCX, R8 and R9, in 32-bit mode onto the stack.

        Args:
            where: linear address, or a symbol of an ELF guest.
            arguments: integers, negative ones too.
            timeout: seconds.

        Returns:
            What it returns in RAX or EAX.

        Raises:
            RunError and its like: it did not return; ``error.result`` says what happened instead.
        """
        from pykvm.debug.call import call

        return call(self.debugger, self.run, self.resolve(where), arguments, timeout)

    def gdb_server(self, address: str = "", *, anywhere: bool = False) -> GdbServer:
        """Let gdb debug this machine: ``server.serve()`` waits for it and does what it says.

        ::

            with m.gdb_server("127.0.0.1:1234") as server:
                how, result = server.serve()     # gdb guest.elf -ex "target remote :1234"

        Args:
            address: ``PORT``, ``HOST:PORT``, or the path of a Unix socket; port 0 is any that is
                free. Default 127.0.0.1:1234.
            anywhere: allow an address that other machines reach. Who connects owns the guest.

        Raises:
            ValueError: no address, or one that others can reach.
            OSError: it is taken.
        """
        from pykvm.debug.gdb import GdbServer

        if self._closed:
            raise ClosedError("this machine is closed")
        return GdbServer(self, address, anywhere)

    # ---- symbols ---------------------------------------------------------------------------------

    @property
    def symbols(self) -> Symbols:
        """Names for addresses: of ELF guests, of a booted kernel, and what was added."""
        if self._symbols is None:
            from pykvm.symbols import Symbols

            known: dict[str, int] = {}
            if self.pc is not None:
                known.update(self.pc.symbols.addresses)
            for image in self._images:
                known.update(image())
            self._symbols = Symbols(known)
        return self._symbols

    def add_symbols(self, source: str | os.PathLike[str] | Mapping[str, int]) -> None:
        """Take names from an ELF file, from a System.map, or from a mapping name → address.

        Raises:
            BootError, ValueError: the file is neither.
        """
        if isinstance(source, str) or hasattr(source, "__fspath__"):
            from pykvm.symbols import Symbols

            names = Symbols.of_file(source).addresses
        else:
            names = dict(source)
        self._images.append(lambda: names)
        self._symbols = None

    def resolve(self, where: int | str) -> int:
        """The address of ``"symbol"`` or ``"symbol+0x10"``; an int is one already.

        Raises:
            LookupError: no such symbol is known.
        """
        return where if isinstance(where, int) else self.symbols.address(where)


def _step_of(cpu: Cpu) -> Any:
    from pykvm.debug.stepping import _once

    return _once(cpu)
