"""What C serves, as plain data, so that another machine can be given the same."""

from __future__ import annotations

from pykvm._abi import lib
from pykvm.errors import BusOverlapError, SnapshotError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from pykvm.devices.bus import Bus
    from pykvm.devices.claim import Claim


def capture(buses: Iterable[Bus]) -> list[dict[str, Any]]:
    """Claims that :func:`give` can make again: those without Python and without a descriptor."""
    found = []
    for bus in buses:
        for claim in bus.claims():
            what = describe(claim)
            if what is not None:
                rest = claim is bus.rest
                found.append({"bus": bus.name, "rest": rest, "first": claim.first, **what})
    return found


def describe(claim: Claim) -> dict[str, Any] | None:
    """What :func:`give` needs to make it again, but for its place; None: it is not C's alone."""
    length = claim.last - claim.first + 1
    read, write, value = claim.on_read, claim.on_write, claim.value
    if write == lib.PYKVM_IGNORE and read == lib.PYKVM_IGNORE:
        return {"action": "ignore", "length": length}
    if write == lib.PYKVM_IGNORE and read == lib.PYKVM_CONSTANT:
        return {"action": "constant", "length": length, "value": value}
    if write == lib.PYKVM_STOP:
        given = value if read == lib.PYKVM_CONSTANT else None
        return {"action": "stop", "length": length, "tag": claim.tag, "value": given}
    if write == lib.PYKVM_FIFO:
        return {"action": "fifo", "empty": value, "capacity": int(claim.device.output.c.capacity)}
    if write == lib.PYKVM_LOG:
        capacity = int(claim.device.output.c.capacity)
        return {"action": "log", "length": length, "value": value, "capacity": capacity}
    if write == lib.PYKVM_CLOCK:
        return {"action": "clock", "length": length, "hz": claim.device.hz}
    if write == lib.PYKVM_LATCH:
        return {"action": "latch"}
    return None


def give(claims: Iterable[dict[str, Any]], buses: Iterable[Bus]) -> None:
    """Make the claims; one whose place is taken already is somebody's."""
    by_name = {bus.name: bus for bus in buses}
    for claim in claims:
        try:
            bus = by_name[claim["bus"]]
            if claim["rest"]:
                if bus.rest is None:
                    bus.unclaimed("log" if claim["action"] == "log" else "ignore")
                continue
            options = {key: value for key, value in claim.items() if key not in _PLACE}
            if claim["action"] not in ACTIONS:
                raise SnapshotError(f"no such action: {claim['action']!r}")
            getattr(bus, claim["action"])(claim["first"], **options)
        except BusOverlapError:
            pass
        except (LookupError, TypeError, ValueError, ArithmeticError, MemoryError) as error:
            raise SnapshotError(f"a claim that cannot be made: {claim}: {error!r}") from error


_PLACE = ("bus", "rest", "first", "action")
ACTIONS = ("ignore", "constant", "stop", "fifo", "log", "clock", "latch")
