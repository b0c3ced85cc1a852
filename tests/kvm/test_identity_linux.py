"""A stock Linux learns that it was cloned, and has random numbers of its own from then on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pykvm
from pykvm import result as reasons
from tests.support import linux_guest

BOOT_SECONDS = 300.0

SCRIPT = r"""#!/bin/busybox sh
busybox mount -t proc proc /proc
busybox mount -t devtmpfs dev /dev
busybox mkdir /sys; busybox mount -t sysfs sys /sys
exec </dev/console >/dev/console 2>&1
reseeded() { busybox dmesg | busybox grep -c 'crng reseeded due to virtual machine fork'; }
busybox ls /sys/bus/acpi/drivers/vmgenid
busybox head -c 16 /dev/urandom | busybox hexdump -v -e '16/1 "%02x"'
echo; echo "MARKER ready, reseeded $(reseeded) times"
while read -r what; do
    if [ "$what" = told ]; then
        for i in 0 1 2 3 4 5 6 7 8 9; do
            [ "$(reseeded)" = 0 ] || break
            busybox sleep 1
        done
    fi
    set -- $(busybox head -c 16 /dev/urandom | busybox hexdump -v -e '16/1 "%02x"')
    echo "random $1 reseeded $(reseeded)"
done
"""

CLONES = """
import re, sys
import pykvm

path, *wanted = sys.argv[1:]
with pykvm.Snapshot.load(path) as s:
    for each in wanted:
        identity, word = each.split(":")
        with s.fork(identity=identity) as m, m.start(timeout=300) as running:
            m.console.write(word.encode() + b"\\n")
            m.console.expect(re.compile(rb"random \\w+ reseeded \\d+\\r?\\n"), 300)
            print(each, m.console.transcript.decode())
"""
ANSWER = re.compile(r"random ([0-9a-f]{32}) reseeded ([0-9]+)")


@pytest.mark.watchdog(900)
def test_clones_have_random_numbers_of_their_own(tmp_path: Path) -> None:
    found = linux_guest.kernels()
    if "generic" not in found:  # the cloud kernel has no CONFIG_VMGENID
        pytest.skip("PYKVM_KERNELS names no folder with Debian's kernel (tests/rig sets it)")
    linux_guest.need_native_ring0()
    snapshot = tmp_path / "debian.snapshot"
    with pykvm.Machine("256M", irqchip=True, pit=True) as m:
        m.boot(
            found["generic"],
            initrd=linux_guest.initrd(SCRIPT),
            cmdline="console=ttyS0 panic=-1 quiet",
        )
        with m.start(timeout=BOOT_SECONDS) as running:
            booted = m.console.expect(b"MARKER ready", BOOT_SECONDS).decode()
            assert re.search(r"PKVM0001|VMGENCTR|VM_GEN", booted), booted  # its driver has it
            m.console.expect(b"reseeded 0 times", BOOT_SECONDS)
            assert running.stop().reason == reasons.STOPPED
        with m.snapshot() as s:
            s.save(snapshot)
            answers = {"original": ask(m, b"kept")}
            s.restore()
            answers["reset"] = ask(m, b"kept")
            s.restore(identity="new")
            answers["reset, another"] = ask(m, b"told")
    done = subprocess.run(
        [sys.executable, "-c", CLONES, str(snapshot), "new:told", "new:told", "keep:kept"],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    print(done.stdout[-3000:], done.stderr[-3000:])
    assert done.returncode == 0
    one, two, kept = ANSWER.findall(done.stdout)
    answers.update({"one": one, "two": two, "kept": kept})
    for name, answer in answers.items():
        print(f"{name}: {answer}")
    own = [answers[name] for name in ("original", "one", "two", "reset, another")]
    assert len({numbers for numbers, _ in own}) == len(own)
    assert [reseeded for _, reseeded in own] == ["0", "1", "1", "1"]
    assert answers["reset"][1] == kept[1] == "0"


def ask(m: pykvm.Machine, what: bytes) -> tuple[str, str]:
    """16 random bytes of the guest's, and how often it has reseeded for a clone."""
    with m.start(timeout=BOOT_SECONDS) as running:
        m.console.write(what + b"\n")
        said = m.console.expect(re.compile(rb"random \w+ reseeded \d+\r?\n"), BOOT_SECONDS)
        running.stop()
    found = ANSWER.search(said.decode())
    assert found, said
    return found[1], found[2]
