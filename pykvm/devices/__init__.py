"""Devices and the buses they sit on. A device knows offsets in its own window, never addresses."""
