"""The environment of a program whose words a test reads: as it is, but for what changes words."""

from __future__ import annotations

import os

#: Colours, widths, and what Python or pytest say more of; users and CIs set them for themselves.
#: Unbuffered, what cannot be written would not wait for the interpreter's end.
_LOUD = (
    "COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "PY_COLORS", "CLICOLOR", "CLICOLOR_FORCE",
    "PYTEST_ADDOPTS", "PYTHONUNBUFFERED", "PYTHONVERBOSE", "PYTHONDEVMODE", "PYTHONWARNINGS",
)  # fmt: skip


def environment() -> dict[str, str]:
    """What to give a subprocess as ``env``."""
    return {name: value for name, value in os.environ.items() if name not in _LOUD}


def unset() -> dict[str, None]:
    """The same for click's ``CliRunner(env=…)``, which runs a command in this process."""
    return dict.fromkeys(_LOUD)
