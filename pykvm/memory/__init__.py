"""Guest memory: what the guest sees as RAM and ROM, and the host's checked way into it.

``GuestMemory`` is a sorted map of ``Region`` objects, each a stretch of guest-physical addresses
backed by a host mapping. It knows nothing of KVM's file descriptors: a region only carries the
values that ``KVM_SET_USER_MEMORY_REGION`` wants, and whoever owns the VM registers it.
"""

from __future__ import annotations

from .guest_memory import GuestMemory
from .region import Region
from .units import format_size, parse_size

__all__ = ["GuestMemory", "Region", "format_size", "parse_size"]
