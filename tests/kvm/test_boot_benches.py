"""The benches of booting really boot what they time, on both sides; no figure is judged here."""

from __future__ import annotations

from pathlib import Path

import pytest

from benches import boot_guest as guest
from benches import boot_startup
from benches.console_bytes import LINE
from benches.measure import BenchError, NotHere

BLOB = LINE * 8

pytestmark = pytest.mark.watchdog(400)


@pytest.mark.parametrize("who", ["pykvm", "qemu"])
def test_a_stock_kernel_reaches_the_marks(who: str, tmp_path: Path) -> None:
    try:
        kernel = guest.cloud_kernel()
    except NotHere as error:
        pytest.skip(str(error))
    if who == "qemu" and "nohz=off" not in Path("/proc/cmdline").read_text():
        pytest.skip("this kernel's tick can stop for good in the rig: --append 'nohz=off'")
    initrd = guest.make_initrd(tmp_path / "initrd.gz", BLOB)
    command = {
        "pykvm": guest.pykvm(kernel, initrd),
        "qemu": guest.qemu(guest.TUNED, kernel, initrd),
    }
    marks = guest.watch(command[who], guest.environment(tmp_path), [guest.MARKER, guest.END])
    (start, first), (end, last) = marks
    assert 0 < start <= end
    assert last - first > len(BLOB)


def test_the_tiny_kernel_prints_its_byte_and_ends(tmp_path: Path) -> None:
    tiny = tmp_path / "tiny"
    tiny.write_bytes(boot_startup.tiny_kernel())
    environment = guest.environment(tmp_path)
    assert guest.watch(guest.pykvm_boot(tiny), environment, [b"!"])[0][0] > 0


def test_a_mark_that_never_comes_is_an_error_with_what_came(tmp_path: Path) -> None:
    tiny = tmp_path / "tiny"
    tiny.write_bytes(boot_startup.tiny_kernel())
    with pytest.raises(BenchError, match="power-off"):
        guest.watch(guest.pykvm_boot(tiny), guest.environment(tmp_path), [b"!", b"?"])
