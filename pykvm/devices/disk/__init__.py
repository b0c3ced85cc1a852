"""Disks: images on the host, as devices see them."""
