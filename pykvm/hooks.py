"""What serves a guest's exits from Python: handlers of ports, MMIO, MSRs, HLT and shutdown."""

from __future__ import annotations

from pykvm import kvm
from pykvm import result as reasons

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar, overload

    from pykvm.cpu import Cpu
    from pykvm.devices.bus import Bus
    from pykvm.devices.claim import Claim
    from pykvm.irqchip import KernelIrqchip, SplitIrqchip
    from pykvm.kvm import Vm
    from pykvm.memory import GuestMemory

    Function = TypeVar("Function", bound=Callable[..., Any])


class Hooks:
    """The handlers of a :class:`~pykvm.Machine`, which is this with everything else."""

    pio: Bus
    mmio: Bus
    vm: Vm
    memory: GuestMemory
    cpus: tuple[Cpu, ...]
    irqchip: KernelIrqchip | SplitIrqchip | None
    _hooks: dict[int, Callable[[Any], object]]
    _msrs: dict[int, Callable[[Any], object]]

    if TYPE_CHECKING:

        @overload
        def on_pio(self, port: int, handler: Function, *, count: int = 1) -> Function: ...

        @overload
        def on_pio(
            self, port: int, handler: None = None, *, count: int = 1
        ) -> Callable[[Function], Function]: ...

    def on_pio(self, port: int, handler: Any = None, *, count: int = 1) -> Any:
        """Serve ``count`` I/O ports from ``port`` by a Python handler; also a decorator.

        The handler gets a ``PioAccess`` (``.port .size .is_write .value``). What it returns
        answers an IN; None answers all ones. What it raises ends the run and comes through.

        Raises:
            BusOverlapError: the port is claimed already.
        """
        return self._hook_range(self.pio, port, handler, count)

    if TYPE_CHECKING:

        @overload
        def on_mmio(self, gpa: int, length: int, handler: Function) -> Function: ...

        @overload
        def on_mmio(
            self, gpa: int, length: int, handler: None = None
        ) -> Callable[[Function], Function]: ...

    def on_mmio(self, gpa: int, length: int, handler: Any = None) -> Any:
        """Serve ``length`` bytes of guest-physical memory by a Python handler; also a decorator.

        The range must not be RAM: KVM serves RAM itself. Else as :meth:`on_pio`, with a
        ``MmioAccess`` (``.gpa .size .is_write .value``); writes to a read-only region come too.

        Raises:
            ValueError: there is RAM in the range; BusOverlapError: it is claimed already.
        """
        for region in self.memory.regions:
            if gpa < region.end and region.guest_phys_addr < gpa + length and not region.readonly:
                raise ValueError(
                    f"{gpa:#x}..{gpa + length:#x} has RAM in it, which KVM serves itself: the "
                    f"handler would not be called. It is {region.describe()}"
                )
        return self._hook_range(self.mmio, gpa, handler, length)

    def _hook_range(self, bus: Bus, first: int, handler: Any, length: int) -> Any:
        if handler is not None:
            bus.handle(first, handler, length)
            return handler

        def decorate(function: Function) -> Function:
            bus.handle(first, function, length)
            return function

        return decorate

    def on_hlt(self, handler: Function) -> Function:
        """Call ``handler(exit)`` on every HLT exit; the guest goes on unless it returns False."""
        return self._hook(kvm.KVM_EXIT_HLT, handler)

    def on_shutdown(self, handler: Function) -> Function:
        """Call ``handler(exit)`` on a triple fault.

        The guest goes on if the handler set registers (``m.cpu.enter(…)``) and did not return
        False.
        """
        return self._hook(kvm.KVM_EXIT_SHUTDOWN, handler)

    if TYPE_CHECKING:

        @overload
        def on_exit(self, reason: int, handler: Function) -> Function: ...

        @overload
        def on_exit(self, reason: int, handler: None = None) -> Callable[[Function], Function]: ...

    def on_exit(self, reason: int, handler: Any = None) -> Any:
        """Call ``handler(exit)`` on any other exit, ``pykvm.kvm.KVM_EXIT_*``; also a decorator.

        The exit is typed (``pykvm.kvm.exits``). The guest goes on unless the handler returns
        False. Ports and MMIO go through the buses instead.
        """
        if reason in (kvm.KVM_EXIT_IO, kvm.KVM_EXIT_MMIO):
            raise ValueError("ports and MMIO are served by on_pio() and on_mmio()")
        if handler is not None:
            return self._hook(reason, handler)
        return lambda function: self._hook(reason, function)

    def _hook(self, reason: int, handler: Function) -> Function:
        if not callable(handler):
            raise TypeError(f"a handler must be callable, not {type(handler).__name__}")
        self._hooks[reason] = handler
        return handler

    if TYPE_CHECKING:

        @overload
        def on_msr(self, index: int | str, handler: Function) -> Function: ...

        @overload
        def on_msr(
            self, index: int | str, handler: None = None
        ) -> Callable[[Function], Function]: ...

    def on_msr(self, index: int | str, handler: Any = None) -> Any:
        """Serve RDMSR and WRMSR of one MSR by a Python handler; also a decorator.

        The handler gets an exit with ``.index``, ``.is_write`` and ``.data``. For RDMSR it returns
        the value (None gives #GP(0)); for WRMSR nothing. False gives #GP(0) for either. KVM takes
        16 such MSRs; those of the x2APIC never exit.

        Raises:
            CapabilityError: KVM_CAP_X86_USER_SPACE_MSR or KVM_CAP_X86_MSR_FILTER is missing.
        """
        from pykvm.arch.x86_64.msrs import number

        if handler is None:

            def decorate(function: Function) -> Function:
                return self.on_msr(index, function)

            return decorate
        from pykvm.kvm import MsrRange

        wanted: dict[int, Callable[[Any], object]] = {**self._msrs, number(index): handler}
        self.vm.enable_cap("KVM_CAP_X86_USER_SPACE_MSR", kvm.KVM_MSR_EXIT_REASON_FILTER)
        both = kvm.KVM_MSR_FILTER_READ | kvm.KVM_MSR_FILTER_WRITE
        self.vm.x86_set_msr_filter([MsrRange(both, msr, 1) for msr in wanted])
        self._msrs.update(wanted)
        return handler

    def debug_exit(self, port: int = 0xF4) -> Claim:
        """Let the guest end the run with an exit code: a write to ``port``.

        The run ends with reason "debug-exit" and the written value as ``result.code``.
        """
        return self.pio.stop(port, 4 if port <= 0xFFFC else 1, tag=reasons.DEBUG_EXIT)

    def test_devices(self, *, byte_ports: bool = True) -> None:
        """Attach the devices that guests made for QEMU's test set-up expect.

        isa-debug-exit at ports 0xf4-0xf7, as :meth:`debug_exit`, which is not needed then; what
        QEMU's process would exit with is ``pykvm.devices.debug_exit.qemu_status(result.code)``.
        pc-testdev: ports 0xe0-0xe3 that read back, the page flush at 0xe4, interrupt lines at
        0x2000 + GSI (without an irqchip they lead nowhere), memory that exits at 0xff000000.
        fw_cfg at 0x510: the number of processors and the size of RAM.

        Args:
            byte_ports: pc-testdev's second set of ports, 0xe8-0xeb; without it 0xe9 is free.

        Raises:
            BusOverlapError: one of their ports is claimed already.
        """
        from pykvm.arch.x86_64 import pc
        from pykvm.devices.debug_exit import DebugExit
        from pykvm.devices.fw_cfg import FwCfg
        from pykvm.devices.testdev import TestDevice, flush_page

        DebugExit(tag=reasons.DEBUG_EXIT).attach(self.pio, pc.DEBUG_EXIT)
        FwCfg(cpus=len(self.cpus), memory=self.memory.size).attach(self.pio, pc.FW_CFG)
        TestDevice(
            None if self.irqchip is None else self.irqchip.line,
            lambda gpa: flush_page(self.memory, gpa),
        ).attach_all(self.pio, self.mmio, byte_ports=byte_ports)
