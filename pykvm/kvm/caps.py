"""The capabilities of KVM: numbers, names, and what they are good for in words."""

from __future__ import annotations


def describe(cap: str) -> str:
    """What a capability stands for, in a few words; "" for one of another architecture."""
    return ""
