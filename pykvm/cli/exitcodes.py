"""The exit codes of the command line: which reason gives which.

Three ranges that never meet: what pykvm has to say about itself or about the run is below 200, as
are the codes that shells and timeout(1) give a meaning to; the guest's own codes are above.
"""

from __future__ import annotations

from pykvm import result as reasons

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.result import RunResult

OK = 0
ERROR = 1
USAGE = 2
SHUTDOWN = 3
FAILED_ENTRY = 4
INTERNAL_ERROR = 5
LIMIT = 6
UNCLAIMED = 7
OTHER_EXIT = 8
REBOOT = 9
PANIC = 10
UNSUPPORTED = 11
DIVERGED = 12
TIMEOUT = 124
SIGNALLED = 128
HANGUP = 129
INTERRUPTED = 130
BROKEN_PIPE = 141
TERMINATED = 143
GUEST = 200
GUEST_LARGE = 255

TABLE: tuple[tuple[str, str], ...] = (
    (f"{OK}", "halted, stopped, powered off, or debug-exit with 0"),
    (f"{ERROR}", "pykvm could not do it: no KVM, no such guest, a malformed image, …"),
    (f"{USAGE}", "wrong usage of the command line"),
    (f"{SHUTDOWN}", "shutdown: a triple fault"),
    (f"{FAILED_ENTRY}", "failed-entry: the processor or KVM refused the guest's state"),
    (f"{INTERNAL_ERROR}", "internal-error: KVM could not emulate an instruction, or the like"),
    (f"{LIMIT}", "limit: as many exits as --max-exits allows"),
    (f"{UNCLAIMED}", "unclaimed: a port or an address that nothing answers"),
    (f"{OTHER_EXIT}", "exit: another exit of KVM that nothing handles"),
    (f"{REBOOT}", "reboot: a booted machine reset itself"),
    (f"{PANIC}", "panic: a booted kernel panicked"),
    (f"{UNSUPPORTED}", "unsupported: this KVM cannot run a stock kernel, and it was given up"),
    (f"{DIVERGED}", "diverged: a replay left its log; for scripts, no command replays"),
    (f"{TIMEOUT}", "timeout, as of timeout(1)"),
    (f"{HANGUP}", "terminated: by SIGHUP, the terminal is gone (128 + SIGHUP)"),
    (f"{INTERRUPTED}", "interrupted: by Ctrl-C, or Ctrl-A x at a console (128 + SIGINT)"),
    (f"{BROKEN_PIPE}", "who read the output has left (128 + SIGPIPE)"),
    (f"{TERMINATED}", "terminated: by SIGTERM (128 + SIGTERM)"),
    (
        f"{GUEST + 1}-{GUEST_LARGE - 1}",
        f"debug-exit with 1-{GUEST_LARGE - 1 - GUEST}, plus {GUEST}",
    ),
    (f"{GUEST_LARGE}", f"debug-exit with {GUEST_LARGE - GUEST} or more"),
)
"""Exit code (or range of them) and what it says, for ``--help`` and the documentation."""

_BY_REASON = {
    reasons.HALTED: OK,
    reasons.STOPPED: OK,
    reasons.SHUTDOWN: SHUTDOWN,
    reasons.FAILED_ENTRY: FAILED_ENTRY,
    reasons.INTERNAL_ERROR: INTERNAL_ERROR,
    reasons.LIMIT: LIMIT,
    reasons.UNCLAIMED: UNCLAIMED,
    reasons.OTHER_EXIT: OTHER_EXIT,
    reasons.BREAKPOINT: OK,
    reasons.WATCHPOINT: OK,
    reasons.STEP: OK,
    reasons.REPLAYED: OK,
    reasons.DIVERGED: DIVERGED,
    reasons.POWER_OFF: OK,
    reasons.REBOOT: REBOOT,
    reasons.PANIC: PANIC,
    reasons.UNSUPPORTED: UNSUPPORTED,
    reasons.TIMEOUT: TIMEOUT,
    reasons.INTERRUPTED: INTERRUPTED,
    reasons.TERMINATED: TERMINATED,
}


def exit_code(result: RunResult, *, as_qemu: bool = False) -> int:
    """The exit code that tells how a run ended.

    Args:
        result: the run's.
        as_qemu: of a debug-exit with code N give 2 N + 1, as QEMU's process does.
    """
    if result.reason == reasons.DEBUG_EXIT:
        code = result.code or 0
        if as_qemu:
            from pykvm.devices.debug_exit import qemu_status

            return qemu_status(code)
        return min(GUEST + code, GUEST_LARGE) if code else OK
    if result.reason == reasons.TERMINATED and result.code is not None:
        return SIGNALLED + result.code
    return _BY_REASON[result.reason]


def table() -> str:
    """The table as lines of text."""
    return "\n".join(f"{code:>7}  {meaning}" for code, meaning in TABLE)
