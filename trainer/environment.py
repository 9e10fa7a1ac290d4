"""Environment variables that libraries read when they are imported: set before torch and transformers load."""

import os

# libgomp's threads wait for each other at the end of every parallel loop. By default they spin for about a millisecond
# and then sleep; with another busy process on the machine they are woken late, and a training step took 1.2 to 1.9
# times as long (docs/performance.md). Spinning for some 20 ms keeps each thread on its core; idle threads still sleep.
SPIN = "10000000"
ASKED_OFFLINE = "STROP_HUB_OFFLINE"  # keeps HF_HUB_OFFLINE as the user has set it, also for processes that we start
OURS = "ON"  # HF_HUB_OFFLINE as we set it; a user writes 1


def prepare_environment() -> None:
    """No network, no library progress bars or warnings between a run's own lines, and CPU threads that spin longer.

    Variables that are set already win, except HF_HUB_OFFLINE: only what a recipe names is downloaded, by a child."""
    if os.environ.get("HF_HUB_OFFLINE") != OURS or ASKED_OFFLINE not in os.environ:
        os.environ[ASKED_OFFLINE] = os.environ.get("HF_HUB_OFFLINE", "0")
    defaults = {"TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    if not any(name in os.environ for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")):
        defaults["GOMP_SPINCOUNT"] = SPIN
    os.environ.update({**defaults, **os.environ, "HF_HUB_OFFLINE": OURS})


def user_is_offline() -> bool:
    """Whether the user's own environment forbids to ask the hub."""
    names = (ASKED_OFFLINE, "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in names)
