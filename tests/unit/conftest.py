"""Hypothesis for the unit tests. KVM tests do without: in the rig it takes 25 s to import."""

from __future__ import annotations

from hypothesis import Phase, settings
from hypothesis.internal.conjecture import engine

# A failure is to be told, with what repeats it, before the watchdog ends the run: by default its
# example is made smaller for up to five minutes, and then explained, at a tenth of the speed.
engine.MAX_SHRINKING_SECONDS = 20

# On an emulated or busy machine wall time says nothing about the code under test.
settings.register_profile(
    "pykvm",
    deadline=None,
    print_blob=True,
    phases=[phase for phase in Phase if phase != Phase.explain],
)
settings.load_profile("pykvm")
