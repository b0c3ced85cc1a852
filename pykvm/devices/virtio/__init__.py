"""Virtio devices: a queue in C, a core that no driver can break, transports, and the devices."""
