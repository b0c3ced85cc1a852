"""The guests that come with pykvm, and guests from files: find them, run them, build them.

A shipped guest is a folder with its source, a README, the image (so that running it needs no
toolchain), the output it must produce, and ``guest.toml``::

    summary = "what it shows, in a line"
    [machine]               # all optional
    memory = "2M"
    cpus = 1
    irqchip = false         # or "kernel" (true), "split"
    pit = false             # a timer; needs irqchip = "kernel"
    pic = "reset"           # or "bios"; the same
    counter = false         # the exit counter of guests/exits
    virtio = []             # devices, "rng" or "console": virtio-mmio windows from 0xd0000000 on
    [enter]
    mode = "long64"         # real16, prot32, long64; an ELF image says so itself
    at = 0x8000             # where a flat image is loaded and entered
    ring = 0
    iopl = 0
    [run]
    timeout = 5.0           # seconds
    [expect]
    reason = "halted"       # pykvm.result
    code = 0                # for reason "debug-exit"

The convention of all guests: bytes written to port 0xe9 are the console, a byte written to port
0xf4 ends the run and is the exit code, HLT on every processor ends it too. A processor finds its
number in RDI and how many there are in RSI.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pykvm.boot import elf, flat
from pykvm.errors import AsmError, BootError
from pykvm.guest_devices import ExitCounter, add_virtio

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from pykvm.machine import Machine
    from pykvm.result import RunResult

CONSOLE_PORT = 0xE9
EXIT_PORT = 0xF4

_DEFAULT_MODE = "long64"
_DEFAULT_AT = {"real16": 0x7C00, "prot32": 0x8000, "long64": 0x8000}
_SOURCES = (".S", ".s", ".asm")
_BUILD_SECONDS = 60.0
_CFLAGS = (
    "-std=c11", "-m64", "-O2", "-Wall", "-Wextra", "-Werror", "-ffreestanding", "-fno-pic",
    "-fno-stack-protector", "-fno-asynchronous-unwind-tables", "-fcf-protection=none",
    "-mno-red-zone", "-mgeneral-regs-only",
)  # fmt: skip
_LDFLAGS = (
    "-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none", "-Wl,-z,noexecstack",
    "-Wl,-z,max-page-size=4096",
)  # fmt: skip


class Guest:
    """A guest that can be run: a shipped one, or one from a file.

    Attributes:
        name: its folder's name, or the file's.
        summary: what it shows, in a line; "" for a file.
        path: its folder, or the file.
        image: the file with its code: flat, ELF, or assembler source.
        mode, at: the processor mode it starts in and where a flat image goes; None for ELF, which
            says both itself.
        ring, iopl: the privilege it starts with.
        memory, cpus, irqchip, pit, pic: the machine it wants, as ``Machine`` has them.
        counter: whether it wants the exit counter (see ``ExitCounter``).
        virtio: the virtio devices it wants, ``"rng"`` or ``"console"``, in the order of their
            windows; its vCPU serves them.
        timeout: seconds it may take.
        expected_reason, expected_code: how it must end, or None for a file.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        image: Path,
        *,
        summary: str = "",
        mode: str | None = None,
        at: int | None = None,
        ring: int = 0,
        iopl: int = 0,
        memory: str = "2M",
        cpus: int = 1,
        irqchip: str | bool | None = False,
        pit: bool = False,
        pic: str = "reset",
        counter: bool = False,
        virtio: Sequence[str] = (),
        timeout: float = 5.0,
        expected_reason: str | None = None,
        expected_code: int | None = None,
    ) -> None:
        self.name = name
        self.path = path
        self.image = image
        self.summary = summary
        self.mode = mode
        self.at = at
        self.ring = ring
        self.iopl = iopl
        self.memory = memory
        self.cpus = cpus
        self.irqchip = irqchip
        self.pit = pit
        self.pic = pic
        self.counter = counter
        self.virtio = tuple(virtio)
        self.timeout = timeout
        self.expected_reason = expected_reason
        self.expected_code = expected_code

    @property
    def source(self) -> Path | None:
        """The main source file, or None where there is none beside the image."""
        if self.image.suffix in _SOURCES:
            return self.image
        for name in (f"{self.name}.S", "main.c"):
            if (self.path / name).is_file():
                return self.path / name
        return None

    @property
    def readme(self) -> str:
        """The text of its README.md, or "" for a file."""
        file = self.path / "README.md"
        return file.read_text(encoding="utf-8") if file.is_file() else ""

    @property
    def expected_output(self) -> str | None:
        """What it must print, or None for a file."""
        file = self.path / "expected.txt"
        return file.read_text(encoding="utf-8") if file.is_file() else None

    def machine(self, path: str = "/dev/kvm") -> Machine:
        """A machine as it wants it.

        Args:
            path: the KVM device.

        Raises CapabilityError without KVM, ValueError for what does not go together.
        """
        from pykvm.machine import Machine

        return Machine(
            self.memory,
            cpus=self.cpus,
            irqchip=self.irqchip,
            pit=self.pit,
            pic=self.pic,
            path=path,
        )

    def data(self) -> bytes:
        """The image: the file's bytes, or what its source assembles to.

        Raises AsmError for a source the assembler refuses, and OSError.
        """
        if self.image.suffix in _SOURCES:
            from pykvm.assembler import asm_file

            mode: Any = self.mode
            return asm_file(self.image, mode, at=self.at or 0)
        return self.image.read_bytes()

    def prepare(self, machine: Machine, console: Callable[[bytes], object] | None = None) -> None:
        """Load the image into a machine and make its processors ready to run.

        Args:
            machine: one as the guest wants it.
            console: called with what it prints on a virtio console, as it comes.

        Raises BootError for an image that cannot be loaded, AsmError for a source.
        """
        data = self.data()
        if elf.is_elf(data):
            image = elf.load(machine.memory, data)
            mode, entry = self.mode or image.mode, image.entry
        else:
            mode = self.mode or _DEFAULT_MODE
            at = _DEFAULT_AT[mode] if self.at is None else self.at
            entry = flat.load(machine.memory, data, at)
        # With an interrupt controller the others wait until the guest starts them.
        for cpu in machine.cpus[: 1 if self.irqchip else None]:
            cpu.enter(mode, entry, ring=self.ring, iopl=self.iopl)
            cpu.rdi = cpu.index
            cpu.rsi = len(machine.cpus)
        if self.counter:
            ExitCounter(machine)
        for name in self.virtio:
            add_virtio(machine, name, console)

    def __repr__(self) -> str:
        return f"<Guest {self.name}: {self.summary or self.image}>"


