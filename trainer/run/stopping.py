"""Stopping on SIGINT, SIGTERM and SIGHUP: at the next safe point, or after a few seconds wherever the run is."""

import signal
import sys
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PATIENCE = 5.0  # seconds to reach a safe point

_received: list[int] = []


@contextmanager
def handled(first: bool):
    """Handles the signals inside. A second signal, or PATIENCE seconds, raise KeyboardInterrupt at once.

    first: whether this rank tells the user."""

    def stop(number: int, frame: FrameType | None) -> None:
        _received.append(number)
        if number == signal.SIGALRM or len(_received) > 1:
            raise KeyboardInterrupt
        signal.setitimer(signal.ITIMER_REAL, PATIENCE)
        if first and number != signal.SIGHUP:  # after SIGHUP there is no terminal to write to
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
    """Whether a signal has asked this process to stop."""
    return bool(_received)


def point() -> None:
    """A safe point: raises KeyboardInterrupt if a signal has asked this process to stop."""
    if _received:
        raise KeyboardInterrupt


def exit_code() -> int:
    """The shell's exit code for the signal that stopped this process."""
    return 128 + (_received[0] if _received else signal.SIGINT)
