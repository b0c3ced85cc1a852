"""Several vCPUs in one run, each in a thread of its own.

The first runs in the caller's thread, so that Ctrl-C reaches it there. Handlers of all of them run
under one lock: a handler needs no locking of its own. Lock order: that lock only, and nothing is
waited for while it is held.
"""

from __future__ import annotations

import threading

from pykvm import result as reasons
from pykvm.vcpu_thread import End

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.cpu import Cpu


def run_together(cpus: list[Cpu], deadline: int, max_exits: int | None) -> tuple[Cpu, End]:
    """Run ``cpus`` until all have halted or one ended otherwise; then the others are stopped.

    Returns:
        The vCPU that ended the run and how. A handler's exception comes through, once every
        thread is home.
    """
    handlers = threading.Lock()
    bookkeeping = threading.Lock()
    decisive: list[tuple[Cpu, End]] = []
    last: list[tuple[Cpu, End]] = []

    def one(cpu: Cpu) -> None:
        try:
            end = cpu._runner.run(deadline, max_exits, handlers)
        except KeyboardInterrupt:
            end = End(reasons.INTERRUPTED)
        except BaseException as error:
            end = End("raised", raised=error)
        with bookkeeping:
            last.append((cpu, end))
            if end.reason != reasons.HALTED and not decisive:
                decisive.append((cpu, end))
                for other in cpus:
                    if other is not cpu:
                        other._runner.stop()

    threads = [
        threading.Thread(target=one, args=(cpu,), name=f"vcpu{cpu.index}", daemon=True)
        for cpu in cpus[1:]
    ]
    for thread in threads:
        thread.start()
    one(cpus[0])
    for thread in threads:
        while thread.is_alive():
            try:
                thread.join()
            except KeyboardInterrupt:
                with bookkeeping:
                    if not decisive:
                        decisive.append((cpus[0], End(reasons.INTERRUPTED)))
                for cpu in cpus:
                    cpu._runner.stop()
    for cpu in cpus:  # a stop may have come to one that had ended
        cpu._runner.forget_stop()
    cpu, end = decisive[0] if decisive else last[-1]
    if end.raised is not None:
        raise end.raised
    return cpu, end
