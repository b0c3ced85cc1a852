"""How guest memory ends: with close(), with its last view, or forgotten."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import sys
import warnings
from pathlib import Path

import pytest

from pykvm.errors import ClosedError
from pykvm.memory import GuestMemory
from tests.support.leaks import Holdings, mapped_bytes, mappings_of

MIB = 1 << 20


class TestTheEnd:
    def test_closing_unmaps_and_closes_descriptors(self, backing_file: Path, no_leak: None) -> None:
        before = mapped_bytes()
        mem = GuestMemory("256M")
        mem.add_memfd(1 << 30, "64M", name="the_end")
        mem.add_file(1 << 32, backing_file, shared=True)
        mem[0:4] = mem[1 << 30 : (1 << 30) + 4]
        mem.u32[0] = mem.u32[1 << 30]
        assert mapped_bytes() >= before + 320 * MIB
        mem.close()
        assert mapped_bytes() < before + 64 * MIB
        assert not mappings_of("the_end")

    def test_dropping_the_memory_frees_it_without_the_garbage_collector(self) -> None:
        gc.disable()
        try:
            before = mapped_bytes()
            mem = GuestMemory("512M")
            mem.u32[0] = mem[0]
            del mem
            assert mapped_bytes() < before + 256 * MIB
        finally:
            gc.enable()

    def test_a_view_outlives_the_memory_and_takes_the_mapping_with_it(self, no_leak: None) -> None:
        mem = GuestMemory()
        region = mem.add_memfd(0, "64K", name="outlived")
        view = mem.view(0x100, 4)
        part = view[1:3]
        view[:] = b"abcd"
        mem.close()
        with pytest.raises(ClosedError):
            mem[0x100]
        with pytest.raises(ClosedError):
            region.view()
        assert bytes(view) == b"abcd"
        view[:] = b"efgh"
        view.release()
        assert bytes(part) == b"fg"
        assert len(mappings_of("outlived")) == 1
        del part
        assert mem.regions == (region,)  # they are still there, and hold nothing
        assert not mappings_of("outlived")

    def test_cells_that_were_kept_are_dead_after_close(self) -> None:
        mem = GuestMemory("4K")
        cells = mem.regions[0].cells(4)
        assert cells[0] == 0
        mem.close()
        with pytest.raises(ValueError, match="released"):
            cells[0]

    def test_the_descriptor_goes_with_the_last_view_at_the_latest(self, no_leak: None) -> None:
        mem = GuestMemory()
        mem.add_memfd(0, "64K", name="held_by_view")
        view = mem.view(0, 4)
        mem.close()
        held = Holdings.now().fds["/memfd:held_by_view (deleted)"]
        assert held == (0 if sys.version_info >= (3, 13) else 1)
        view.release()
        assert not Holdings.now().fds["/memfd:held_by_view (deleted)"]

    def test_numpy_arrays_outlive_the_memory(self) -> None:
        numpy = pytest.importorskip("numpy")
        mem = GuestMemory()
        mem.add_memfd(0, "64K", name="numpy_held")
        whole = numpy.asarray(mem.region_at(0))
        words = numpy.asarray(mem.view(0x100, 8)).view("<u8")
        mem.u64[0x100] = 0x1122334455667788
        mem.close()
        assert words[0] == 0x1122334455667788
        words += 1
        assert whole[0x100] == 0x89
        del words
        assert mappings_of("numpy_held")
        whole[0xFFFF] = 1
        del whole
        assert not mappings_of("numpy_held")

    def test_a_memfd_never_closed_is_reported_and_closed(self, no_leak: None) -> None:
        mem = GuestMemory()
        fd = mem.add_memfd(0, "4K").fd
        with pytest.warns(ResourceWarning, match=f"guest memory with fd {fd} was never closed"):
            del mem
            gc.collect()
        with pytest.raises(OSError, match="Bad file descriptor") as caught:
            os.fstat(fd)
        assert caught.value.errno == errno.EBADF

    def test_anonymous_memory_needs_no_close(self) -> None:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            mem = GuestMemory("4M")
            mem.u8[0] = 1
            del mem
            gc.collect()
        assert not told

    def test_a_view_cannot_be_pulled_from_under_its_users(self) -> None:
        with GuestMemory("64K") as mem:
            view = mem.view(0, 16)
            assert isinstance(view.obj, mmap.mmap)
            with pytest.raises(BufferError):
                view.obj.close()
            with pytest.raises(BufferError):
                view.obj.resize(4096)
