"""The real gdb, on guests of ours and on Debian's kernel."""

from __future__ import annotations

import os
import platform
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import pykvm
from pykvm.cli.main import cli
from pykvm.debug.gdb import MOST_WAITING
from pykvm.debug.gdb_packets import Reader, packet
from pykvm.debug.gdb_registers import layout
from pykvm.debug.gdb_session import Session
from pykvm.result import RunResult
from tests.support import linux_guest, tiny_kernel
from tests.support.stops import CELL, machine

GDB = shutil.which("gdb")
needs_gdb = pytest.mark.skipif(GDB is None, reason='shutil.which("gdb") found none')


#: A sanitizer that is loaded into us is none of gdb's.
GDB_ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}


@pytest.fixture
def path() -> Iterator[str]:
    """For a socket: below /tmp, as pytest's own folders may be too deep for one."""
    with tempfile.TemporaryDirectory(prefix="pykvm-", dir="/tmp") as folder:
        yield f"{folder}/gdb"


class Gdb:
    """gdb in batch mode, at work on a machine of this process."""

    def __init__(self, *commands: str, files: tuple[str, ...] = ()) -> None:
        self._commands, self._files = commands, files

    def debug(self, m: pykvm.Machine) -> tuple[str, str]:
        """Have it run the machine: what it printed, and how it left."""
        with m.gdb_server("127.0.0.1:0") as server:
            words = [str(GDB), "-nx", "-batch", *self._files, "-ex", "set confirm off"]
            for command in (f"target remote {server.address}", *self._commands):
                words += ["-ex", command]
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                env=GDB_ENVIRONMENT,
            )  # fmt: skip
            told: list[bytes] = []
            collect = threading.Thread(
                target=lambda: told.append(process.communicate(timeout=200)[0])
            )
            collect.start()
            how, _ = server.serve(timeout=60)
            collect.join(60)
            assert process.returncode is not None
        return told[0].decode(), how


@pytest.fixture
def m() -> Iterator[pykvm.Machine]:
    with machine(cpus=2) as made:
        made.cpus[1].rip = made.resolve("bottom")
        made.cpus[1].ecx = 5
        yield made


@needs_gdb
def test_gdb_breaks_steps_and_looks_around(m: pykvm.Machine) -> None:
    top = m.resolve("top")
    text, how = Gdb(
        "info threads", f"break *{top:#x}", "continue", "printf \"at %#lx %d\\n\", $rip, $ebx",
        "stepi", "stepi", "printf \"then %#lx %d\\n\", $rip, $ebx", f"x/1wx {CELL:#x}",
        f"x/2i {top:#x}", f"set *(int *){CELL:#x} = 0x1234", "set $rbx = 0x77",
        "info registers cr0", "print $xmm0.uint128", "thread 2", "printf \"two %d\\n\", $ecx",
        "monitor ways", "detach",
    ).debug(m)  # fmt: skip
    assert len(re.findall(r"Thread [12] \(vcpu [01], long64", text)) >= 2, text
    hit = re.search(r"at (0x\w+) (\d+)", text)
    assert hit and int(hit[1], 16) == top, text
    then = re.search(r"then (0x\w+) (\d+)", text)
    assert then and int(then[2]) == int(hit[2]) + 1, text
    assert re.search(r"inc +%ebx", text), "the guest's own code, without what was planted in it"
    assert "0x80010033" in text and "long64, port: works" in text
    assert how == "detached"
    assert m.mem.read(CELL, 4) == b"\x34\x12\0\0"
    assert 0x77 in [cpu.rbx for cpu in m.cpus]
    assert len(m.planted) == 0
    assert m.run(timeout=20).reason == "stopped"


