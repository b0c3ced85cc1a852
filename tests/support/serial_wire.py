"""A 16550A at its wire: accesses as a guest makes them, and the edges of its interrupt."""

from __future__ import annotations

import os
from typing import Any

from pykvm._abi import ffi, lib
from pykvm.devices.serial import Serial

DATA, IER, IIR, LCR, MCR, LSR, MSR, SCRATCH = range(8)
FCR = IIR


def access(serial: Serial, offset: int, data: bytes | int) -> bytes | None:
    """One access as a guest makes it: a write of bytes, or a read of so many. None: no room."""
    write = isinstance(data, bytes)
    buffer = bytearray(data)
    pointer = ffi.from_buffer("uint8_t[]", buffer)
    if lib.pykvm_uart_access(serial.c, offset, pointer, len(buffer), write):
        return None
    return bytes(buffer)


def out(serial: Serial, offset: int, value: int) -> None:
    assert access(serial, offset, bytes([value])) is not None


def inb(serial: Serial, offset: int) -> int:
    data = access(serial, offset, 1)
    assert data is not None
    return data[0]


class Wire:
    """A serial port with an eventfd for its interrupt, whose edges can be counted."""

    def __init__(self, **options: Any) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.serial = Serial(irq=self.fd, **options)

    def edges(self) -> int:
        try:
            return os.eventfd_read(self.fd)
        except BlockingIOError:
            return 0

    def close(self) -> None:
        self.serial.close()
        os.close(self.fd)
