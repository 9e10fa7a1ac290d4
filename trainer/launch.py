"""Keeps torchrun quiet when a worker has already said what went wrong.

torchrun starts the workers and raises ChildFailedError when one of them fails, so its own traceback would come last,
below the worker's error line. Only code in torchrun's process can change that. PyTorch calls `quiet_launcher` at the
end of `import torch` (the entry point in pyproject.toml), in every process of an environment that has Strop, so
it returns at once anywhere else, imports nothing heavy and never raises.
"""

import os
import sys

# what the launcher logs about a failed worker, and its advice on threads, whose number Strop sets itself
LOGGED = {
    "torch.distributed.elastic.multiprocessing.api": ("failed (exitcode", "Sending process %s closing signal"),
    "torch.distributed.elastic.agent.server.api": ("Received %s death signal",),
    "torch.distributed.run": ("Setting OMP_NUM_THREADS",),
}


def quiet_launcher() -> None:
    """Makes a failed worker's own message the last one, if this process is torchrun and starts Strop."""
    try:
        if starts_strop(getattr(sys, "orig_argv", ())):
            _install()
    except Exception:  # an error here would break `import torch`
        pass


def starts_strop(argv) -> bool:
    """Whether the command line is torchrun's, in any spelling, with trainer/main.py, strop.trainer.main or `strop`."""
    words = [os.path.basename(word) for word in argv[1:]]
    if not ("torchrun" in words[:3] or ("-m" in words and "torch.distributed.run" in words)):
        return False
    ours = os.path.join(os.path.dirname(os.path.abspath(__file__)), "main.py")
    return any(
        word == "strop.trainer.main"
        or (name == "main.py" and os.path.exists(word) and os.path.samefile(word, ours))
        or (name == "strop" and ("--no-python" in argv or os.path.isfile(word)))
        for name, word in zip(words, argv[1:], strict=True)
    )


def last_words(error: BaseException) -> str | None:
    """What torchrun says about `error`: "" if a worker has said it, None if the error is torchrun's own."""
    if not type(error).__module__.startswith("torch.distributed.elastic"):
        return None
    if type(error).__name__ == "SignalException":  # torchrun was stopped and has passed the signal on to the workers
        return "" if error.sigval == 2 else f"stopped by {_name(error.sigval)}; the same command resumes the run"
    if type(error).__name__ != "ChildFailedError":
        return None
    # after the first failure torchrun ends the other workers with SIGTERM, half a minute later with SIGKILL; those are
    # failures, too, but no cause. A rank that lost its connection to a killed one may be noticed first.
    failures = sorted(error.failures.items(), key=lambda item: item[1].timestamp)
    early = [(rank, f.exitcode) for rank, f in failures if f.timestamp <= failures[0][1].timestamp + 1]
    rank, code = next((item for item in early if item[1] < 0 and item[1] != -15), early[0])
    if code > 0:
        return ""
    why = ", probably because memory ran out" if code == -9 else ""
    return f"error: rank {rank} was killed by {_name(-code)}{why}; the same command resumes the run"


def _name(number: int) -> str:
    import signal

    return signal.Signals(number).name


def _install() -> None:
    import logging

    for name, messages in LOGGED.items():
        logging.getLogger(name).addFilter(lambda record, known=messages: not any(m in str(record.msg) for m in known))
    usual = sys.excepthook

    def hook(kind, error, trace) -> None:
        try:
            words = last_words(error)
        except Exception:
            words = None
        if words is None:
            usual(kind, error, trace)
        elif words:
            print(words, file=sys.stderr, flush=True)

    sys.excepthook = hook
