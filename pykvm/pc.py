"""A PC around a machine: what a stock kernel expects to find, and how its end is noticed.

``Machine.boot()`` builds one. Interrupts: COM1 raises GSI 4 through an irqfd, so that neither its
data nor its interrupts need Python; ACPI raises GSI 9.
"""

from __future__ import annotations

import os
import threading
import time

from pykvm import result as reasons
from pykvm.arch.x86_64 import pc as places
from pykvm.arch.x86_64.acpi import build_acpi
from pykvm.arch.x86_64.mptable import build_mptable
from pykvm.boot.loader import load
from pykvm.console import Console, readable
from pykvm.devices.cmos import Cmos
from pykvm.devices.i8042 import I8042
from pykvm.devices.pci_none import PciNone
from pykvm.devices.pm import PowerManagement
from pykvm.devices.post import PostCode
from pykvm.devices.pvpanic import Pvpanic
from pykvm.devices.reset import FastA20, ResetControl
from pykvm.devices.serial import Serial
from pykvm.devices.vmgenid import NEW, VmGenerationId, id_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pykvm.boot import BootPlan
    from pykvm.devices.vmgenid import Identity
    from pykvm.irqchip import KernelIrqchip, SplitIrqchip
    from pykvm.machine import Machine
    from pykvm.symbols import Symbols

UNREAD_BYTES = 1 << 20
"""Of the console; a guest that prints more waits for its reader."""

PANIC = b"Kernel panic - not syncing"
PANIC_END = b"---[ end Kernel panic"
PANIC_GRACE = 2.0
"""Seconds that a kernel has to print the rest after it said that it panics."""

_KERNEL_SIZE = 4 << 20
"""Smaller ELF files are guests made by hand."""


class PanicWatch:
    """Looks for a kernel's panic in what it prints. Called with batches, in the console's thread.

    A line of the kernel's log begins at the start of a line, maybe behind a time stamp; a program
    in the guest could print the same, which only fools its owner.
    """

    def __init__(self, panicked: Callable[[str], object], ended: Callable[[], object]) -> None:
        self._panicked = panicked
        self._ended = ended
        self._line = bytearray()
        self.message = ""

    def __call__(self, data: bytes) -> None:
        """Take the next bytes."""
        *lines, rest = bytes(self._line + data).split(b"\n")
        self._line = bytearray(rest[-512:])
        for line in lines:
            if PANIC in line and not self.message:
                self.message = readable(line.strip())
                self._panicked(self.message)
            elif PANIC_END in line and self.message:
                self._ended()


