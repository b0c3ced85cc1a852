"""A host that fails: the door to the system calls of a disk, with one of them going wrong."""

from __future__ import annotations

import os
from collections.abc import Sequence

from pykvm.devices.disk.base import part
from pykvm.devices.disk.host import HostFile


class FaultyFile(HostFile):
    """Numbers its system calls from 0 on; the one that was chosen fails, or does too little.

    Attributes:
        calls: the name of each call so far.
        at: the number of the call that goes wrong.
        error: the errno it fails with; 0: it is done in part.
        most: how many bytes a call done in part does.
    """

    def __init__(self, fd: int, path: str) -> None:
        super().__init__(fd, path)
        self.calls: list[str] = []
        self.at = -1
        self.error = 0
        self.most = 0

    def _call(self, name: str) -> bool:
        """Count one; whether it is to be done in part."""
        number = len(self.calls)
        self.calls.append(name)
        if number != self.at:
            return False
        if self.error:
            raise OSError(self.error, os.strerror(self.error), self.path)
        return True

    @property
    def hit(self) -> str:
        """The call that went wrong, or "" if it never came to that."""
        return self.calls[self.at] if 0 <= self.at < len(self.calls) else ""

    def preadv(self, views: Sequence[memoryview], offset: int) -> int:  # type: ignore[override]
        if self._call("read"):
            views = part(views, 0, self.most)
        return super().preadv(views, offset)

    def pwritev(  # type: ignore[override]
        self, views: Sequence[memoryview], offset: int, sync: bool
    ) -> int:
        if self._call("write"):
            views = part(views, 0, self.most)
        return super().pwritev(views, offset, sync)

    def fdatasync(self) -> None:
        self._call("fdatasync")
        super().fdatasync()

    def punch(self, offset: int, length: int) -> None:
        self._call("punch")
        super().punch(offset, length)

    def zero(self, offset: int, length: int) -> None:
        self._call("zero")
        super().zero(offset, length)
