"""``python -m tests.powercut --cuts N [--seed S]``: exit status 1 if anything was lost."""

from __future__ import annotations

import argparse
import random
import sys
import time

from tests.powercut.simulate import simulate

parser = argparse.ArgumentParser(prog="python -m tests.powercut")
parser.add_argument("--cuts", type=int, default=10_000, metavar="N")
parser.add_argument("--seed", type=int, default=None, metavar="S", help="default: any")
arguments = parser.parse_args()
seed = random.randrange(1 << 32) if arguments.seed is None else arguments.seed
began = time.monotonic()
tally = simulate(arguments.cuts, seed)
print(
    f"seed {seed}: {tally.cuts} power cuts in {tally.requests} requests, {tally.flushes} flushes"
    f" acknowledged, {len(tally.lost)} lost, {time.monotonic() - began:.1f} s"
)
for line in tally.lost[:20]:
    print(f"lost: {line}")
sys.exit(bool(tally.lost))
