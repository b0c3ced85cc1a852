"""virtio-blk: a disk for the guest (virtio 1.2, 5.2).

What a request says is taken apart in ``blk_request``; what is done with the image is in
``pykvm.devices.disk``. A request that fails on the host is answered with VIRTIO_BLK_S_IOERR, and
the device goes on.
"""

from __future__ import annotations

import errno
import struct
from contextlib import nullcontext, suppress

from pykvm.devices.disk.overlay import OverlayDisk
from pykvm.devices.virtio import blk_request as req
from pykvm.devices.virtio.blk_fast import FastPath
from pykvm.devices.virtio.blk_request import Refused, Request
from pykvm.devices.virtio.core import DRIVER_OK, FEATURES_OK
from pykvm.devices.virtio.device import VirtioDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from pykvm.devices.base import State
    from pykvm.devices.disk.base import Disk
    from pykvm.devices.io_thread import IoThread
    from pykvm.devices.virtio.counters import Counters
    from pykvm.devices.virtio.interrupt import Interrupt
    from pykvm.devices.virtio.queue import Chain, Queue
    from pykvm.memory import GuestMemory

# Feature bits: virtio 1.2, 5.2.3.
F_SIZE_MAX, F_SEG_MAX, F_RO, F_BLK_SIZE, F_FLUSH, F_TOPOLOGY = 1, 2, 5, 6, 9, 10
F_CONFIG_WCE, F_MQ, F_DISCARD, F_WRITE_ZEROES = 11, 12, 13, 14

QUEUE_SIZE = 256
SEG_MAX = QUEUE_SIZE - 2
"""Descriptors for data: all of a queue's but those for header and status."""
SIZE_MAX = req.MAX_TRANSFER // (SEG_MAX + 2)

MAX_DISCARD_SECTORS, MAX_DISCARD_SEGMENTS = 1 << 21, 32
MAX_ZEROES_SECTORS, MAX_ZEROES_SEGMENTS = 1 << 17, 1
"""Zeros may have to be written: no more at once than a write may have."""

_WRITEBACK = 32
"""Where the config has the field ``writeback``."""

_CONFIG = struct.Struct("<QII HBB I BBHI BxH III II B3x")


