"""A host that fails under C's block requests: every call goes through a library that is preloaded.

The library writes down what C asks of the file and fails as it is told; the guest has to hear of
it, and what it was told is flushed has to be. (What Python asks of the file is held by
test_disk_faults and tests/powercut.)
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

LIBRARY = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

/* PRELOADED_FAIL: "pwritev:2:28" fails the second call with 28, "pwritev:2:0" cuts it short. */
static int told(const char *name, unsigned number, int *error)
{
    const char *plan = getenv("PRELOADED_FAIL");
    char which[16];
    unsigned when;
    int with;
    if (!plan || sscanf(plan, "%15[^:]:%u:%d", which, &when, &with) != 3 ||
        strcmp(which, name) || when != number)
        return 0;
    *error = with;
    return 1;
}

static void note(const char *name, off_t offset, long length, long result)
{
    char line[96];
    const char *log = getenv("PRELOADED_LOG");
    int size = snprintf(line, sizeof line, "%s %ld %ld %ld\n", name, (long)offset, length, result);
    if (log && write(atoi(log), line, (size_t)size) < 0)
        abort();
}

static long sum(const struct iovec *iov, int count)
{
    long total = 0;
    for (int i = 0; i < count; i++)
        total += (long)iov[i].iov_len;
    return total;
}

#define CALL(NAME)                                                                        \
    ssize_t NAME(int fd, const struct iovec *iov, int count, off_t offset)                \
    {                                                                                     \
        static ssize_t (*real)(int, const struct iovec *, int, off_t);                    \
        static unsigned number;                                                           \
        int error = -1;                                                                   \
        ssize_t result;                                                                   \
        if (!real)                                                                        \
            real = (ssize_t(*)(int, const struct iovec *, int, off_t))dlsym(RTLD_NEXT, #NAME); \
        if (told(#NAME, ++number, &error) && error) {                                     \
            result = -1;                                                                  \
        } else if (!error) {                                                              \
            struct iovec first = {iov[0].iov_base, iov[0].iov_len / 2};                   \
            result = real(fd, &first, 1, offset);                                         \
        } else {                                                                          \
            result = real(fd, iov, count, offset);                                        \
            error = errno;                                                                \
        }                                                                                 \
        note(#NAME, offset, sum(iov, count), result);                                     \
        errno = error;                                                                    \
        return result;                                                                    \
    }

CALL(preadv)
CALL(pwritev)

int fdatasync(int fd)
{
    static int (*real)(int);
    static unsigned number;
    int error = 0;
    if (!real)
        real = (int (*)(int))dlsym(RTLD_NEXT, "fdatasync");
    int result = told("fdatasync", ++number, &error) ? -1 : real(fd);
    note("fdatasync", 0, 0, result);
    if (result)
        errno = error;
    return result;
}
"""

PROGRAM = """
import json, os, sys
from pathlib import Path
from tests.unit.test_blk_fast import Disk, FLUSH, IN, OUT
KINDS = {"in": IN, "out": OUT, "flush": FLUSH}
disk = Disk(Path(sys.argv[1]))
log = int(os.environ["PRELOADED_LOG"])
answers = []
for number, (kind, sector, size) in enumerate(json.loads(sys.argv[2])):
    data = bytes([number + 1]) * size if kind == "out" else size
    status, came, used = disk.request(KINDS[kind], sector, data)
    os.write(log, f"answer {kind} {sector} {status}\\n".encode())
    answers.append([status, came[0]])
print(json.dumps([answers, disk.device.counters.errors, disk.device.fast.c.requests]))
disk.close()
"""

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("gcc") is None:
        pytest.skip("no gcc to build the library with")
    folder = tmp_path_factory.mktemp("preload")
    source, path = folder / "host.c", folder / "host.so"
    source.write_text(LIBRARY)
    subprocess.run(
        ["gcc", "-O1", "-Wall", "-shared", "-fPIC", "-o", path, source, "-ldl"],
        check=True,
        timeout=100,
    )
    return path


