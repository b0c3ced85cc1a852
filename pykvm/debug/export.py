"""Traces as files: JSON lines, and the trace format that Chrome's and Perfetto's viewers read.

JSON lines: an object a line. The first has ``pykvm_trace`` (the version, 1), ``lost`` and
``stats``; each other one is an :class:`~pykvm.debug.events.Event` with its attributes, those
without a value left out. The other format is Google's "Trace Event Format", whose viewer is
ui.perfetto.dev: a process for the guest, a thread for each vCPU, a slice for each stay in KVM_RUN
and for each exit that was served. Both can be read back.
"""

from __future__ import annotations

import json
import os

from pykvm.debug.events import Event, Recording

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any

    from pykvm.debug.trace import Trace
    from pykvm.machine import Machine

VERSION = 1
FORMATS = ("jsonl", "chrome")
_DEFAULTS = {"address": None, "size": 0, "count": 1, "is_write": False, "data": None, "rip": None,
             "inside": 0.0, "spent": None, "number": 0}  # fmt: skip
_NO_EVENT = (ValueError, TypeError, KeyError, AttributeError, RecursionError)
_LONGEST = 1e12
"""Seconds of a time that is one."""
_INTS = ("cpu", "address", "size", "count", "data", "rip", "number")


def save(recording: Recording, path: Any, format: str = "") -> None:
    """Write a recording to a file.

    Raises:
        ValueError: a format that there is not.
        OSError: the file cannot be written.
    """
    format = format or ("chrome" if os.fspath(path).endswith(".json") else "jsonl")
    if format not in FORMATS:
        raise ValueError(f"a trace is saved as {' or '.join(FORMATS)}, not as {format!r}")
    with open(path, "w", encoding="ascii") as file:
        if format == "chrome":
            json.dump(to_chrome(recording), file)
        else:
            file.writelines(line + "\n" for line in to_lines(recording))


def load(path: Any) -> Recording:
    """Read a file of either format.

    Raises:
        ValueError: it is none; says which line or which entry.
        OSError: it cannot be read.
    """
    name = os.fspath(path)
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        first, _, rest = text.partition("\n")
        head = json.loads(first)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is no trace: {error}") from None
    if isinstance(head, dict) and "traceEvents" in head and not rest.strip():
        return from_chrome(head, name)
    if not isinstance(head, dict) or "pykvm_trace" not in head:
        raise ValueError(f"{name} is no trace: its first line has no pykvm_trace")
    if head["pykvm_trace"] != VERSION:
        raise ValueError(f"{name} has version {head['pykvm_trace']}: this pykvm reads {VERSION}")
    events = []
    for number, line in enumerate(rest.splitlines(), 2):
        try:
            events.append(_event(json.loads(line)))
        except _NO_EVENT as error:
            raise ValueError(f"{name}, line {number} is no event: {error}") from None
    return _recording(events, head, name)


def _recording(events: list[Event], head: dict[str, Any], name: str) -> Recording:
    lost, stats = head.get("lost", 0), head.get("stats") or {}
    good = isinstance(stats, dict) and all(
        isinstance(values, dict) and all(isinstance(value, int) for value in values.values())
        for values in stats.values()
    )
    if not isinstance(lost, int) or not good:
        raise ValueError(f"{name} is no trace: its lost or its stats make no sense")
    return Recording(events, lost, stats)


class traced:
    """For the length of a ``with``: what a machine exits for, into a file at the end.

    Args:
        machine: the ``Machine``.
        path: the file, which is opened at once: better now than after the run. None: no trace.
        filters: see :class:`~pykvm.debug.events.Filter`.

    Raises:
        ValueError: a filter makes no sense.
        OSError: the file cannot be written.
    """

    def __init__(self, machine: Machine, path: str | None, filters: Iterable[str] = ()) -> None:
        self._trace = None if path is None else machine.trace(*filters)
        self._path = path
        if path is not None:
            with open(path, "w"):
                pass

    def __enter__(self) -> Trace | None:
        if self._trace is not None:
            self._trace.begin()
        return self._trace

    def __exit__(self, *exc: object) -> None:
        if self._trace is not None:
            self._trace.end()
            self._trace.save(self._path)


def to_lines(recording: Recording) -> Iterator[str]:
    """The lines of a JSON lines file."""
    head = {"pykvm_trace": VERSION, "lost": recording.lost, "stats": recording.stats}
    yield json.dumps(head)
    for event in recording.events:
        yield json.dumps(_fields(event))


def _fields(event: Event) -> dict[str, Any]:
    fields: dict[str, Any] = {"time": event.time, "cpu": event.cpu, "reason": event.reason}
    for name, default in _DEFAULTS.items():
        value = getattr(event, name)
        if value != default:
            fields[name] = value
    return fields


def _event(fields: Any) -> Event:
    fields = dict(fields)
    event = Event(
        float(fields.pop("time")), fields.pop("cpu"), str(fields.pop("reason")),
        **{name: fields[name] for name in _DEFAULTS if name in fields},
    )  # fmt: skip
    for name in _INTS:
        value = getattr(event, name)
        if value is not None and (not isinstance(value, int) or value < 0):
            raise ValueError(f"{name} is {value!r}")
    for name in ("time", "inside", "spent"):
        value = getattr(event, name)
        if value is not None and not (isinstance(value, int | float) and abs(value) < _LONGEST):
            raise ValueError(f"{name} is {value!r}")
    return event


def to_chrome(recording: Recording) -> dict[str, Any]:
    """The object of a Chrome trace: times in microseconds, ``ph`` X slices, M names."""
    entries: list[dict[str, Any]] = [
        {"ph": "M", "pid": 1, "tid": 0, "name": "process_name", "args": {"name": "guest"}}
    ]
    events = recording.events
    for cpu in sorted({event.cpu for event in events}):
        entries.append(
            {"ph": "M", "pid": 1, "tid": cpu, "name": "thread_name", "args": {"name": f"vcpu{cpu}"}}
        )
    for event in events:
        at = {"ph": "X", "pid": 1, "tid": event.cpu}
        if event.inside:
            began = event.time - event.inside
            entries.append(
                {**at, "name": "KVM_RUN", "cat": "guest", "ts": began * 1e6,
                 "dur": event.inside * 1e6}
            )  # fmt: skip
        entries.append(
            {**at, "name": event.where, "cat": event.reason, "ts": event.time * 1e6,
             "dur": (event.spent or 0.0) * 1e6, "args": _fields(event)}
        )  # fmt: skip
    return {
        "traceEvents": entries,
        "displayTimeUnit": "ns",
        "otherData": {"pykvm_trace": VERSION, "lost": recording.lost, "stats": recording.stats},
    }


def from_chrome(trace: Any, name: str = "trace") -> Recording:
    """A recording from such an object, if pykvm wrote it.

    Raises:
        ValueError: it did not.
    """
    other, entries = trace.get("otherData"), trace.get("traceEvents")
    if not isinstance(other, dict) or other.get("pykvm_trace") != VERSION:
        raise ValueError(f"{name} was not written by pykvm: its otherData does not say so")
    if not isinstance(entries, list):
        raise ValueError(f"{name} is no trace: its traceEvents are no list")
    events = []
    for number, entry in enumerate(entries):
        try:
            if entry.get("ph") == "X" and entry.get("cat") != "guest":
                events.append(_event(entry["args"]))
        except _NO_EVENT as error:
            raise ValueError(f"{name}, entry {number} is no event: {error}") from None
    return _recording(events, other, name)
