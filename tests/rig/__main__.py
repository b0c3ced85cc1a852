"""``python -m tests.rig``: run a command, or the KVM tests, under mainline kvm-amd.

A Debian kernel is booted under QEMU, which emulates a processor with SVM, and so gets a /dev/kvm
of its own kind whatever the host's is. Inside, the command finds the host's file system (read-only
underneath, writable above and forgotten afterwards), this Python environment, and this folder.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from . import guest, host, initramfs

#: Exit statuses of the rig's own, as timeout(1) has them; others are the command's.
TIMED_OUT, RIG_FAILED = 124, 125

CHECKOUT = Path(__file__).resolve().parents[2]

#: What pytest is given if no path is: the unit tests would only take long inside.
KVM_TESTS = ("tests/kvm", "tests/guests")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.rig",
        description="Run a command under mainline kvm-amd, in a machine that QEMU emulates. "
        "Without a command, or with pytest as the command, the KVM tests.",
        epilog="exit status: the command's; 124: time limit; 125: the rig itself failed",
    )
    parser.add_argument(
        "--dir",
        type=Path,
        default=host.default_cache(),
        metavar="DIR",
        help="where kernel, initramfs and logs are kept (%(default)s)",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=900.0,
        metavar="S",
        help="kill the machine after so many seconds (%(default)g)",
    )
    parser.add_argument("--results", type=Path, metavar="DIR", help="copy logs and junit.xml here")
    parser.add_argument(
        "--setup-only", action="store_true", help="get everything ready, don't boot"
    )
    parser.add_argument("--cpus", type=int, default=guest.Machine.cpus, metavar="N")
    parser.add_argument("--memory", default=guest.Machine.memory, metavar="SIZE")
    parser.add_argument(
        "--module",
        action="append",
        default=[],
        metavar="NAME",
        help="load this kernel module too, with what it depends on (ext4, loop, …)",
    )
    parser.add_argument(
        "--env", action="append", default=[], metavar="NAME=VALUE", help="set a variable inside"
    )
    parser.add_argument(
        "--share",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="show this folder inside too, though it is below /tmp, /run or /dev/shm, empty there",
    )
    parser.add_argument(
        "--qemu", action="append", default=[], metavar="ARG", help="one more argument for QEMU"
    )
    parser.add_argument(
        "--append", default="", metavar="TEXT", help="more of the rig's kernel's command line"
    )
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="show the kernel's console too"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND …")
    return parser


def full_command(words: Sequence[str]) -> list[str]:
    """What to run inside: pytest gets what every run of the KVM tests in the rig needs."""
    words = list(words[1:] if words[:1] == ["--"] else words) or ["pytest"]
    if words[0] != "pytest":
        return words
    return [
        *(sys.executable, "-m", "pytest", "--require-kvm", "--durations=5"),
        "--junitxml=/run/rig/results/junit.xml",
        *words[1:],
        *(() if named_paths(words) else KVM_TESTS),
    ]


def named_paths(command: Sequence[str]) -> list[str]:
    """The files and folders that a command of pytest names; of another command, none."""
    named = command[command.index("pytest") + 1 :] if "pytest" in command else ()
    words = [word.partition("::")[0] for word in named if not word.startswith("-")]
    return [word for word in words if (CHECKOUT / word).exists()]


def _say(text: str) -> None:
    print(f"rig: {text}", file=sys.stderr, flush=True)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _run(options: argparse.Namespace) -> int:
    cache = options.dir.resolve()
    with host.locked(cache):
        host.install_programs()
        kernel = host.find_kernel(cache) or host.fetch_kernel(cache)
        if host.find_kernel(cache, host.CLOUD_FOLDER) is None:
            host.fetch_kernel(cache, host.CLOUD_METAPACKAGE, host.CLOUD_FOLDER)
        archive = initramfs.build(kernel, options.module, cache)
        run = guest.run_folder(cache)
    _say(f"Linux {kernel.release} and its initramfs are in {cache}")
    if options.setup_only:
        return 0
    command = full_command(options.command)
    host.compile_ahead(CHECKOUT, named_paths(command))
    pairs = (text.partition("=")[::2] for text in (f"PYKVM_KERNELS={cache}", *options.env))
    try:
        outcome = guest.boot(
            command,
            run=run,
            kernel=kernel,
            initramfs=archive,
            cwd=CHECKOUT,
            shared=options.share,
            environment=guest.guest_environment(dict(pairs)),
            timeout=options.timeout,
            machine=guest.Machine(
                options.cpus, options.memory, append=options.append, more=tuple(options.qemu)
            ),
            output=_write,
            console=_write if options.verbose else lambda text: None,
        )
    finally:
        if options.results:
            options.results.mkdir(parents=True, exist_ok=True)
            for path in (*run.glob("*.log"), *(run / "results").glob("*")):
                shutil.copy(path, options.results)
        _say(f"logs and results: {options.results or run}")
    _say(
        f"booted in {outcome.boot_seconds:.1f} s, ended with status {outcome.status} "
        f"after {outcome.seconds:.1f} s"
    )
    return outcome.status


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; the exit status."""
    try:
        return _run(_parser().parse_args(arguments))
    except guest.TimedOut as error:
        _say(str(error))
        return TIMED_OUT
    except (host.RigError, OSError) as error:
        _say(str(error))
        return RIG_FAILED
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
