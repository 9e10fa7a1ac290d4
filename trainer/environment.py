"""Environment variables that libraries read when they are imported: set before torch and transformers load."""

import os
import sys

from strop.trainer.errors import UserError

# libgomp's threads spin for about 1 ms at the end of a parallel loop and then sleep. On a busy machine they wake up
# late, which made training steps 1.2 to 1.9 times slower (docs/performance.md). Spinning for 20 ms keeps each thread on
# its core; idle threads still sleep.
SPIN = "10000000"
ASKED_OFFLINE = "STROP_HUB_OFFLINE"  # the user's HF_HUB_OFFLINE, also for our child processes
OURS = "ON"  # HF_HUB_OFFLINE as we set it; a user writes 1


def prepare_environment() -> None:
    """Disables network access, library progress bars and warnings, and lets CPU threads spin longer.

    Variables that are already set win, except HF_HUB_OFFLINE: a child process downloads what a recipe names."""
    if os.environ.get("HF_HUB_OFFLINE") != OURS or ASKED_OFFLINE not in os.environ:
        os.environ[ASKED_OFFLINE] = os.environ.get("HF_HUB_OFFLINE", "0")
    defaults = {"TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    if not any(name in os.environ for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")):
        defaults["GOMP_SPINCOUNT"] = SPIN
    os.environ.update({**defaults, **os.environ, "HF_HUB_OFFLINE": OURS})


def user_is_offline() -> bool:
    """Whether the user's own environment forbids network access."""
    names = (ASKED_OFFLINE, "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in names)


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
