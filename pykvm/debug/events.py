"""What a trace consists of: events, in order of time, and which of them are wanted."""

from __future__ import annotations

from pykvm.kvm import exits

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from pykvm.debug.summary import Summary

ANY = 0xFFFFFFFF
_LAST = (1 << 64) - 1


def _names() -> dict[int, str]:
    kinds: list[Any] = [getattr(exits, each) for each in exits.__all__]
    return {
        kind.reason: kind.name.removeprefix("KVM_EXIT_").lower()
        for kind in kinds
        if isinstance(getattr(kind, "name", None), str) and kind.name
    }


NAMES: dict[int, str] = _names()
"""KVM_EXIT_* as a trace names it: ``KVM_EXIT_X86_RDMSR`` is ``x86_rdmsr``."""
_NUMBERS = {name: number for number, name in NAMES.items()}


class Event:
    """One exit of a vCPU.

    Attributes:
        time: seconds since the trace began, when KVM_RUN returned.
        cpu: index of the vCPU.
        reason: KVM's name of the exit without its prefix, in lower case: ``io``, ``mmio``, ``hlt``.
        address: port, guest-physical address or MSR; None for what has none.
        size: bytes of an item, or 0.
        count: items of a string instruction, else 1.
        is_write: True for OUT, stores and WRMSR.
        data: what was written or, of a read that was answered, read: little endian, at most eight
            bytes; None for what has none.
        rip: the instruction pointer, where KVM stored registers at this exit; else None.
        inside: seconds that KVM_RUN took before.
        spent: seconds from the exit until the vCPU was entered again, handlers included; None if
            the trace ended first.
        number: the vCPU's count of exits, its low 32 bits.
    """

    __slots__ = ("address", "count", "cpu", "data", "inside", "is_write", "number", "reason", "rip",
                 "size", "spent", "time")  # fmt: skip

    def __init__(
        self,
        time: float,
        cpu: int,
        reason: str,
        *,
        address: int | None = None,
        size: int = 0,
        count: int = 1,
        is_write: bool = False,
        data: int | None = None,
        rip: int | None = None,
        inside: float = 0.0,
        spent: float | None = None,
        number: int = 0,
    ) -> None:
        self.time = time
        self.cpu = cpu
        self.reason = reason
        self.address = address
        self.size = size
        self.count = count
        self.is_write = is_write
        self.data = data
        self.rip = rip
        self.inside = inside
        self.spent = spent
        self.number = number

    @property
    def where(self) -> str:
        """Reason, address and direction in a word: ``io 0x3f8 out``; what a histogram counts."""
        if self.address is None or self.reason == "debug":
            return self.reason
        words = ("out", "in") if self.reason == "io" else ("write", "read")
        text = f"{self.reason} {self.address:#x}"
        return f"{text} {words[0] if self.is_write else words[1]}" if self.size else text

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Event):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in Event.__slots__)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        text = f"{self.time * 1e6:.1f} us, cpu {self.cpu}: {self.where}"
        if self.data is not None:
            text += f" {self.data:#0{2 * min(self.size, 8) + 2}x}"
        if self.count > 1:
            text += f" × {self.count}"
        if self.rip is not None:
            text += f" at {self.rip:#x}"
        return f"<{text}>"


class Recording:
    """Events and what belongs to them; a live trace is one, and what was read from a file.

    Attributes:
        events: in order of time.
        lost: exits that were wanted and overwritten by later ones.
        stats: how KVM's own statistics grew meanwhile: ``{"vm": {…}, "cpu 0": {…}}``.
    """

    events: list[Event]
    lost: int
    stats: dict[str, dict[str, int]]

    def __init__(
        self,
        events: Iterable[Event],
        lost: int = 0,
        stats: dict[str, dict[str, int]] | None = None,
    ) -> None:
        self.events = sorted(events, key=lambda event: event.time)
        self.lost = lost
        self.stats = stats or {}

    def summary(self) -> Summary:
        """Histograms, the slowest handlers and a timeline; it shows itself in notebooks."""
        from pykvm.debug.summary import Summary

        return Summary(self)

    def save(self, path: Any, format: str = "") -> None:
        """Write it: ``"jsonl"`` or ``"chrome"``; by default what the name says (.json: chrome)."""
        from pykvm.debug.export import save

        save(self, path, format)

    def _repr_svg_(self) -> str:
        return self.summary()._repr_svg_()

    def _repr_html_(self) -> str:
        return self.summary()._repr_html_()


class Filter:
    """Which exits are wanted: ``io``, ``io:0x3f8-0x3ff``, ``io:0xe9:w``, ``mmio:0xd0000000:r``.

    Attributes:
        reason: KVM_EXIT_*, or ANY.
        first, last: addresses, inclusive.
        direction: 0 both, 1 writes, 2 all others.
    """

    __slots__ = ("direction", "first", "last", "reason")

    def __init__(self, text: str) -> None:
        """Raises ValueError, with what is wrong."""
        name, *rest = text.strip().lower().split(":")
        if name not in _NUMBERS and name != "any":
            raise ValueError(
                f"filter {text!r}: {name!r} is no exit ({', '.join(sorted(_NUMBERS))})"
            )
        self.reason = _NUMBERS.get(name, ANY)
        self.first, self.last, self.direction = 0, _LAST, 0
        if rest and rest[-1] in ("r", "w"):
            self.direction = 1 if rest.pop() == "w" else 2
        if rest:
            first, _, last = rest.pop(0).partition("-")
            try:
                self.first, self.last = int(first, 0), int(last or first, 0)
            except ValueError:
                raise ValueError(f"filter {text!r}: an address or FIRST-LAST is missing") from None
            if not 0 <= self.first <= self.last <= _LAST:
                raise ValueError(f"filter {text!r}: no range of addresses")
        if rest:
            raise ValueError(f"filter {text!r}: EXIT[:ADDRESS[-ADDRESS]][:r|:w]")