def folder() -> Path:
    """Where the shipped guests are: in the installed package, or in the checkout beside it."""
    package = Path(__file__).resolve().parent
    for place in (package / "guests", package.parent / "guests"):
        if (place / "include" / "pykvm_guest.h").is_file():
            return place
    raise FileNotFoundError(f"the guests folder is neither in {package} nor beside it")


def names() -> list[str]:
    """The names of the shipped guests; ``hello`` is first."""
    found = [file.parent.name for file in folder().glob("*/guest.toml")]
    return sorted(found, key=lambda name: (name != "hello", name))


def find(name: str) -> Guest:
    """The shipped guest of that name.

    Raises LookupError listing the names there are.
    """
    if name not in names():
        raise LookupError(f"no guest is called {name!r}; there are {', '.join(names())}")
    import tomllib

    path = folder() / name
    with open(path / "guest.toml", "rb") as file:
        said = tomllib.load(file)
    enter, expect = said.get("enter", {}), said.get("expect", {})
    binary = path / f"{name}.bin"
    return Guest(
        name,
        path,
        binary if binary.is_file() else path / f"{name}.elf",
        summary=said["summary"],
        **said.get("machine", {}),
        **enter,
        **said.get("run", {}),
        expected_reason=expect.get("reason"),
        expected_code=expect.get("code"),
    )