class Pc:
    """The devices of a PC, attached to a machine with an irqchip.

    Attributes:
        serial: COM1.
        console: what it prints and is typed.
        panic: what the kernel said when it panicked, or "".
        plan: what was booted, or None.
        identity: the guest's VM generation ID, or None.
    """

    def __init__(self, machine: Machine, output: Callable[[bytes], object] | None = None) -> None:
        irqchip = machine.irqchip
        if irqchip is None:
            raise ValueError("a PC needs a Machine with an irqchip")
        self._machine = machine
        self.panic = ""
        self.plan: BootPlan | None = None
        self.identity: VmGenerationId | None = None
        self.started = time.monotonic()
        self.system_map: str | os.PathLike[str] | None = None
        self._symbols: Symbols | None = None
        self._grace: threading.Timer | None = None
        self._keeper: threading.Thread | None = None
        self._irq = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            irqchip.wire_as_pc()
            irqchip.connect(self._irq, places.COM1_GSI)
            self.serial = Serial(irq=self._irq, flow_control=True, keep=UNREAD_BYTES, wait=True)
            self._watch = PanicWatch(self._on_panic, self._after_panic)
            self.console = Console(self.serial, output=output, watch=self._watch)
            self._attach(machine, irqchip)
        except BaseException:
            os.close(self._irq)
            raise

    def _attach(self, machine: Machine, irqchip: KernelIrqchip | SplitIrqchip) -> None:
        pio = machine.pio
        below = sum(r.memory_size for r in machine.memory.regions if r.guest_phys_addr < 1 << 32)
        self.serial.attach(pio, places.COM1)
        Cmos(
            memory_below_4g=below,
            memory_above_4g=machine.memory.size - below,
            cpus=len(machine.cpus),
        ).attach(pio, 0x70)
        I8042(self._on_reset).attach(pio, 0x60)
        if machine.pci is None:
            PciNone().attach(pio, places.PCI_ADDRESS)
        ResetControl(self._on_reset).attach(pio, places.RESET)
        FastA20(self._on_reset).attach(pio, 0x92)
        PostCode().attach(pio, 0x80)
        Pvpanic(self._on_pvpanic).attach(pio, 0x505)
        self._pm = PowerManagement(
            self._on_power_off, on_sci=lambda level: irqchip.line(places.SCI_GSI, level)
        )
        self._pm.attach(pio, places.PM_BASE)
        pio.unclaimed("ignore")
        machine.mmio.unclaimed("ignore")

    def put_identity(self, gpa: int) -> None:
        """Take 16 bytes of guest memory for the VM generation ID."""
        irqchip = self._machine.irqchip
        assert irqchip is not None

        def notify() -> None:
            for level in (1, 0):  # an edge
                irqchip.line(places.IDENTITY_GSI, level)

        self.identity = VmGenerationId(self._machine.memory, gpa, notify)

    # ---- how it ends ---------------------------------------------------------------------------

    def _on_reset(self, how: str) -> None:
        self._machine.stop(reasons.PANIC if self.panic else reasons.REBOOT)

    def _on_power_off(self, sleep_type: int) -> None:
        self._machine.stop(reasons.POWER_OFF)

    def _on_pvpanic(self, event: str) -> None:
        self.panic = self.panic or f"the guest's pvpanic driver reported {event}"
        self._after_panic()

    def _on_panic(self, message: str) -> None:
        self.panic = message
        self._grace = threading.Timer(PANIC_GRACE, self._after_panic)
        self._grace.daemon = True
        self._grace.start()

    def _after_panic(self) -> None:
        self._machine.stop(reasons.PANIC)

    def press_power_button(self) -> None:
        """Ask the guest to power off, as the button does (an ACPI event)."""
        self._pm.press_power_button()

    # ---- around a run --------------------------------------------------------------------------

    def run_begins(self) -> None:
        """The console is pumped while the machine runs."""
        self.console.start()
        if self._keeper is None and self.plan is not None and self.plan.to_keep is not None:
            self._keeper = threading.Thread(target=self._keep, args=(self.plan,), daemon=True)
            self._keeper.start()

    def _keep(self, plan: BootPlan) -> None:
        """Write the unpacked kernel into the cache, behind everything else that wants to run."""
        from contextlib import suppress

        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)  # of this thread only
        plan.keep()

    def run_ended(self) -> None:
        """Everything that was printed is in the transcript now, and the kernel in the cache."""
        self.console.stop()
        if self._keeper is not None:
            self._keeper.join()
            self._keeper = None
        if self._grace is not None:
            self._grace.cancel()
            self._grace.join()
            self._grace = None

    def timings(self, run_began: float) -> dict[str, float]:
        """Seconds of each phase of a boot, from ``Machine.boot()`` on."""
        phases = dict(self.plan.timings) if self.plan is not None else {}
        phases["first_instruction"] = run_began - self.started
        if self.console.first_byte:
            phases["first_byte"] = self.console.first_byte - self.started
        return phases

    @property
    def is_linux(self) -> bool:
        """Whether this looks like a stock Linux kernel: a bzImage, or another image of its size."""
        plan = self.plan
        if plan is None or plan.protocol == "multiboot":
            return False
        return bool(plan.version) or plan.kernel[1] >= _KERNEL_SIZE

    def symbol(self, address: int) -> str:
        """``name+0x12`` for an address of the kernel, or "" without its symbols."""
        return self.symbols.name(address)

    @property
    def symbols(self) -> Symbols:
        """The kernel's symbols, of its System.map or its own; empty where there are none."""
        if self._symbols is None:
            from pykvm.symbols import Symbols

            known = self.plan.symbols if self.plan is not None else {}
            try:
                self._symbols = (
                    Symbols(known)
                    if self.system_map is None
                    else Symbols.of_system_map(self.system_map)
                )
            except (OSError, ValueError):  # bad further down: how the run ended matters more
                self._symbols = Symbols(known)
        return self._symbols

    def close(self) -> None:
        """Give back what is ours; the claims go with the machine's buses."""
        self.console.close()
        self.serial.close()
        if self._irq >= 0:
            os.close(self._irq)
            self._irq = -1


def boot(
    machine: Machine,
    kernel: Any,
    *,
    initrd: Any = None,
    cmdline: str = "console=ttyS0",
    protocol: str = "auto",
    kaslr: bool = False,
    cache: Any = True,
    system_map: str | os.PathLike[str] | None = None,
    output: Callable[[bytes], object] | None = None,
    identity: Identity | None = NEW,
) -> Pc:
    """Load a kernel into a machine and make its first vCPU ready to start it.

    See ``Machine.boot``, which calls this.
    """
    if system_map is not None:
        from pykvm.symbols import check_system_map

        check_system_map(system_map)
    generation_id = None if identity is None else id_of(identity)
    if generation_id is None and identity is not None:
        raise ValueError("a machine that boots has no identity yet that it could keep")
    pc = Pc(machine, output)
    try:
        assert machine.irqchip is not None
        acpi = build_acpi(
            cpus=len(machine.cpus),
            base=places.ACPI_BASE,
            pic=machine.irqchip.has_pic,
            virtio=machine.virtio_windows,
            pci=machine.pci is not None,
            generation_id=generation_id,
        )
        pc.plan = plan = load(
            machine.memory,
            kernel,
            initrd=initrd,
            cmdline=cmdline,
            protocol=protocol,
            kaslr=kaslr,
            cache=cache,
            rsdp_gpa=acpi.rsdp,
            keep_later=True,  # while the guest runs
        )
        if machine.memory.covers(acpi.base, len(acpi.blob)):
            acpi.write(machine.memory)
            if acpi.generation_id is not None:
                pc.put_identity(acpi.generation_id)
        tables = build_mptable(cpus=len(machine.cpus))  # for a kernel told acpi=off
        if machine.irqchip.has_pic and machine.memory.covers(tables.base, len(tables.blob)):
            tables.write(machine.memory)
        cpu = machine.cpu
        cpu.enter(plan.mode, plan.entry, tables=plan.tables)
        for name, value in plan.registers.items():
            setattr(cpu, name, value)
        pc.system_map = system_map
    except BaseException:
        pc.close()
        raise
    return pc
