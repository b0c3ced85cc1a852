"""Linux by its 64-bit boot protocol: bzImage and vmlinux.

A bzImage is real-mode code that nobody needs any more, and a decompressor with the packed kernel,
an ELF file, as its payload. To unpack on the host is faster than to have the guest do it, and can
be kept between runs. What is lost is KASLR: it is the decompressor that moves the kernel about.

The decompressor (0x200 into the protected-mode code) and the kernel itself (``startup_64``, its ELF
entry) are entered alike: long mode, identity map, RSI at the zero page (boot.rst, "64-bit Boot
Protocol"). What the decompressor does besides is not missed: it looks for the ACPI tables, and the
zero page says where they are; it switches to 5-level paging, and the kernel takes the 4 levels that
it finds.
"""

from __future__ import annotations

from pykvm.boot import layout, params
from pykvm.boot.bzimage import BzImage, unpacked
from pykvm.boot.image import Image, from_elf
from pykvm.errors import BootError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.boot.elf import ElfImage
    from pykvm.boot.job import Job

_ENTRY_64 = 0x200  # in the protected-mode code; "it is ABI so immutable", says the kernel
CMDLINE_SIZE = 2047
"""The longest command line of x86 Linux (COMMAND_LINE_SIZE without the NUL)."""
_4GIB = 1 << 32


def load_bzimage(job: Job, protocol: str) -> None:
    """Load a bzImage: unpacked here, or as it is.

    Args:
        job: what was asked for.
        protocol: ``"vmlinux"`` and ``"pvh"`` start the kernel inside, ``"bzimage"`` has the image
            unpack itself, ``"auto"`` the former if it can be done.

    Raises:
        BootError: malformed, does not fit, or cannot be unpacked here where that was asked for.
    """
    image = BzImage(job.kernel.data)
    job.plan.version = image.version
    # Before anything is unpacked, so that a payload can claim no more memory than the guest has.
    job.placement.require_ram(image.pref_address, image.init_size, "bzImage: init_size")
    job.lap("read")
    kernel = None if protocol == "bzimage" else unpacked(job, image, required=protocol != "auto")
    if protocol == "pvh":
        from pykvm.boot import pvh

        assert kernel is not None
        pvh.start(job, kernel, _span(kernel, image), image.initrd_limits[0])
        return
    job.plan.protocol = "vmlinux"
    if kernel is None:
        job.plan.protocol = "bzimage"
        start = image.pref_address
        kernel = Image(start + _ENTRY_64, None, [(start, len(image.code))], [(start, image.code)])
    _start(job, kernel, image)


def load_vmlinux(job: Job, elf: ElfImage) -> None:
    """Load a kernel that is an ELF file, and start it as Linux's decompressor would.

    Raises:
        BootError: a 32-bit file, or one that does not fit.
    """
    if elf.bits != 64:
        raise BootError(
            "ELF image: e_ident[EI_CLASS]: expected 2 (ELF64) for Linux's 64-bit boot protocol, "
            "found 1 (ELF32)"
        )
    job.plan.protocol = "vmlinux"
    job.plan.elf = elf
    _start(job, from_elf(elf), None)


def _span(kernel: Image, image: BzImage | None) -> tuple[int, int]:
    """The memory that is the kernel's until it reads the memory map: (first gpa, end)."""
    start, end = kernel.start, kernel.end
    if image is not None:
        start = min(start, image.pref_address)
        end = max(end, image.pref_address + image.init_size)
    if start < layout.HIGH_MEMORY or end > _4GIB:
        raise BootError(
            f"ELF image: p_paddr: expected segments between 1 MiB and 4 GiB, found "
            f"{kernel.start:#x}..{kernel.end - 1:#x}"
        )
    return start, end


def _start(job: Job, kernel: Image, image: BzImage | None) -> None:
    """Place the kernel and what it is told."""
    plan, placement = job.plan, job.placement
    start, end = _span(kernel, image)
    job.reserve_low_memory()
    placement.claim(start, end - start, "the kernel")
    kernel.place(placement)
    job.put_cmdline(CMDLINE_SIZE if image is None else image.cmdline_size)
    job.put_initrd(*((layout.INITRD_MAX + 1,) if image is None else image.initrd_limits))
    page = params.boot_params(
        b"" if image is None else image.header,
        e820=plan.e820,
        cmdline_gpa=plan.cmdline_gpa,
        kernel_gpa=start,
        initrd=plan.initrd,
        rsdp_gpa=plan.rsdp_gpa,
    )
    plan.boot_params_gpa = placement.claim(layout.ZERO_PAGE, len(page), "the zero page")
    placement.put(layout.ZERO_PAGE, page)
    plan.mode, plan.entry = "long64", kernel.entry
    plan.registers = {"rsi": plan.boot_params_gpa}
    plan.tables = layout.CPU_TABLES
    plan.kernel = start, end - start
