"""Hypothesis for the unit tests. KVM tests do without: in the rig it takes 25 s to import."""

from __future__ import annotations

from hypothesis import settings

# On an emulated or busy machine wall time says nothing about the code under test.
settings.register_profile("pykvm", deadline=None)
settings.load_profile("pykvm")
