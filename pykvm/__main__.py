"""``python -m pykvm``: the command line."""

from __future__ import annotations

from pykvm.cli.quick import main

if __name__ == "__main__":
    main()
