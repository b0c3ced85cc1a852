"""One kernel being loaded: what was asked for, and what came of it so far."""

from __future__ import annotations

import os
import time

from pykvm.boot import layout
from pykvm.boot.placement import Placement
from pykvm.boot.plan import BootPlan
from pykvm.errors import BootError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.boot.cache import Cache
    from pykvm.boot.e820 import E820
    from pykvm.boot.ram import MappedMemory
    from pykvm.boot.source import Source


class Job:
    """What the loaders share.

    Attributes:
        plan: filled in as things are decided.
        placement: of all that goes into guest memory.
        kernel: the image.
        modules: initrd, or multiboot's modules.
        cache: of unpacked kernels.
        name: the program's name.
    """

    def __init__(
        self,
        mem: MappedMemory,
        kernel: Source,
        modules: list[Source],
        *,
        e820: list[E820],
        cmdline: str | bytes,
        rsdp_gpa: int,
        cache: Cache,
        name: str,
    ) -> None:
        line = cmdline.encode("utf-8", "surrogateescape") if isinstance(cmdline, str) else cmdline
        self.plan = BootPlan(e820, line, rsdp_gpa)
        self.placement = Placement(mem, e820)
        self.kernel = kernel
        self.modules = modules
        self.cache = cache
        self.name = name
        self._last = time.perf_counter()

    def skip(self) -> None:
        """What was done since the last lap is no phase."""
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """The time since the last lap was spent in this phase."""
        now = time.perf_counter()
        times = self.plan.timings
        times[phase] = times.get(phase, 0.0) + now - self._last
        self._last = now

    def reserve_low_memory(self) -> None:
        """Keep the processor's tables, and what a PC's first megabyte has, free of everything."""
        from pykvm.arch.x86_64 import layout as cpu

        self.placement.claim(cpu.GDT, cpu.END - cpu.GDT, "the processor's tables")
        self.placement.reserve(layout.EBDA, layout.ACPI_END - layout.EBDA, "the BIOS area")

    def put_cmdline(self, limit: int) -> None:
        """Place the command line at its usual address; ``limit`` is without the NUL."""
        self.check_cmdline(min(limit, layout.CMDLINE_SIZE - 1))
        line = self.plan.cmdline
        gpa = self.plan.cmdline_gpa = layout.CMDLINE
        self.placement.claim(gpa, len(line) + 1, "the command line")
        self.placement.put(gpa, line + b"\0")

    def check_cmdline(self, limit: int) -> None:
        """Raise BootError for a command line that is too long, or has a NUL in it."""
        line = self.plan.cmdline
        if b"\0" in line:
            raise BootError(f"command line: expected no NUL, found one at {line.index(0)}")
        if len(line) > limit:
            raise BootError(f"command line: expected at most {limit} bytes, found {len(line)}")

    def put_initrd(self, *limits: int) -> None:
        """Place the initrd as high as possible below the first limit that leaves room for it.

        Raises:
            BootError: more than one file, or no room.
        """
        if not self.modules:
            return
        if len(self.modules) > 1:
            raise BootError(f"initrd: expected one file, found {len(self.modules)}")
        data = self.modules[0].data
        if not len(data):
            raise BootError("initrd: expected at least 1 byte, found 0")
        for limit in limits:
            try:
                gpa = self.placement.highest(len(data), "the initrd", limit, layout.HIGH_MEMORY)
                break
            except BootError:
                if limit == limits[-1]:
                    raise
        self.placement.put(gpa, data)
        self.plan.initrd = gpa, len(data)

    def finish(self) -> BootPlan:
        """Write it all to guest memory."""
        self.placement.commit()
        self.lap("load")
        return self.plan


def program_name(given: str | None, path: str) -> str:
    """What multiboot's command line begins with: the file's name, if none was given."""
    name = given if given is not None else os.path.basename(path)
    return name or "kernel"
