"""Devices and the buses they sit on. A device knows offsets in its own window, never addresses."""

KEEP_BYTES = 16 << 20
"""Default of how much a FIFO or a log keeps until it is read, in bytes."""