class Blk(VirtioDevice):
    """A block device.

    Args:
        disk: what it is made of; it is owned from now on.
        queues: how many request queues the driver may use.
        serial: the ID string, 20 ASCII characters at most.
    """

    NAME = "blk"
    WAITS = True
    device_id = 2

    def __init__(self, disk: Disk, *, queues: int = 1, serial: str = "") -> None:
        if not 1 <= queues <= 64:
            raise ValueError(f"a disk has 1 to 64 queues, not {queues}")
        self.disk = disk
        self.serial = serial.encode("ascii")[: req.ID_BYTES].ljust(req.ID_BYTES, b"\0")
        self.queue_max_sizes = (QUEUE_SIZE,) * queues
        self._write_back = disk.write_back  # as the host has it; the driver may choose
        bits = [F_SIZE_MAX, F_SEG_MAX, F_BLK_SIZE, F_FLUSH, F_TOPOLOGY, F_CONFIG_WCE]
        if disk.readonly:
            bits += [F_RO]
        else:
            bits += [F_WRITE_ZEROES]
            bits += [F_DISCARD] if disk.can_discard else []
        if queues > 1:
            bits += [F_MQ]
        self.device_features = sum(1 << bit for bit in bits)
        super().__init__()

    def attach(
        self,
        memory: GuestMemory,
        interrupt: Interrupt | None = None,
        io: IoThread | None = None,
        synchronous: bool = True,
    ) -> None:
        """See :class:`VirtioDevice`; where disk and transport suit it, C serves plain requests."""
        super().attach(memory, interrupt, io, synchronous)
        direct = [self.interrupt.direct(index) for index in range(len(self.queues))]
        known = [each for each in direct if each is not None]
        if len(known) == len(direct) and self.disk.lend() is not None:
            self.fast = FastPath(self, known)

    def _alone(self) -> AbstractContextManager[object]:
        """Within it C does nothing, and the disk is as it would be without C."""
        return nullcontext() if self.fast is None else self.fast

    @property
    def counters(self) -> Counters:
        """What the device has done; C's counts are added when it is looked at."""
        if self.fast is not None:
            self.fast.fold(self._counters)
        return self._counters

    @counters.setter
    def counters(self, counters: Counters) -> None:
        self._counters = counters

    # ---- configuration

    def config_read(self, offset: int, size: int) -> bytes:
        """struct virtio_blk_config (5.2.4), as far as there are features for it."""
        return self._config()[offset : offset + size]

    def _config(self) -> bytes:
        disk, limits = self.disk, self.disk.limits
        block = limits.logical
        unaligned = limits.alignment % limits.physical // block
        return _CONFIG.pack(
            disk.sectors,
            SIZE_MAX,
            SEG_MAX,
            *(0, 0, 0),  # no geometry
            block,
            (limits.physical // block).bit_length() - 1,
            min(unaligned, 255),
            min(limits.min_io // block, 0xFFFF),
            min(limits.opt_io // block, 0xFFFFFFFF),
            self._writes_back,
            len(self.queue_max_sizes),
            *((0, 0, 0) if disk.readonly else self._discard_limits()),
            *((0, 0) if disk.readonly else (MAX_ZEROES_SECTORS, MAX_ZEROES_SEGMENTS)),
            0 if disk.readonly else 1,
        )

    def _discard_limits(self) -> tuple[int, int, int]:
        return MAX_DISCARD_SECTORS, MAX_DISCARD_SEGMENTS, self.disk.limits.physical // req.SECTOR

    @property
    def _writes_back(self) -> bool:
        """The field ``writeback``: 0 from FEATURES_OK on if no flushes are to come (5.2.5.2)."""
        settling = self.status & (FEATURES_OK | DRIVER_OK) == FEATURES_OK
        return self.disk.write_back and not (settling and not self.has(F_FLUSH))

    def config_write(self, offset: int, data: bytes) -> None:
        """The driver chooses the cache mode: one byte, if it has negotiated that."""
        if offset == _WRITEBACK and len(data) == 1 and self.has(F_CONFIG_WCE):
            with self._alone():
                self.disk.write_back = bool(data[0])

    def activate(self) -> None:
        """Settle the cache mode: without flushes, every write has to be stable (5.2.6.2)."""
        if not self.has(F_FLUSH):
            with self._alone():
                self.disk.write_back = False
        if self.fast is not None:
            self.fast.start()

    def reset(self) -> None:
        """Go back to the host's cache mode. No request is under way any more."""
        if self.fast is not None:
            self.fast.stop()
        with self._alone():
            self.disk.write_back = self._write_back

    def drain(self) -> None:
        """Wait for what is being served in C."""
        if self.fast is not None:
            self.fast.drain()

    def refresh(self) -> bool:
        """Look for another size of the image, and tell the driver: whether there is one."""
        with self.lock, self._alone():
            changed = self.disk.refresh()
        if changed:
            self.config_changed()
        return changed

    # ---- requests

    def queue_notify(self, index: int) -> bool | None:
        """Serve what is in the queue."""
        if self.fast is not None:
            return self.fast.serve(index)
        return self.serve(index, self._one)

    def _one(self, queue: Queue, chain: Chain) -> int:
        """Serve one request: how many bytes were written."""
        request = req.parse(chain)
        try:
            written = _DO.get(request.type, Blk._unsupported)(self, request)
            status = req.S_OK
        except Refused as refused:
            written, status = 0, refused.status
        except OSError:
            written, status = 0, req.S_IOERR
        request.status[-1] = status
        # What counts is written without a gap from the first byte on (2.7.8.2).
        if written == chain.write_bytes - 1:
            written += 1
        if status != req.S_OK:
            self.counters.add("errors")
        return written

    def _read(self, request: Request) -> int:
        disk = self.disk
        offset = req.check_transfer(request, disk.sectors, disk.limits.logical)
        if request.length:
            disk.read(request.data, offset)
        return request.length

    def _write(self, request: Request) -> int:
        disk = self.disk
        if disk.readonly:
            raise Refused(req.S_IOERR, "a write to a read-only disk")
        offset = req.check_transfer(request, disk.sectors, disk.limits.logical)
        if request.length:
            disk.write(request.data, offset)
        return 0

    def _flush(self, request: Request) -> int:
        self.disk.flush()
        return 0

    def _get_id(self, request: Request) -> int:
        left = self.serial
        for view in request.data:
            size = min(view.nbytes, len(left))
            view[:size] = left[:size]
            left = left[size:]
        return req.ID_BYTES - len(left)

    def _discard(self, request: Request) -> int:
        self._needs(F_DISCARD)
        limits = MAX_DISCARD_SEGMENTS, MAX_DISCARD_SECTORS
        for offset, length, _ in req.segments(request, self.disk.sectors, *limits):
            self.disk.discard(offset, length)
        return 0

    def _write_zeroes(self, request: Request) -> int:
        self._needs(F_WRITE_ZEROES)
        limits = MAX_ZEROES_SEGMENTS, MAX_ZEROES_SECTORS
        for offset, length, unmap in req.segments(request, self.disk.sectors, *limits):
            self.disk.write_zeroes(offset, length, unmap)
        return 0

    def _needs(self, feature: int) -> None:
        if not self.has(feature):
            raise Refused(req.S_UNSUPP, f"feature {feature} was not negotiated")

    def _unsupported(self, request: Request) -> int:
        if request.type < 0:
            raise Refused(req.S_IOERR, "a request of less than a header")
        raise Refused(req.S_UNSUPP, f"type {request.type}")

    # ---- life

    def device_state(self) -> State:
        """The cache mode, and whether a flush failed. What was written before is flushed.

        Else the next flush would be another process's, which has nothing to flush.
        """
        disk = self.disk
        layer = None
        with self._alone():
            with suppress(OSError):  # it is remembered, and goes along
                disk.flush()
            if isinstance(disk, OverlayDisk):
                layer = disk.layer_state()
        return {
            "overlay": layer,
            "write_back": disk.write_back,
            "sectors": disk.sectors,
            "failed": disk.failed is not None,
        }

    def restore_device(self, state: State) -> None:
        """Take over what :meth:`device_state` returned, with an image of the same size."""
        if state["sectors"] != self.disk.sectors:
            raise ValueError(
                f"the state is of a disk of {state['sectors']} sectors, and {self.disk.path} has"
                f" {self.disk.sectors}"
            )
        if state["overlay"] is not None and not isinstance(self.disk, OverlayDisk):
            raise ValueError(
                f"the state has what was written to an overlay, and {self.disk.path} has none"
            )
        with self._alone():
            if isinstance(self.disk, OverlayDisk) and state["overlay"] is not None:
                self.disk.restore_layer(state["overlay"])
            self.disk.write_back = state["write_back"]
            if state["failed"]:
                self.disk.failed = OSError(errno.EIO, "a flush failed before the state was taken")
        if self.fast is not None and self.activated:
            self.fast.start()
        elif self.fast is not None:
            self.fast.stop()

    def close(self) -> None:
        """Leave the transport and close the image. Idempotent."""
        super().close()
        if self.fast is not None:
            self.fast.stop()
        self.disk.close()


_DO = {
    req.T_IN: Blk._read,
    req.T_OUT: Blk._write,
    req.T_FLUSH: Blk._flush,
    req.T_GET_ID: Blk._get_id,
    req.T_DISCARD: Blk._discard,
    req.T_WRITE_ZEROES: Blk._write_zeroes,
}
"""What serves each type: how many bytes of data it has written into the guest's memory."""
