"""``--disk`` as far as it needs no KVM."""

from __future__ import annotations

from pathlib import Path

import pytest

from pykvm.cli import exitcodes
from tests.support.command_line import invoke


@pytest.mark.parametrize("command", ["run", "boot"])
@pytest.mark.parametrize(
    ("disk", "complaint"),
    [("a.img,rw", "'rw' in 'a.img,rw' is not understood"), ("a,cache=off", "one of writeback")],
)
def test_a_wrong_disk_is_wrong_usage(
    tmp_path: Path, command: str, disk: str, complaint: str
) -> None:
    guest = tmp_path / "guest.bin"
    guest.write_bytes(b"\xf4")
    done = invoke(command, str(guest), "--disk", disk)
    assert done.exit_code == exitcodes.USAGE
    assert "--disk" in done.stderr and complaint in " ".join(done.stderr.split())


@pytest.mark.parametrize("command", ["run", "boot"])
def test_the_option_is_explained(command: str) -> None:
    text = " ".join(invoke(command, "--help").stdout.split())
    assert "--disk PATH[,ro][,overlay][,…]" in text and "several times" in text
