"""A virtual machine in a few lines: memory, vCPUs, handlers, and runs that end in a value."""

from __future__ import annotations

import os
from _thread import RLock

from pykvm._abi import lib
from pykvm.cpu import Cpu
from pykvm.debugging import Debugging
from pykvm.devices.bus import Bus
from pykvm.host import cpuid_of_one, has_gigapages, open_kvm, ram
from pykvm.kvm.handle import Closing
from pykvm.memory import GuestMemory
from pykvm.snapshot_methods import SnapshotMethods
from pykvm.vcpu_thread import Runner
from pykvm.virtio_methods import VirtioMethods

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pykvm.boot import BootPlan
    from pykvm.console import Console
    from pykvm.devices.claim import Claim, Handler
    from pykvm.devices.vmgenid import Identity
    from pykvm.host import Host
    from pykvm.irqchip import KernelIrqchip, SplitIrqchip
    from pykvm.kvm import Kvm, Vm
    from pykvm.pc import Pc

MAX_CPUS = 288

TSS_ADDR = 0xFFFBD000
"""Three pages, and one below, where neither RAM nor a device is: under the BIOS's place."""


class Machine(Debugging, SnapshotMethods, VirtioMethods, Closing):
    """A virtual machine for tiny guests.

    ::

        with pykvm.Machine(memory="2M") as m:
            m.load(pykvm.asm("mov al,'H'; out 0xe9,al; hlt"), at=0x8000)
            m.cpu.enter("long64", entry=0x8000)
            m.on_pio(0xE9, lambda exit: print(chr(exit.value), end=""))
            print(m.run(timeout=0.5))

    Args:
        memory: RAM from address 0 on, in bytes or as ``"2M"``; or a ``GuestMemory`` of your own
            regions, which the machine then owns.
        cpus: number of vCPUs.
        irqchip: ``"kernel"``, or True: an in-kernel PIC, IOAPIC and LAPICs (KVM_CREATE_IRQCHIP);
            ``"split"``: LAPICs in the kernel, an IOAPIC here, no PIC (KVM_CAP_SPLIT_IRQCHIP).
            HLT then waits in the kernel and never exits, and vCPUs but the first wait for their
            start-up IPI.
        pit: an in-kernel i8254 timer; needs irqchip "kernel".
        pic: ``"reset"``, or ``"bios"``: the PIC is programmed as a BIOS leaves it, IRQ 0-7 at
            vector 8, 8-15 at 0x70, timer and keyboard open; needs irqchip "kernel".
        features: CPUID features to leave out, ``"-xsave,-avx"``, by their names in /proc/cpuinfo.
        cpuid: ``"host"`` for everything that KVM supports here, a list of
            ``struct kvm_cpuid_entry2``, or None for none at all.
        path: the KVM device.

    Attributes:
        memory: the :class:`~pykvm.memory.GuestMemory`; also ``m.mem``.
        cpus: the :class:`~pykvm.Cpu` objects; ``m.cpu`` is the first.
        irqchip: its interrupt lines (:mod:`pykvm.irqchip`), or None.
        pc: the devices of a PC after :meth:`boot`, else None; ``m.console`` is its serial console.
        pio, mmio: the buses; their actions (``m.pio.fifo(0x3f8)``) need no Python per access.
        vm, kvm: the objects of :mod:`pykvm.kvm` below, for every other ioctl.
        options: what it was made with, but for the memory.

    Raises:
        CapabilityError: no usable KVM, with the remedy.

    A machine belongs to the process that made it: after fork() its ioctls fail with EIO.
    """

    # As it is until something happens; here, so that every new machine need not be told.
    irqchip: KernelIrqchip | SplitIrqchip | None = None
    pc: Pc | None = None
    _background = None
    _closed = False
    _ending = None
    _running = False
    _symbols = None

    def __init__(
        self,
        memory: int | str | GuestMemory = "2M",
        *,
        cpus: int = 1,
        irqchip: str | bool | None = None,
        pit: bool = False,
        pic: str = "reset",
        features: str = "",
        cpuid: str | list[Any] | None = "host",
        path: str = "/dev/kvm",
    ) -> None:
        if not 1 <= cpus <= MAX_CPUS:
            raise ValueError(f"cpus must be 1..{MAX_CPUS}, not {cpus}")
        kind = self._irqchip_kind(irqchip, pit, pic)
        self.options = {
            "cpus": cpus, "irqchip": kind, "pit": pit, "pic": pic, "features": features,
            "cpuid": cpuid, "path": path,
        }  # fmt: skip
        self.cpus: tuple[Cpu, ...] = ()
        self._runners: list[Runner] = []
        self._slots: list[Handler] = []
        self._hooks: dict[int, Callable[[Any], object]] = {}
        self._msrs: dict[int, Callable[[Any], object]] = {}
        self._features = features
        self._traces = []
        self._images = []
        lock = RLock()
        self.pio = Bus("pio", self._slots, self._doorbell, lock)
        self.mmio = Bus("mmio", self._slots, self._doorbell, lock)
        self.kvm: Kvm
        self.kvm, host = open_kvm(path)
        try:
            self.vm: Vm = self.kvm.create_vm()
            try:
                self.memory = memory if isinstance(memory, GuestMemory) else ram(memory)
                self._populate(cpus, kind, pit, pic, cpuid, host)
            except BaseException:
                self.close()
                raise
        except BaseException:
            self.kvm.close()
            raise

    @staticmethod
    def _irqchip_kind(irqchip: str | bool | None, pit: bool, pic: str) -> str | None:
        kind = None
        if irqchip:
            from pykvm.irqchip import kind_of

            kind = kind_of(irqchip)
        if pic not in ("reset", "bios"):
            raise ValueError(f'pic is "reset" or "bios", not {pic!r}')
        if pit and kind != "kernel":
            raise ValueError('pit=True needs irqchip="kernel": the timer interrupts through it')
        if pic == "bios" and kind != "kernel":
            raise ValueError('pic="bios" needs irqchip="kernel": there is no other PIC')
        return kind

    def _populate(
        self,
        cpus: int,
        kind: str | None,
        pit: bool,
        pic: str,
        cpuid: str | list[Any] | None,
        host: Host,
    ) -> None:
        self.memory.attach(self._register)
        irqchip = kind is not None
        if irqchip:
            from pykvm.irqchip import KernelIrqchip, SplitIrqchip

            if kind == "split":
                self.irqchip = SplitIrqchip(self.vm, self)
            else:
                self.irqchip = chip = KernelIrqchip(self.vm)
                if pit:
                    self.vm.create_pit2()
                if pic == "bios":
                    chip.program_pic_as_bios()
            self._prepare_for_intel()
        entries, for_first, gigapages = self._cpuid(cpuid, host)
        features = self._wanted_features() if self._features else {}
        power_on = host.power_on if cpus == 1 and not irqchip else None
        made = []
        for index in range(cpus):
            vcpu = self.vm.create_vcpu(index)
            runner = Runner(
                vcpu,
                index,
                self._slots,
                (self.pio, self.mmio),
                self._hooks,
                self._msrs,
                host.sync_regs,
            )
            self._runners.append(runner)
            if entries:
                if cpus == 1 and not features and not irqchip:
                    vcpu.set_cpuid2(for_first)
                else:
                    from pykvm.cpu_model import prepare

                    vcpu.set_cpuid2(
                        prepare(entries, index, cpus, irqchip=irqchip, features=features)
                    )
            made.append(Cpu(index, vcpu, runner, self.memory, entries, gigapages, power_on))
        self.cpus = tuple(made)

    def _prepare_for_intel(self) -> None:
        """Where KVM may hide what Intel processors need for real mode (api.rst 4.36, 4.40)."""
        if self.vm.check_extension("KVM_CAP_SET_TSS_ADDR"):
            self.vm.set_tss_addr(TSS_ADDR)
        if self.vm.check_extension("KVM_CAP_SET_IDENTITY_MAP_ADDR"):
            self.vm.set_identity_map_addr(TSS_ADDR - 0x1000)

    def _wanted_features(self) -> dict[str, bool]:
        from pykvm.cpu_model import parse_features

        return parse_features(self._features)

    def _cpuid(self, cpuid: str | list[Any] | None, host: Host) -> tuple[list[Any], Any, bool]:
        if not isinstance(cpuid, str):
            entries = cpuid or []
            return entries, cpuid_of_one(entries), has_gigapages(entries)
        if cpuid != "host":
            raise ValueError(f'cpuid is "host", a list of entries or None, not {cpuid!r}')
        return host.cpuid

    def _register(self, region: Any) -> None:
        self.vm.set_user_memory_region(
            region.slot,
            region.guest_phys_addr,
            region.memory_size,
            region.userspace_addr,
            region.flags,
        )

    def _doorbell(self, claim: Claim, size: int, datamatch: int | None, on: bool) -> bool:
        """Ask KVM to ring an eventfd itself; False where it cannot."""
        flags = lib.KVM_IOEVENTFD_FLAG_PIO if claim.bus is self.pio else 0
        if not on:
            flags |= lib.KVM_IOEVENTFD_FLAG_DEASSIGN
        if not self.vm.check_extension("KVM_CAP_IOEVENTFD"):
            return False
        if size == 0 and not self.vm.check_extension("KVM_CAP_IOEVENTFD_ANY_LENGTH"):
            return False
        self.vm.ioeventfd(addr=claim.first, len=size, fd=claim.fd, datamatch=datamatch, flags=flags)
        return True

    # ---- guests --------------------------------------------------------------------------------

    @property
    def cpu(self) -> Cpu:
        """The first vCPU."""
        return self.cpus[0]

    @property
    def mem(self) -> GuestMemory:
        """The guest's memory; short for ``m.memory``."""
        return self.memory

    def load(self, image: bytes, at: int | None = None) -> None:
        """Copy a flat image into memory, ROM included.

        Args:
            image: bytes, or what ``pykvm.asm`` returned.
            at: guest-physical address; default where ``asm`` linked it.
        """
        if isinstance(image, (str, os.PathLike)):
            raise TypeError("load() takes bytes: asm(…), a file's read_bytes(); load_elf() a path")
        if at is None and (at := getattr(image, "at", None)) is None:
            raise TypeError("load(image, at=gpa): say where the image goes")
        self.memory.load(at, image)
        names = getattr(image, "symbols", None)
        if names and getattr(image, "at", None) == at:
            self._images.append(lambda: names)
            self._symbols = None

    def load_elf(self, path: str | os.PathLike[str]) -> Any:
        """Load a static ELF guest by its program headers.

        Returns:
            The ``ElfImage``: ``.entry``, ``.mode`` (for ``cpu.enter``) and ``.symbols``.

        Raises:
            BootError: which field of the file is wrong, expected and found.
        """
        from pykvm.boot import elf

        with open(path, "rb") as file:
            image = elf.load(self.memory, file.read())
        self._images.append(lambda: image.symbols)
        self._symbols = None
        return image

    def boot(
        self,
        kernel: str | os.PathLike[str] | bytes,
        *,
        initrd: Any = None,
        cmdline: str = "console=ttyS0",
        protocol: str = "auto",
        kaslr: bool = False,
        cache: Any = True,
        system_map: str | os.PathLike[str] | None = None,
        output: Callable[[bytes], object] | None = None,
        identity: Identity | None = "new",
    ) -> BootPlan:
        """Load a kernel and get ready to run it, on the devices of a PC.

        ``run()`` then starts it; the machine needs an irqchip, and with ``irqchip="kernel"`` also
        ``pit=True``.

        Args:
            kernel: bzImage, ELF vmlinux, PVH or multiboot image, as a path or bytes.
            initrd: path or bytes; of multiboot its modules.
            cmdline: the kernel's command line.
            protocol: ``"auto"``, ``"bzimage"``, ``"vmlinux"``, ``"pvh"`` or ``"multiboot"``.
            kaslr: let the image unpack and place itself, which is slower.
            cache: keep unpacked kernels in the user's cache folder; or a folder.
            system_map: the kernel's System.map, to name where it hangs.
            output: called with what the console prints, in a thread of its own.
            identity: the VM generation ID, by which a guest can tell that it is a clone
                (docs/snapshots.md): ``"new"``, 16 bytes or a UUID; None: there is no such device.

        Returns:
            What was loaded where.

        Raises:
            BootError: which field of which image is wrong, expected and found.
        """
        from pykvm.pc import boot

        if self.irqchip is None:
            raise ValueError("boot() needs a Machine(irqchip=True, pit=True)")
        if self.pc is not None:
            raise ValueError("this machine was booted already: make another")
        self.pc = boot(
            self,
            kernel,
            initrd=initrd,
            cmdline=cmdline,
            protocol=protocol,
            kaslr=kaslr,
            cache=cache,
            system_map=system_map,
            output=output,
            identity=identity,
        )
        assert self.pc.plan is not None
        return self.pc.plan

    @property
    def console(self) -> Console:
        """The serial console of a booted machine."""
        if self.pc is None:
            raise ValueError("there is a console after boot()")
        return self.pc.console

    # ---- life ----------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._closed

    def close(self) -> None:
        """Give everything back. Idempotent.

        Views of the memory (``m.mem.view(…)``) stay valid; the mapping goes with the last one.

        Raises:
            BusyError: it runs, by run() in another thread: stop() it and join that first. A run
                by start() is stopped here.
        """
        if self._closed:
            return
        if self._background is not None:
            self._background.close()
        if self._running:
            raise self._busy()
        self._closed = True
        try:
            if self._virtio is not None:
                self._virtio.close()
        finally:
            self._close_vm()

    def _close_vm(self) -> None:
        for cpu in self.cpus:
            cpu.close()
        if self.pc is not None:
            self.pc.close()
        for runner in self._runners:
            runner.close()
        self.pio.close()
        self.mmio.close()
        self.vm.close()
        self.kvm.close()
        memory = getattr(self, "memory", None)
        if memory is not None:
            memory.close()

    def __repr__(self) -> str:
        if self._closed:
            return "<Machine closed>"
        chip = "" if self.irqchip is None else f", {self.irqchip.kind} irqchip"
        return f"<Machine {len(self.cpus)} cpus{chip}, {self.memory!r}>"
