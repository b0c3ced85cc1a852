"""Where a fuzzer's inputs come from: changes to those that got somewhere new.

::

    corpus = Corpus([b"seed"])
    for outcome in m.fuzz(s, corpus, write_at=0x20000, coverage=(0x30000, 4096)):
        corpus.learn(outcome)
"""

from __future__ import annotations

import random

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pykvm.outcome import Outcome


class Corpus:
    """An endless iterator of inputs, which learns.

    Every input that reached something new is swept first, the latest one before the others: each of
    its bytes takes all 256 values. When nothing is left to sweep, inputs are changed at random. The
    same seed and the same outcomes give the same inputs.

    Args:
        seeds: inputs to begin with.
        seed: of the random changes.
        most: bytes that an input may have.

    Attributes:
        inputs: those that got somewhere new, and the seeds.
    """

    def __init__(self, seeds: Iterable[bytes], *, seed: int = 0, most: int = 4096) -> None:
        self.inputs = [bytes(each) for each in seeds]
        if not self.inputs:
            raise ValueError("a corpus begins with at least one input")
        self._random = random.Random(seed)
        self._most = most
        self._sweeps: list[Iterator[bytes]] = [self._sweep(each) for each in self.inputs]
        self._new = list(self.inputs)  # unchanged first

    def learn(self, outcome: Outcome) -> None:
        """Keep the input of an outcome if it reached something new."""
        if outcome.fresh:
            self.inputs.append(outcome.input)
            self._sweeps.append(self._sweep(outcome.input))

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if self._new:
            return self._new.pop(0)
        while self._sweeps:
            for data in self._sweeps[-1]:
                return data
            self._sweeps.pop()
        return self._change(self._random.choice(self.inputs))

    @staticmethod
    def _sweep(data: bytes) -> Iterator[bytes]:
        for at, old in enumerate(data):
            for value in range(256):
                if value != old:
                    yield data[:at] + bytes((value,)) + data[at + 1 :]

    def _change(self, data: bytes) -> bytes:
        """A few changes at random: a byte, a bit, a cut, a copy, a piece of another input."""
        pick, changed = self._random, bytearray(data)
        for _ in range(1 << pick.randrange(5)):
            at = pick.randrange(len(changed) + 1)
            kind = pick.randrange(6)
            if kind == 0 and at < len(changed):
                changed[at] = pick.randrange(256)
            elif kind == 1 and at < len(changed):
                changed[at] ^= 1 << pick.randrange(8)
            elif kind == 2:
                del changed[at : at + pick.randrange(1, 9)]
            elif kind == 3:
                changed[at:at] = pick.randbytes(pick.randrange(1, 9))
            elif kind == 4:
                changed[at:at] = changed[at : at + pick.randrange(1, 33)]
            else:
                other = pick.choice(self.inputs)
                start = pick.randrange(len(other) + 1)
                changed[at:] = other[start : start + pick.randrange(1, 65)]
        return bytes(changed[: self._most])
