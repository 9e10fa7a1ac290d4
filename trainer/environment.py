"""Environment variables that libraries read when they are imported: set before torch and transformers load."""

import os

# libgomp's threads spin for about 1 ms at the end of a parallel loop and then sleep. On a busy machine they wake up
# late, which made training steps 1.2 to 1.9 times slower (docs/performance.md). Spinning for 20 ms keeps each thread on
# its core; idle threads still sleep.
SPIN = "10000000"


def prepare_environment() -> None:
    """Disables network access, library progress bars and warnings, and lets CPU threads spin longer.

    Variables that are already set win, except HF_HUB_OFFLINE: only what a recipe names is downloaded, explicitly."""
    defaults = {"TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    if not any(name in os.environ for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")):
        defaults["GOMP_SPINCOUNT"] = SPIN
    os.environ.update({**defaults, **os.environ, "HF_HUB_OFFLINE": "1"})
