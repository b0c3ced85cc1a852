"""What a loader did, and how to enter what it loaded."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm.boot.e820 import E820
    from pykvm.boot.elf import ElfImage


class BootPlan:
    """A loaded kernel, ready to be entered.

    ::

        plan = boot.load(m.memory, "vmlinuz", initrd="initrd", cmdline="console=ttyS0")
        m.cpu.enter(plan.mode, entry=plan.entry, tables=plan.tables)
        for name, value in plan.registers.items():
            setattr(m.cpu, name, value)

    Attributes:
        protocol: how it is started: ``"vmlinux"`` (Linux's 64-bit boot protocol, at the kernel's
            own entry), ``"bzimage"`` (the same, at that of the image's decompressor), ``"pvh"`` or
            ``"multiboot"``.
        mode: ``"long64"`` or ``"prot32"``. Flat segments with the selectors of Linux, interrupts
            off, and for long64 4 GiB of identity map, as ``cpu.enter`` gives, are what each
            protocol asks for.
        entry: gpa of the first instruction.
        registers: general registers by their name in ``struct kvm_regs``; the others are 0.
        tables: gpa of the block that ``cpu.enter`` may put the processor's tables into.
        kernel: (gpa, length) of the memory that the kernel needs while it starts.
        initrd: (gpa, length), or None.
        modules: multiboot's modules, [(gpa, length)]; the initrd is the first.
        cmdline: the command line as the kernel sees it, without its NUL.
        cmdline_gpa: where it is.
        boot_params_gpa: Linux's zero page, or 0.
        info_gpa: PVH's start info or multiboot's info block, or 0.
        rsdp_gpa: ACPI's root pointer as the kernel was told, or 0.
        e820: the memory map that the kernel was told.
        version: what a bzImage says of itself: ``"6.1.0-56-amd64 (…) #1 SMP …"``, or "".
        format: how the payload of a bzImage is packed (``"xz"``), or "".
        cache_hit: whether the unpacked kernel was in the cache; None where it was not asked.
        elf: the ``ElfImage`` of a kernel that is an ELF file, or None.
        timings: seconds by phase, in order: read (open, map and check the files), unpack, store
            (into the cache), load (into guest memory).
        notes: what a user may want to know, in words.
        to_keep: what ``keep()`` has yet to do, or None.
    """

    def __init__(self, e820: list[E820], cmdline: bytes, rsdp_gpa: int) -> None:
        self.protocol = ""
        self.mode = ""
        self.entry = 0
        self.registers: dict[str, int] = {}
        self.tables = 0
        self.kernel = (0, 0)
        self.initrd: tuple[int, int] | None = None
        self.modules: list[tuple[int, int]] = []
        self.cmdline = cmdline
        self.cmdline_gpa = 0
        self.boot_params_gpa = 0
        self.info_gpa = 0
        self.rsdp_gpa = rsdp_gpa
        self.e820 = e820
        self.version = ""
        self.format = ""
        self.cache_hit: bool | None = None
        self.elf: ElfImage | None = None
        self.timings: dict[str, float] = {}
        self.notes: list[str] = []
        self.to_keep: Callable[[], None] | None = None

    def keep(self) -> None:
        """Put the unpacked kernel into the cache, after ``load(keep_later=True)``. Once is enough.

        It mostly writes a file of some 30 MiB, without the GIL, and may be done in a thread while
        the guest boots.
        """
        keep, self.to_keep = self.to_keep, None
        if keep is not None:
            keep()

    @property
    def symbols(self) -> dict[str, int]:
        """Name → address, of a kernel that is an ELF file with symbols; else empty."""
        return {} if self.elf is None else self.elf.symbols

    def __repr__(self) -> str:
        start, size = self.kernel
        lines = [
            f"<BootPlan {self.protocol}, {self.mode} at {self.entry:#x}",
            f"kernel {start:#x}-{start + size - 1:#x} {self.version}".rstrip(),
        ]
        for gpa, length in [self.initrd] if self.initrd else self.modules:
            lines.append(f"module {gpa:#x}-{gpa + length - 1:#x}")
        lines.append(
            f"command line at {self.cmdline_gpa:#x}: {self.cmdline.decode(errors='replace')}"
        )
        lines += [f"{name}={value:#x}" for name, value in self.registers.items()]
        times = ", ".join(f"{name} {value * 1e3:.1f} ms" for name, value in self.timings.items())
        return "\n  ".join([*lines, *self.notes, times or "not loaded"]) + ">"
