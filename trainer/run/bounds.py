"""Bounds on CPU time and memory for code that a file brings along: chat templates, compressed tables."""

import resource
import signal
import threading
from contextlib import contextmanager
from pathlib import Path

from strop.trainer.errors import UserError

PAGE = resource.getpagesize()


@contextmanager
def bounded(what: str, *, seconds: float | None = None, gibibytes: float = 0.75):
    """Raises UserError, beginning with `what`, if the block takes more CPU time or allocates more memory than given.

    seconds: CPU time of this process; only the main thread can be interrupted, so elsewhere time has no bound.
    gibibytes: address space beyond what the process has now, a bound for the whole process while the block runs."""

    def interrupt(number, frame):
        raise UserError(f"{what} takes more than {seconds:g} s of CPU time")

    timed = seconds is not None and threading.current_thread() is threading.main_thread()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * PAGE + int(gibibytes * 2**30)
    if soft != resource.RLIM_INFINITY:
        limit = min(limit, soft)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    before = signal.signal(signal.SIGVTALRM, interrupt) if timed else None
    try:
        if timed:
            signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 0.05)  # again, should the block swallow the error
        yield
    except MemoryError as e:
        raise UserError(f"{what} needs more than {gibibytes:g} GiB of memory") from e
    finally:
        if timed:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
