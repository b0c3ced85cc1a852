"""The devices of a machine, found by what they serve: what has ``state()`` and ``restore()``."""

from __future__ import annotations

from pykvm.errors import GuestError, SnapshotError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from typing import Any

    from pykvm.devices.bus import Bus

    Served = Iterable[Mapping[str, Any]]


def find(buses: Iterable[Bus]) -> dict[str, Any]:
    """Every device with a state, by the first port or address that it serves: ``"pio:0x3f8"``.

    A device is what stands behind a claim's C action, or the object whose method serves it. One
    that serves several ranges is found once. What is on a PCI bus is found by its number,
    ``"pci:1"``, wherever the guest has put its BARs.
    """
    found: dict[str, Any] = {}
    seen: set[int] = set()
    claims = [(bus, claim) for bus in buses for claim in bus.claims()]
    for function_name, function in functions(claims):
        found[function_name] = function
        for bar in function.bars.values():
            seen |= {id(claim) for claim in bar.claims}
    for bus, claim in claims:
        if id(claim) not in seen:
            for device in (claim.device, getattr(claim.handler, "__self__", None)):
                if (
                    device is not None
                    and id(device) not in seen
                    and callable(getattr(device, "state", None))
                    and callable(getattr(device, "restore", None))
                ):
                    seen.add(id(device))
                    found[_key(bus.name, claim.first)] = device
    return found


def functions(claims: Iterable[tuple[Bus, Any]]) -> Iterator[tuple[str, Any]]:
    """Everything on a PCI bus, by the handler of whose registers the bus itself is found."""
    roots: list[Any] = []
    for _, claim in claims:
        root: Any = getattr(claim.handler, "__self__", None)
        if hasattr(root, "functions") and root not in roots:
            roots.append(root)
            for number, function in root.functions.items():
                yield _key("pci", number), function


def capture(devices: dict[str, Any]) -> dict[str, Any]:
    """The state of each, as plain data."""
    return {name: device.state() for name, device in devices.items()}


def restore(devices: dict[str, Any], states: dict[str, Any], served: Served = ()) -> None:
    """Put each device back, then have those that may have lost a doorbell look for work.

    Args:
        devices: of the machine.
        states: of the snapshot.
        served: who served what in the machine that the snapshot is of.

    Raises:
        SnapshotError: a device of the snapshot is not there, or does not take its state. A device
            that came later is left as it is.
    """
    missing = sorted(name for name in states if name not in devices)
    if missing:
        from pykvm.snapshot.served import shown

        words = {_key(each["on"], each["first"]): shown(each) for each in served}
        text = ", ".join(words.get(name, name) for name in missing)
        raise SnapshotError(
            f"the snapshot has the state of devices that this machine lacks: {text}"
            " (fork(setup) calls setup(machine), which is to attach them)"
        )
    for name, state in states.items():
        try:
            devices[name].restore(state)
        except (
            LookupError,
            TypeError,
            ValueError,
            AttributeError,
            ArithmeticError,
            GuestError,
        ) as error:
            raise SnapshotError(
                f"{type(devices[name]).__name__} at {name} does not take its state: {error!r}"
            ) from error


def _key(on: str, first: int) -> str:
    """The name that :func:`find` has for a device."""
    return f"{on}:{first}" if on == "pci" else f"{on}:{first:#x}"


def resume(devices: dict[str, Any]) -> None:
    """After everything is back: look for what was asked for and not done."""
    for device in devices.values():
        inner = getattr(device, "device", device)
        if callable(getattr(inner, "resume", None)):
            inner.resume()
