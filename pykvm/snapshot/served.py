"""What code serves in a machine: ranges, MSRs and exits that no snapshot can make again.

They are written down, so that a fork can say who is missing in it, and where.
"""

from __future__ import annotations

from pykvm.snapshot.claims import describe
from pykvm.snapshot.devices import functions

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Any

    from pykvm.devices.bus import Bus
    from pykvm.devices.claim import Claim

    Hooks = Mapping[str, Mapping[int, Any]]
    Served = list[dict[str, Any]]

MSR, EXIT = "MSR", "exit"
"""What a ``Hooks`` has, beside the buses: handlers by index, and by exit reason."""
PCI = "pci"
"""Where functions of the PCI bus are, by number."""


def capture(buses: Iterable[Bus], hooks: Hooks) -> Served:
    """Everything but what ``claims.give()`` makes again.

    What is on a PCI bus has its number: the guest may move its ranges.
    """
    buses = list(buses)
    on_pci = dict(functions((bus, claim) for bus in buses for claim in bus))
    bars = (bar for function in on_pci.values() for bar in function.bars.values())
    moving = {id(claim) for bar in bars for claim in bar.claims}
    found: Served = []
    for name, function in on_pci.items():
        number = int(name.removeprefix(f"{PCI}:"))
        found.append({"by": _name(function), "on": PCI, "first": number, "last": number})
    found += [
        {"by": _who(claim), "on": bus.name, "first": claim.first, "last": claim.last}
        for bus in buses
        for claim in bus
        if id(claim) not in moving and describe(claim) is None
    ]
    for kind, handlers in hooks.items():
        found += [
            {"by": _name(handler), "on": kind, "first": number, "last": number}
            for number, handler in handlers.items()
        ]
    return found


def _who(claim: Claim) -> str:
    if claim.handler is None and claim.device is None:
        return "an eventfd"
    return _name(claim.handler if claim.device is None else claim.device)


def _name(what: Any) -> str:
    """A device's class, whatever its transport, or a function's name."""
    owner = getattr(what, "__self__", what)
    if callable(owner):
        return str(getattr(what, "__qualname__", type(what).__name__))
    return type(getattr(owner, "device", owner)).__name__


def shown(each: Mapping[str, Any]) -> str:
    """In words: ``Serial at pio 0x3f8..0x3ff``, ``on_tick at exit hlt``."""
    first, last = each["first"], each["last"]
    where: str = f"{first:#x}"
    if each["on"] == EXIT:
        from pykvm.debug.events import NAMES

        where = NAMES.get(first, f"{first}")
    end = f"..{last:#x}" if last > first else ""
    return f"{each['by']} at {each['on']} {where}{end}"


def missing(served: Served, buses: Iterable[Bus], hooks: Hooks) -> Served:
    """What of it nobody serves in this machine. What has a state was missed before."""
    by_name = {bus.name: bus for bus in buses}
    lacking = []
    for each in served:
        bus, known = by_name.get(each["on"]), hooks.get(each["on"])
        if bus is not None:
            claim = bus.find(each["first"])
            there = claim is not None and claim is not bus.rest
        else:
            there = known is None or each["first"] in known
        if not there:
            lacking.append(each)
    return lacking


def warn(served: Served, buses: Iterable[Bus], hooks: Hooks) -> None:
    """Say in the name of ``fork()``'s caller what is :func:`missing`, and what to do."""
    lacking = missing(served, buses, hooks)
    if lacking:
        import warnings

        warnings.warn(
            "nobody serves in this fork what code served in the original:"
            f" {', '.join(map(shown, lacking))} (fork(setup) calls setup(machine), which is to"
            " attach handlers, or to ignore a range: machine.pio.ignore(port))",
            RuntimeWarning,
            stacklevel=3,
        )


def of_json(said: Iterable[Mapping[str, Any]]) -> Served:
    """What a file says. KeyError, TypeError, ValueError: nothing that makes sense."""
    return [
        {
            "by": str(each["by"]),
            "on": str(each["on"]),
            "first": int(each["first"]),
            "last": int(each["last"]),
        }
        for each in said
    ]
