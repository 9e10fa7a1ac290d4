"""Stopping on SIGINT, SIGTERM and SIGHUP: at the next safe point, or immediately after a few seconds."""

import signal
import sys
from contextlib import contextmanager, suppress
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PATIENCE = 5.0  # seconds to reach a safe point

_received: list[int] = []


@contextmanager
def handled(first: bool):
    """Handles the signals inside the block. KeyboardInterrupt is raised at a safe point, and immediately on a second
    signal or after PATIENCE seconds. first: whether this is the rank that prints."""

    def stop(number: int, frame: FrameType | None) -> None:
        _received.append(number)
        if number == signal.SIGALRM or len(_received) > 1:
            raise KeyboardInterrupt
        signal.setitimer(signal.ITIMER_REAL, PATIENCE)
        if first and number != signal.SIGHUP:  # after SIGHUP there is no terminal
            print("stopping at the next safe point; again to stop at once", file=sys.stderr, flush=True)

    _received.clear()
    before = {number: signal.signal(number, stop) for number in (*SIGNALS, signal.SIGALRM)}
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def requested() -> bool:
    """Whether a signal asked this process to stop."""
    return bool(_received)


def point() -> None:
    """A safe point: raises KeyboardInterrupt if a signal asked this process to stop."""
    if _received:
        raise KeyboardInterrupt


def report(first: bool) -> int:
    """Prints that the run stopped; returns the exit code that shells use for the signal."""
    with suppress(OSError):  # after SIGHUP there is no terminal
        if first:
            print("stopped; the same command resumes", file=sys.stderr, flush=True)
    return 128 + (_received[0] if _received else signal.SIGINT)