def serve(
    library: Path, folder: Path, requests: list[tuple[str, int, int]], fail: str = ""
) -> tuple[list[list[int]], int, int, list[list[str]]]:
    """Make requests: the statuses with the first byte that came, errors, how many C served, calls.

    Calls and answers are in the order in which they were made.
    """
    with (folder / "log").open("w+b") as log:
        environment = os.environ | {
            "LD_PRELOAD": str(library),
            "PRELOADED_LOG": str(log.fileno()),
            "PRELOADED_FAIL": fail,
        }
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, folder / "disk.img", json.dumps(requests)],
            env=environment,
            pass_fds=[log.fileno()],
            cwd=CHECKOUT,
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert done.returncode == 0, done.stderr
        log.seek(0)
        calls = [line.split() for line in log.read().decode().splitlines()]
    answers, errors, in_c = json.loads(done.stdout)
    return answers, errors, in_c, calls


WORK = [("out", 1, 512), ("out", 2, 1024), ("flush", 0, 0), ("in", 1, 512), ("flush", 0, 0)] * 2


def test_a_flush_is_answered_after_the_file_was_synced(library: Path, tmp_path: Path) -> None:
    answers, errors, in_c, calls = serve(library, tmp_path, WORK)
    assert [status for status, _ in answers] == [0] * len(WORK) and errors == 0
    assert in_c == len(WORK)
    volatile = False
    flushes = 0
    for name, what, *_ in calls:
        if name == "pwritev":
            volatile = True
        elif name == "fdatasync":
            volatile = False
        elif what == "flush":
            flushes += 1
            assert not volatile, calls
    assert flushes == 4 and [name for name, *_ in calls].count("fdatasync") == 2


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_write_that_fails_is_told(library: Path, tmp_path: Path, call: int, error: int) -> None:
    answers, errors, _, calls = serve(library, tmp_path, WORK, f"pwritev:{call}:{error}")
    statuses = [status for status, _ in answers]
    assert statuses == [int(n == (0, 1, 5)[call - 1]) for n in range(len(WORK))], calls
    assert errors == 1


def test_a_read_that_fails_is_told(library: Path, tmp_path: Path) -> None:
    answers, errors, _, _ = serve(library, tmp_path, WORK, f"preadv:1:{errno.EIO}")
    assert [status for status, _ in answers] == [0, 0, 0, 1, 0, 0, 0, 0, 0, 0] and errors == 1


@pytest.mark.parametrize("what", [f"preadv:1:{errno.EINVAL}", f"pwritev:2:{errno.EAGAIN}"])
def test_what_python_can_mend_is_mended(library: Path, tmp_path: Path, what: str) -> None:
    answers, errors, in_c, _ = serve(library, tmp_path, WORK, what)
    assert [status for status, _ in answers] == [0] * len(WORK) and errors == 0
    assert in_c == len(WORK) - 1 and answers[3][1] == 1
    assert (tmp_path / "disk.img").read_bytes()[1024:2048] == bytes([7]) * 1024


@pytest.mark.parametrize("name", ["preadv", "pwritev"])
def test_what_falls_short_is_completed(library: Path, tmp_path: Path, name: str) -> None:
    work: list[tuple[str, int, int]] = [("out", 1, 1024), ("in", 1, 1024)]
    answers, errors, in_c, _ = serve(library, tmp_path, work, f"{name}:1:0")
    assert answers == [[0, 1], [0, 1]] and errors == 0 and in_c == 1
    assert (tmp_path / "disk.img").read_bytes()[512:1536] == bytes([1]) * 1024


def test_a_sync_that_fails_is_never_tried_again(library: Path, tmp_path: Path) -> None:
    answers, errors, _, calls = serve(library, tmp_path, WORK, f"fdatasync:1:{errno.EIO}")
    statuses: Any = [status for status, _ in answers]
    assert [statuses[n] for n in range(len(WORK)) if WORK[n][0] == "flush"] == [1, 1, 1, 1]
    assert [statuses[n] for n in range(len(WORK)) if WORK[n][0] != "flush"] == [0] * 6
    assert [name for name, *_ in calls].count("fdatasync") == 1 and errors == 4