def resolve(
    name_or_path: str,
    *,
    mode: str | None = None,
    at: int | None = None,
    memory: str | None = None,
    timeout: float | None = None,
) -> Guest:
    """The guest that ``pykvm run NAME|FILE`` means: a shipped name, or else a file.

    A file is an ELF executable (by its first bytes), an assembler source (.S, .s, .asm), or else a
    flat binary. Arguments that are given override what the guest says.

    Args:
        name_or_path: a name without a slash is looked up among the shipped guests first.
        mode: for a flat binary or a source, ``"long64"`` if not given, as in ``pykvm.asm``.
        at: load address, 0x7c00 in real mode and 0x8000 otherwise if not given.
        memory: as for ``Machine``.
        timeout: seconds.

    Raises LookupError where neither exists.
    """
    if os.sep not in name_or_path and name_or_path in names():
        guest = find(name_or_path)
    else:
        file = Path(name_or_path)
        if not file.is_file():
            raise LookupError(
                f"no guest and no file is called {name_or_path!r}; "
                f"the guests are {', '.join(names())}"
            )
        guest = Guest(file.name, file, file)
        with open(file, "rb") as opened:
            is_elf = elf.is_elf(opened.read(4))
        if not is_elf:
            guest.mode = mode or _DEFAULT_MODE
            guest.at = _DEFAULT_AT.get(guest.mode)
    guest.mode = mode or guest.mode
    guest.at = guest.at if at is None else at
    guest.memory = memory or guest.memory
    guest.timeout = guest.timeout if timeout is None else timeout
    return guest


def run_guest(
    guest: Guest,
    *,
    timeout: float | None = None,
    max_exits: int | None = None,
    console: Callable[[str], object] | None = None,
) -> tuple[str, RunResult]:
    """Run a guest on a machine made for it.

    Args:
        guest: from ``find`` or ``resolve``.
        timeout: seconds, if not the guest's own.
        max_exits: exits each processor may make.
        console: is called with each character as it is printed. Without it the console costs no
            Python per character.

    Returns:
        What it printed (bytes that are not ASCII come as Latin-1) and how it ended.

    Raises BootError and AsmError for its image, CapabilityError without KVM.
    """
    with guest.machine() as machine:
        printed: list[str] = []
        fifo = machine.pio.fifo(CONSOLE_PORT) if console is None else None

        def show(data: bytes) -> None:
            """From either console, in order."""
            if fifo is not None:
                printed.append(fifo.read().decode("latin-1"))
            for character in data.decode("latin-1"):
                printed.append(character)
                if console is not None:
                    console(character)

        def on_console(access: Any) -> None:
            if access.is_write:
                show(access.data[:1])

        if fifo is None:
            machine.on_pio(CONSOLE_PORT, on_console)
        machine.debug_exit(EXIT_PORT)
        guest.prepare(machine, show)
        seconds = guest.timeout if timeout is None else timeout
        result = machine.run(seconds, max_exits=max_exits)
        show(b"")
    return "".join(printed), result


def build_c(
    sources: Iterable[str | os.PathLike[str]], output: str | os.PathLike[str] | None = None
) -> bytes:
    """Compile a guest in C, with the header, start-up code and linker script of guests/include.

    Args:
        sources: C files (and .S files); one of them has ``int main(void)``.
        output: where to write the ELF executable, if anywhere.

    Returns:
        The ELF executable, for ``pykvm.boot.elf.load`` or a file.

    Raises AsmError with the compiler's words, or saying that gcc has to be installed.
    """
    import subprocess
    import tempfile

    include = folder() / "include"
    with tempfile.TemporaryDirectory(prefix="pykvm-guest-") as scratch:
        target = os.path.join(scratch, "guest.elf")
        command = ["gcc", *_CFLAGS, f"-I{include}", *_LDFLAGS, "-T", str(include / "guest.ld")]
        command += [str(include / "crt0.S"), str(include / "runtime.c")]
        for source in map(os.path.abspath, sources):  # __FILE__ without the builder's folders
            command += [f"-fmacro-prefix-map={os.path.dirname(source)}{os.sep}=", source]
        try:
            done = subprocess.run(
                [*command, "-o", target],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                env={**os.environ, "LC_ALL": "C"},
                timeout=_BUILD_SECONDS,
                check=False,
            )
        except FileNotFoundError:
            raise AsmError("gcc is not installed: `apt install gcc` or its like") from None
        except subprocess.TimeoutExpired:
            raise AsmError(f"gcc was still busy after {_BUILD_SECONDS:.0f} s") from None
        if done.returncode:
            raise AsmError(done.stderr.strip() or f"gcc ended with status {done.returncode}")
        built = Path(target).read_bytes()
    if not elf.is_elf(built):
        raise BootError("gcc did not make an ELF file")
    if output is not None:
        Path(output).write_bytes(built)
    return built
