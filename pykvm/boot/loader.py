"""``load()``: the one door for kernels, whatever they are."""

from __future__ import annotations

from pykvm.boot import bzimage, e820, layout
from pykvm.boot.cache import Cache, default_folder
from pykvm.boot.job import Job, program_name
from pykvm.boot.source import Source
from pykvm.errors import BootError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from pykvm.boot.plan import BootPlan
    from pykvm.boot.ram import MappedMemory
    from pykvm.boot.source import Given

PROTOCOLS = ("auto", "bzimage", "vmlinux", "pvh", "multiboot")


def load(
    memory: MappedMemory,
    kernel: Given,
    *,
    initrd: Given | list[Given] | None = None,
    cmdline: str | bytes = "",
    protocol: str = "auto",
    kaslr: bool = False,
    cache: bool | str | os.PathLike[str] = True,
    rsdp_gpa: int = 0,
    e820: Sequence[tuple[int, int, int]] | None = None,
    name: str | None = None,
    keep_later: bool = False,
) -> BootPlan:
    """Load a kernel with its initrd and command line, and say how to enter it.

    Args:
        memory: guest memory, ``GuestMemory`` or alike. ``layout`` says what goes where.
        kernel: a path, or the bytes: a bzImage, an ELF file, or a multiboot image of any format.
        initrd: a path or bytes. Multiboot takes a list, a module each.
        cmdline: the command line.
        protocol: how to start it.

            - ``"auto"``: a bzImage as vmlinux, or, where its payload cannot be unpacked here, by
              its own decompressor (and a note says so). An ELF file by multiboot if it has that
              header, else by PVH if it has that note, else as vmlinux.
            - ``"bzimage"``: a bzImage by its own decompressor.
            - ``"vmlinux"``: Linux's 64-bit boot protocol, from a bzImage unpacked here or an ELF
              file.
            - ``"pvh"``: by the Xen note of an ELF file, or of the one inside a bzImage.
            - ``"multiboot"``: multiboot 1.
        kaslr: leave it to a bzImage's own decompressor to unpack the kernel, and to move it.
        cache: keep unpacked kernels: in the user's cache folder, not at all, or in a folder.
        rsdp_gpa: where ACPI's root pointer will be; 0 lets the kernel search, or do without.
        e820: the memory map as (base, size, type), for Linux, PVH and multiboot alike; by default
            what ``e820.memory_map`` makes of the regions.
        name: the program's name, the first word of multiboot's command line; by default the path's
            last part.
        keep_later: leave it to the caller to have ``BootPlan.keep()`` write the cache.

    Returns:
        A ``BootPlan``.

    Raises:
        BootError: which field of which file is wrong, what was expected and what found. Nothing was
            written to guest memory then.
        ValueError: an unknown protocol, or a memory map that is none.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol {protocol!r} is none of {', '.join(PROTOCOLS)}")
    if kaslr and protocol not in ("auto", "bzimage"):
        raise ValueError(f"kaslr=True needs the bzImage's own decompressor, not {protocol!r}")
    source = Source(kernel, "kernel")
    given = initrd if isinstance(initrd, list) else [] if initrd is None else [initrd]
    folder = default_folder() if cache is True else None if cache is False else cache
    job = Job(
        memory,
        source,
        [Source(each, "initrd") for each in given],
        e820=_map(memory, e820),
        cmdline=cmdline,
        rsdp_gpa=rsdp_gpa,
        cache=Cache(folder),
        name=program_name(name, source.path),
    )
    _dispatch(job, "bzimage" if kaslr else protocol)
    plan = job.finish()
    if not keep_later:
        plan.keep()
    return plan


def _map(memory: MappedMemory, given: Sequence[tuple[int, int, int]] | None) -> list[e820.E820]:
    return e820.memory_map(memory.regions) if given is None else e820.normalized(given)


def _dispatch(job: Job, protocol: str) -> None:
    """Find out what the file is, and have it placed."""
    data = job.kernel.data
    if protocol != "multiboot" and bzimage.is_bzimage(data):
        from pykvm.boot import linux

        linux.load_bzimage(job, protocol)
        return
    from pykvm.boot import elf

    if protocol == "bzimage":
        found = "an ELF file" if elf.is_elf(data) else "none"
        raise BootError(f'bzImage: header: expected "HdrS" at 0x202, found {found}')
    if protocol in ("auto", "multiboot"):
        from pykvm.boot import multiboot

        at = multiboot.find_header(data)
        if at is not None:
            kernel, job.plan.elf = multiboot.read(data, at)
            job.lap("read")
            multiboot.start(job, kernel)
            return
        if protocol == "multiboot":
            raise BootError(
                "multiboot: header: expected 0x1badb002 with flags and checksum on a 4-byte "
                f"boundary in the first 8 KiB, found none in {len(data)} bytes"
            )
    if not elf.is_elf(data):
        raise BootError(
            f"kernel: expected a bzImage, an ELF file or a multiboot image, found "
            f"{bytes(data[:4]).hex(' ') or 'an empty file'}"
        )
    _load_elf(job, protocol)


def _load_elf(job: Job, protocol: str) -> None:
    from pykvm.boot import elf, linux, pvh
    from pykvm.boot.image import from_elf

    parsed = job.plan.elf = elf.parse(job.kernel.data)
    entry = None if protocol == "vmlinux" else pvh.find_entry(parsed)
    if protocol == "pvh" or entry is not None:
        kernel = from_elf(parsed, entry)
        job.lap("read")
        pvh.start(job, kernel, (kernel.start, kernel.end), layout.INITRD_MAX + 1)
    else:
        linux.load_vmlinux(job, parsed)
