"""A machine's virtio devices, as its methods; the work is in :mod:`pykvm.virtio`."""

from __future__ import annotations

from pykvm.errors import ClosedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from typing import TypeVar

    from pykvm.devices.pci import PciRoot
    from pykvm.pc import Pc
    from pykvm.virtio import Attachments, Blk, DiskSpec, VirtioDevice

    Virtio = TypeVar("Virtio", bound=VirtioDevice)


class VirtioMethods:
    """Part of :class:`~pykvm.Machine`."""

    pc: Pc | None
    _closed: bool
    _virtio: Attachments | None = None

    def virtio(
        self,
        device: Virtio,
        *,
        io: str = "thread",
        transport: str | None = None,
        base: int | None = None,
        gsi: int | None = None,
    ) -> Virtio:
        """Put a virtio device into the machine, and return it. Before :meth:`boot`.

        On a machine with an irqchip, as stock kernels need it, it is a PCI device; others have a
        virtio-mmio window, which takes a tiny guest less to drive.

        Args:
            device: ``pykvm.virtio.Rng()`` and its like.
            io: who serves it when the guest rings its doorbell: ``"thread"``, the I/O thread, while
                the guest goes on; ``"sync"``, the vCPU's own thread, before the guest's next
                instruction, so that the same guest always does the same.
            transport: ``"pci"``: a device on the PCI bus, found by ports 0xcf8 and 0xcfc, with
                MSI-X; without ``irqchip`` the guest polls. ``"mmio"``: a window, which a booted
                kernel finds by ACPI. None: as above, and MMIO if ``base`` or ``gsi`` is given.
            base: guest-physical address of the window; default one page for each device from
                0xd0000000 on.
            gsi: interrupt line, edge-triggered; default 16 for the first device, and on from there.
                Without ``irqchip`` there are no interrupts.

        Raises:
            ValueError: RAM or another device is at ``base``, or no line is left.
        """
        from pykvm.virtio import Attachments

        if self._closed:
            raise ClosedError("this machine is closed")
        if self.pc is not None:
            raise ValueError("the machine was booted already: give it its devices before boot()")
        if self._virtio is None:
            self._virtio = Attachments(self)  # type: ignore[arg-type]
        self._virtio.add(device, io=io, transport=transport, base=base, gsi=gsi)
        return device

    def disk(
        self,
        path: str | os.PathLike[str] | DiskSpec,
        *,
        readonly: bool = False,
        overlay: bool = False,
        cache: str = "",
        format: str = "",
        serial: str = "",
        queues: int = 1,
        io: str = "thread",
        transport: str | None = None,
    ) -> Blk:
        """Give the guest a disk, a virtio block device; Linux's names are /dev/vda, /dev/vdb, …

        Args:
            path: a file or block device, which is locked against a second writer; or a ``DiskSpec``
                that says all but ``queues``, ``io`` and ``transport``.
            readonly: the guest cannot write it.
            overlay: it can, and what it writes is thrown away with the machine.
            cache: ``"writeback"``, the default: what the guest flushes is on the medium.
                ``"writethrough"``: what it writes is. ``"none"``: as writeback, by O_DIRECT.
            format: ``"raw"`` or another one, for which QEMU's tools are needed; default raw.
            serial: the disk's ID, 20 ASCII characters at most.
            queues: request queues.
            io, transport: see :meth:`virtio`.

        Returns:
            The device: ``refresh()`` tells the guest when the image has grown.

        Raises:
            OSError: the host refuses.
            DiskError: it is in use, looks like another format, or a tool is missing.
            ValueError: options that there are not, or that do not go together.
        """
        from pykvm import virtio

        if not isinstance(path, virtio.DiskSpec):
            path = virtio.DiskSpec(
                path,
                readonly=readonly,
                overlay=overlay,
                cache=cache,
                format=format,
                serial=serial,
            )
        device = virtio.disk(path, queues=queues)
        try:
            return self.virtio(device, io=io, transport=transport)
        except BaseException:
            device.close()
            raise

    @property
    def devices(self) -> dict[str, VirtioDevice]:
        """The virtio devices by name: "rng", and a second one "rng1"."""
        return self._virtio.devices if self._virtio is not None else {}

    @property
    def pci(self) -> PciRoot | None:
        """The PCI bus, or None: no device is on one."""
        return self._virtio.pci if self._virtio is not None else None

    @property
    def virtio_windows(self) -> list[tuple[int, int, int]]:
        """Of each virtio-mmio window with an interrupt: ``(base, size, gsi)``."""
        return self._virtio.for_acpi if self._virtio is not None else []

    @property
    def virtio_cmdline(self) -> str:
        """Kernel parameters that announce the virtio-mmio windows where there is no ACPI."""
        return self._virtio.cmdline if self._virtio is not None else ""
