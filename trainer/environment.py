"""Environment variables that libraries read when they are imported: set before torch and transformers load."""

import os
import sys

from strop.trainer.errors import UserError

# libgomp's threads wait for each other at the end of every parallel loop. By default they spin for about a millisecond
# and then sleep; with another busy process on the machine they are woken late, and a training step took 1.2 to 1.9
# times as long (docs/performance.md). Spinning for some 20 ms keeps each thread on its core; idle threads still sleep.
SPIN = "10000000"


def prepare_environment() -> None:
    """No network, no library progress bars or warnings between a run's own lines, and CPU threads that spin longer.

    Variables that are set already win, except HF_HUB_OFFLINE: only what a recipe names is downloaded, explicitly."""
    defaults = {"TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    if not any(name in os.environ for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")):
        defaults["GOMP_SPINCOUNT"] = SPIN
    os.environ.update({**defaults, **os.environ, "HF_HUB_OFFLINE": "1"})


def check_process() -> None:
    """Opens standard streams that were closed, or the next file would take their numbers. Raises UserError if the
    working directory was deleted."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
            setattr(sys, name, open(number, "w" if number else "r"))  # noqa: SIM115
    try:
        os.getcwd()
    except FileNotFoundError as e:
        raise UserError("the working directory was deleted; cd to one that exists") from e
