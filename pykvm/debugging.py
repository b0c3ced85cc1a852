"""What watches a guest and stops it: traces, breakpoints, steps, gdb. A part of ``Machine``."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pykvm.cpu import Cpu
    from pykvm.debug.trace import Trace
    from pykvm.kvm import Vm
    from pykvm.vcpu_thread import Runner


class Debugging:
    """The watching half of a :class:`~pykvm.Machine`; the work is done in :mod:`pykvm.debug`."""

    vm: Vm
    cpus: tuple[Cpu, ...]
    _runners: list[Runner]
    _running: bool
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
