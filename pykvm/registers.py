"""Descriptors that make the system registers in a vCPU's run page attributes of :class:`pykvm.Cpu`.

The general ones are written in C, ``csrc/registers.c``: handlers read them on every exit.
"""

from __future__ import annotations

from _operator import index  # `operator` itself costs an import

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Self, overload

    from pykvm.cpu import Cpu

SREGS = 2


def _fits(name: str, value: int, bits: int) -> int:
    try:
        number = index(value)
    except TypeError:
        raise TypeError(f"{name} takes an int, not {type(value).__name__}") from None
    if 0 <= number < 1 << bits:
        return number
    raise ValueError(f"{name} has {bits} bits: {number:#x} does not fit")


class _Register:
    """What all have in common: the attribute's own name, for messages."""

    __slots__ = ("name",)

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name


class Control(_Register):
    """A control register, EFER or the APIC base, in ``struct kvm_sregs``."""

    __slots__ = ("field",)

    def __init__(self, field: str) -> None:
        self.field = field

    if TYPE_CHECKING:

        @overload
        def __get__(self, cpu: None, owner: type) -> Self: ...

        @overload
        def __get__(self, cpu: Cpu, owner: type) -> int: ...

    def __get__(self, cpu: Cpu | None, owner: type) -> Self | int:
        if cpu is None:
            return self
        value: int = getattr(cpu.load_sregs(), self.field)
        return value

    def __set__(self, cpu: Cpu, value: int) -> None:
        struct = cpu.load_sregs()
        try:
            setattr(struct, self.field, value)
        except (TypeError, OverflowError):  # cffi's words for it, not ours
            setattr(struct, self.field, _fits(self.name, value, 64))
        cpu.dirty(SREGS)


class Field(_Register):
    """A field of a segment or descriptor-table view; ``bits`` as api.rst has the structure."""

    __slots__ = ("bits",)

    def __init__(self, bits: int) -> None:
        self.bits = bits

    if TYPE_CHECKING:

        @overload
        def __get__(self, view: None, owner: type) -> Self: ...

        @overload
        def __get__(self, view: _View, owner: type) -> int: ...

    def __get__(self, view: _View | None, owner: type) -> Self | int:
        if view is None:
            return self
        value: int = getattr(view.struct(), self.name)
        return value

    def __set__(self, view: _View, value: int) -> None:
        setattr(view.struct(), self.name, _fits(f"{view.name}.{self.name}", value, self.bits))
        view.cpu.dirty(SREGS)


class _View:
    """A structure inside ``struct kvm_sregs``, read and written in place."""

    __slots__ = ("cpu", "name")

    def __init__(self, cpu: Cpu, name: str) -> None:
        self.cpu = cpu
        self.name = name

    def struct(self) -> Any:
        """The cffi structure in the run page, up to date."""
        return getattr(self.cpu.load_sregs(), self.name)


class SegmentView(_View):
    """A segment register with its hidden part: ``struct kvm_segment`` (SDM Vol. 3A §3.4.3)."""

    __slots__ = ()

    base = Field(64)
    limit = Field(32)
    selector = Field(16)
    type = Field(4)
    present = Field(1)
    dpl = Field(2)
    db = Field(1)
    s = Field(1)
    l = Field(1)  # noqa: E741  api.rst's own name
    g = Field(1)
    avl = Field(1)
    unusable = Field(1)

    def __repr__(self) -> str:
        from pykvm.arch.x86_64.segments import Segment

        return f"<{self.name} {Segment.of(self.struct())!r}>"


class TableView(_View):
    """GDTR or IDTR: ``struct kvm_dtable``."""

    __slots__ = ()

    base = Field(64)
    limit = Field(16)

    def __repr__(self) -> str:
        return f"<{self.name} base {self.base:#x} limit {self.limit:#x}>"


class SegmentSlot(_Register):
    """A segment register of a vCPU; assign a ``Segment`` to load it whole."""

    __slots__ = ("field",)

    def __init__(self, field: str) -> None:
        self.field = field

    if TYPE_CHECKING:

        @overload
        def __get__(self, cpu: None, owner: type) -> Self: ...

        @overload
        def __get__(self, cpu: Cpu, owner: type) -> SegmentView: ...

    def __get__(self, cpu: Cpu | None, owner: type) -> Self | SegmentView:
        return self if cpu is None else SegmentView(cpu, self.field)

    def __set__(self, cpu: Cpu, value: Any) -> None:
        from pykvm.arch.x86_64.segments import Segment

        Segment.of(value.struct() if isinstance(value, SegmentView) else value).apply(
            getattr(cpu.load_sregs(), self.field)
        )
        cpu.dirty(SREGS)


class TableSlot(_Register):
    """GDTR or IDTR of a vCPU; assign anything with ``base`` and ``limit``."""

    __slots__ = ("field",)

    def __init__(self, field: str) -> None:
        self.field = field

    if TYPE_CHECKING:

        @overload
        def __get__(self, cpu: None, owner: type) -> Self: ...

        @overload
        def __get__(self, cpu: Cpu, owner: type) -> TableView: ...

    def __get__(self, cpu: Cpu | None, owner: type) -> Self | TableView:
        return self if cpu is None else TableView(cpu, self.field)

    def __set__(self, cpu: Cpu, value: Any) -> None:
        view = TableView(cpu, self.field)
        view.base, view.limit = value.base, value.limit
