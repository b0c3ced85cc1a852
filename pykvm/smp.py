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

    What else had ended by then, a halt or a write to a debug-exit port, is not lost: the next run
    begins with it.

    Returns:
        The vCPU that ended the run and how. A handler's exception comes through, once every
        thread is home.
    """
    handlers = threading.Lock()
    bookkeeping = threading.Lock()
    decisive: list[tuple[Cpu, End]] = []
    halted: list[tuple[Cpu, End]] = []
    others: list[Cpu] = []

    def one(cpu: Cpu) -> None:
        try:
            end = cpu._runner.run(deadline, max_exits, handlers)
        except BaseException as error:
            cpu._runner.give_back()  # Ctrl-C may have come as it ended
            end = _raised(error)
        with bookkeeping:
            if end.reason == reasons.HALTED:
                halted.append((cpu, end))
            elif not decisive:
                decide(cpu, end)
            elif end.raised is None:
                others.append(cpu)

    def decide(cpu: Cpu, end: End) -> None:
        decisive.append((cpu, end))
        for other in cpus:
            if other is not cpu:
                other._runner.stop()

    # No vCPU runs before every thread is there: if one cannot be had, none has to be got back.
    gate = threading.Event()
    ready: list[bool] = []

    # Not Thread.join(): interrupted by Ctrl-C it takes a thread for ended that is not (3.11).
    home: list[Cpu] = []
    all_home = threading.Event()

    def thread(cpu: Cpu) -> None:
        gate.wait()
        if ready:
            one(cpu)
            with bookkeeping:
                home.append(cpu)
                if len(home) == len(threads):
                    all_home.set()

    threads = [
        threading.Thread(target=thread, args=(cpu,), name=f"vcpu{cpu.index}", daemon=True)
        for cpu in cpus[1:]
    ]
    while True:
        try:
            if not decisive and not ready:
                for each in threads:
                    each.start()
                ready.append(True)
                gate.set()
                one(cpus[0])
            gate.set()
            if ready:
                all_home.wait()
            for each in threads:
                if each.is_alive():
                    each.join()
            break
        except BaseException as error:  # Ctrl-C outside the first one's run; no thread to be had
            decide(cpus[0], _raised(error))
            cpus[0]._runner.stop()
    for cpu in cpus:  # a stop may have come to one that had ended
        cpu._runner.forget_stop()
    if not decisive:
        return halted[-1]
    for cpu in [*others, *(cpu for cpu, _ in halted)]:
        cpu._runner.give_back()
    cpu, end = decisive[0]
    if end.raised is not None:
        raise end.raised
    return cpu, end


def _raised(error: BaseException) -> End:
    if isinstance(error, KeyboardInterrupt):
        return End(reasons.INTERRUPTED)
    return End("raised", raised=error)