@needs_gdb
def test_ctrl_c_stops_a_guest_that_runs_for_ever() -> None:
    with machine("inc ebx; l: jmp l") as m, m.gdb_server("127.0.0.1:0") as server:
        process = subprocess.Popen(
            [str(GDB), "-nx", "-batch", "-ex", f"target remote {server.address}", "-ex", "continue",
             "-ex", 'printf "stopped %d\\n", $ebx', "-ex", "kill"],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=GDB_ENVIRONMENT,
        )  # fmt: skip

        def interrupt() -> None:
            while process.poll() is None and (m.cpu._runner.c.entries < 3 or not m.running):
                pass
            process.send_signal(signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        how, result = server.serve(timeout=60)
        thread.join(200)
        text = process.communicate(timeout=200)[0].decode()
    assert "SIGINT" in text and "stopped 1" in text
    assert how == "killed" and result is not None and result.reason == "stopped"


@needs_gdb
def test_a_watched_write_stops_it_or_is_refused() -> None:
    with machine() as m:
        text, _ = Gdb(f"watch *(int *){CELL:#x}", "continue", 'printf "rip %#lx\\n", $rip',
                      "kill").debug(m)  # fmt: skip
        assert "Hardware watchpoint" in text
        assert f"rip {m.resolve('bottom'):#x}" in text, text
        assert re.search(r"Old value = 0\s+New value = 1", text)


@needs_gdb
def test_the_guests_end_is_an_exit_and_a_triple_fault_is_explained() -> None:
    with machine() as m:
        text, how = Gdb("continue").debug(m)
        assert "exited with code 07" in text and how == "ended"
    with machine("ud2") as m:
        text, how = Gdb("continue", "kill").debug(m)
        assert "SIGSEGV" in text and re.search("triple.fault", text, re.I), text


C_SOURCE = """
int depth;
__attribute__((noinline)) int inner(int n) { depth = n; return n + 1; }
__attribute__((noinline)) int outer(int n) { return inner(n * 2) + 1; }
void _start(void) { outer(21); for (;;) __asm__ volatile("outb %%al, $0xf4" ::: "memory"); }
"""


@needs_gdb
@pytest.mark.skipif(shutil.which("gcc") is None, reason='shutil.which("gcc") found none')
def test_backtrace_with_symbols_in_a_guest_in_c(tmp_path: Path) -> None:
    (tmp_path / "guest.c").write_text(C_SOURCE)
    elf = str(tmp_path / "guest.elf")
    subprocess.run(
        ["gcc", "-g", "-O0", "-ffreestanding", "-nostdlib", "-static", "-no-pie", "-fno-pie",
         "-mgeneral-regs-only", "-fcf-protection=none", "-fno-asynchronous-unwind-tables",
         "-Wl,-Ttext=0x10000", "-Wl,--build-id=none", "-o", elf, str(tmp_path / "guest.c")],
        check=True,
        timeout=100,
    )  # fmt: skip
    with pykvm.Machine("4M") as m:
        image = m.load_elf(elf)
        m.cpu.enter(image.mode, entry=image.entry)
        m.pio.stop(0xF4)
        text, _ = Gdb("break inner", "continue", "backtrace", "finish", "print depth", "kill",
                      files=(elf,)).debug(m)  # fmt: skip
    assert re.search(r"#0 +inner \(n=42\)", text), text
    assert re.search(r"#1 .* outer \(n=21\)", text)
    assert re.search(r"#2 .* _start", text)
    assert "Value returned is $1 = 43" in text and "$2 = 42" in text


@needs_gdb
def test_the_command_line_waits_for_gdb(path: str) -> None:
    run = subprocess.Popen(
        [sys.executable, "-m", "pykvm", "run", "hello", f"--gdb={path}"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert run.stderr is not None
    assert path.encode() in run.stderr.readline()
    done = subprocess.run(
        [str(GDB), "-nx", "-batch", "-ex", f"target remote {path}", "-ex", "stepi",
         "-ex", "detach"],
        capture_output=True, stdin=subprocess.DEVNULL, timeout=60, check=True, env=GDB_ENVIRONMENT,
    )  # fmt: skip
    out, err = run.communicate(timeout=60)
    assert (run.returncode, out) == (0, b"Hello, KVM!\n"), (err, done.stdout)
    assert not os.path.exists(path)


def test_an_address_that_others_reach_is_refused_by_the_command_line(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["run", "hello", "--gdb=0.0.0.0:0"], prog_name="pykvm")
    assert end.value.code == 2 and "owns the guest" in capfd.readouterr().err


def test_a_path_too_long_for_a_socket_is_refused_with_the_limit(
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = "/tmp/" + "p" * 103
    with pytest.raises(SystemExit) as end:
        cli.main(["run", "hello", f"--gdb={path}"], prog_name="pykvm")
    said = capfd.readouterr().err
    assert end.value.code == 2 and path in said and "107 bytes, not 108" in said


class Client:
    """As much of a gdb as it takes to say a few packets, without acknowledging any."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(30)
        for _ in range(3000):
            try:
                self._socket.connect(path)
                break
            except OSError:
                time.sleep(0.01)
        self._reader, self._got = Reader(), list[object]()

    def say(self, payload: bytes) -> bytes:
        """The answer to a packet."""
        self._socket.sendall(packet(payload))
        while not self._got:
            data = self._socket.recv(4096)
            if not data:
                return b""
            self._got += self._reader.feed(data)
        answer = self._got.pop(0)
        assert isinstance(answer, bytes)
        return answer


def test_whoever_floods_a_guest_that_runs_is_left_and_the_guest_stops(path: str) -> None:
    with pykvm.Machine("128K") as m, m.gdb_server(path) as server:
        m.load(pykvm.asm("l: inc ebx; jmp l", mode="long64"), at=0x8000)
        m.cpu.enter("long64", entry=0x8000)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            client.sendall(packet(b"Z0,8000,1") + packet(b"z0,8000,1") + packet(b"c"))
            client.sendall(packet(b"g") * (MOST_WAITING + 8))
            how, result = server.serve(timeout=60)
        assert how == "lost" and result is not None and result.reason == "stopped"
        assert len(m.planted) == 0


@pytest.mark.parametrize("words", [["k"], ["vKill;1"], [], ["D"], ["vCont;c"]])
def test_a_kernel_is_booted_under_gdb_and_goes_on_or_ends_as_gdb_leaves(
    tmp_path: Path, path: str, words: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(tiny_kernel.elf("nop; " + tiny_kernel.ENDS["power-off"]))
    said: list[bytes] = []

    def talk() -> None:
        client = Client(path)
        said.append(client.say(b"?"))
        said.append(client.say(b"vCont;s:1"))
        said.extend(client.say(word.encode()) for word in words)

    thread = threading.Thread(target=talk)
    thread.start()
    with pytest.raises(SystemExit) as end:
        arguments = ["boot", str(kernel), "--no-cache", "--memory", "16M", f"--gdb={path}"]
        cli.main([*arguments, "--timeout", "60"], prog_name="pykvm")
    thread.join(200)
    assert said[:2] == [b"T05thread:1;", b"T05thread:1;"]
    goes_on = words in (["D"], ["vCont;c"])
    assert end.value.code == (0 if goes_on else 130), capfd.readouterr().err
    if words == ["vCont;c"]:
        assert said[2] == b"W00"


# ---- Debian's kernel -----------------------------------------------------------------------------


def kernel_symbols(image: Path) -> dict[str, int]:
    """Addresses in a kernel, where it is the one that runs here: its own are in /proc/kallsyms."""
    if platform.release() not in image.name:
        pytest.skip(f"os.uname().release is {platform.release()}, the kernel is {image.name}")
    wanted, found = ("_text", "start_kernel", "__fentry__"), {}
    with open("/proc/kallsyms") as file:
        for line in file:
            address, _, name = line.split()[:3]
            if name in wanted:
                found[name] = int(address, 16)
    if not found.get("_text"):
        pytest.skip("/proc/kallsyms shows no addresses")
    moved = found["_text"] - 0xFFFFFFFF81000000  # KASLR, of the kernel that runs here
    return {name: address - moved for name, address in found.items()}


@needs_gdb
@pytest.mark.watchdog(600)
def test_gdb_stops_debians_kernel_at_start_kernel() -> None:
    images = linux_guest.kernels()
    if "generic" not in images:
        pytest.skip("PYKVM_KERNELS names no folder with Debian's generic kernel")
    linux_guest.need_native_ring0()
    symbols = kernel_symbols(images["generic"])
    start = symbols["start_kernel"]
    with pykvm.Machine("256M", irqchip=True, pit=True) as m:
        m.boot(images["generic"], cmdline="console=ttyS0 nokaslr")
        m.add_symbols(symbols)
        text, _ = Gdb(f"break *{start:#x}", "continue", 'printf "at %#lx\\n", $rip', "info threads",
                      "stepi", 'printf "then %#lx\\n", $rip', "x/1i $rip", "print/x $cr3",
                      "delete", "kill").debug(m)  # fmt: skip
    assert f"at {start:#x}" in text, text
    assert "start_kernel" in text, "the thread's line names the symbol"
    then = re.search(r"then (0x\w+)", text)
    assert then, text
    behind = int(then[1], 16)  # ftrace's call, until ftrace takes it out
    assert behind == symbols.get("__fentry__") or start < behind < start + 16


# ---- nonsense ------------------------------------------------------------------------------------


def test_no_packet_breaks_a_session() -> None:
    """Pieces of what the protocol has, put together at random: an answer or an error, always."""
    pieces = [b"g", b"G", b"p", b"P", b"m", b"M", b"X", b"H", b"T", b"Z", b"z", b"q", b"Q", b"v",
              b"0", b"1", b"8000", b"ffffffffffffffff", b",", b";", b":", b"=", b"-1", b"}", b"\0",
              b"Supported", b"Xfer:features:read:", b"target.xml", b"Rcmd,", b"Cont?", b"Cont;",
              b"fThreadInfo", b"ThreadExtraInfo,", b"70", b"?", b"zz"]  # fmt: skip
    rng = random.Random(5)
    with machine() as m:
        session = Session(m, lambda run: RunResult("stopped"))
        for _ in range(1000):
            payload = b"".join(rng.choice(pieces) for _ in range(rng.randint(1, 6)))
            for answer in session.answer(payload):
                packet(answer)
        session.close()
        assert len(m.planted) == 0 and not m.debugger.breakpoints


def test_what_is_not_mapped_is_an_error_and_not_the_end() -> None:
    with machine() as m:
        session = Session(m, lambda run: run())
        for payload in (b"m7fff00000000,8", b"M7fff00000000,1:00", b"p999", b"Hg63", b"m8000",
                        b"m,", b"vCont;q", b"G0", b"P0=00"):  # fmt: skip
            assert session.answer(payload) == [b"E01"], payload
        assert session.answer(b"no such thing") == [b""]
        assert session.answer(b"m8000,4")[0] != b"E01"


@pytest.mark.parametrize("error", [ValueError, KeyError, pykvm.errors.PykvmError, RuntimeError])
def test_what_a_handler_raises_comes_out_of_the_session(error: type[Exception]) -> None:
    def handler(access: object) -> None:
        raise error("mine")

    with pykvm.Machine("128K") as m:
        m.load(pykvm.asm("out 0x50, al; hlt", mode="long64"), at=0x8000)
        m.cpu.enter("long64", entry=0x8000)
        m.on_pio(0x50, handler)
        session = Session(m, lambda run: run())
        with pytest.raises(error, match="mine"):
            session.answer(b"c")
        assert session.answer(b"m,") == [b"E01"]


@pytest.mark.parametrize("name", ["cr0", "cr4", "cr8", "mxcsr"])
def test_a_register_that_no_processor_can_have_is_refused_and_the_session_goes_on(
    name: str,
) -> None:
    with machine() as m:
        session = Session(m, lambda run: run())
        number = next(n for n, each in enumerate(layout(64)) if each.name == name)
        before = session.answer(b"g")
        wanted = b"ff" * layout(64)[number].size
        assert session.answer(b"P%x=%s" % (number, wanted)) == [b"E01"]
        assert session.answer(b"G" + b"ff" * (len(before[0]) // 2)) == [b"E01"]
        assert session.answer(b"g") == before
        assert session.answer(b"vCont;s:1") == [b"T05thread:1;"]
        assert session.answer(b"c") == [b"W07"]


def test_only_what_is_asked_is_answered() -> None:
    with machine() as m:
        session = Session(m, lambda run: run())
        assert session.answer(b"qC") == [b"QC1"]
        assert session.answer(b"qCRC:8000,10") == [b""]  # compare-sections reads memory then
        if m.debugger.obstacle("watch", m.cpu):
            assert session.answer(b"Z2,8000,ffffffffffff")[-1] == b"E01"


def test_what_gdb_writes_to_an_sse_register_is_what_the_guest_has() -> None:
    """Also if it has used none before; ring 3, where every back end executes SSE."""
    movq = bytes.fromhex("660fd6042500800100")  # movq [0x18000], xmm0
    with pykvm.Machine("128K") as m:
        m.load(movq + pykvm.asm("mov dx, 0x3f4; out dx, al", mode="long64"), at=0x8000)
        m.cpu.enter("long64", entry=0x8000, ring=3, iopl=3)
        m.pio.stop(0x3F4)
        number = next(n for n, each in enumerate(layout(64)) if each.name == "xmm0")
        value = bytes(range(1, 17))
        session = Session(m, lambda run: run())
        assert session.answer(b"P%x=%s" % (number, value.hex().encode())) == [b"OK"]
        assert session.answer(b"p%x" % number) == [value.hex().encode()]
        with m.snapshot() as s:
            for _ in range(2):
                assert m.run(timeout=20).reason == "stopped"
                assert m.memory.read(0x18000, 8) == value[:8]
                m.memory.u64[0x18000] = 0
                s.restore()


def test_every_register_takes_what_gdb_writes_and_shows_it() -> None:
    with machine() as m:
        session = Session(m, lambda run: run())
        for number, register in enumerate(layout(64)):
            for byte in (b"00", b"55", b"ff"):
                written = byte * register.size
                assert session.answer(b"P%x=%s" % (number, written))[0] in (b"OK", b"E01")
                read = session.answer(b"p%x" % number)[0]
                assert len(read) == 2 * register.size, register.name
                if register.name in ("rbx", "r15", "rsp", "xmm3", "st2", "fs_base"):
                    assert read == written, register.name
