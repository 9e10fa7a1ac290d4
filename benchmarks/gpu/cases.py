"""What the scripts' programs share: options, waiting for a turn, running cases until the deadline."""

from __future__ import annotations

import argparse
import gc
import os
import re
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

# What a case ends with where there is no GPU, or where it reads a value of a tensor that has none; any other error is a
# fault of ours or of a peer's call. hasPrimaryContext is where autograd starts a backward pass on a GPU.
NO_GPU = re.compile("|".join((
    "NVIDIA driver", "CUDA driver version is insufficient", "0 active drivers", "not compiled with CUDA",
    "without ATen_cuda library", "accelerator device when none is available", "hasPrimaryContext",
    "Cannot access data pointer", "Tensor subclass CausalBias", "_local_scalar_dense", "aten.nonzero",
)))


def parser(description: str) -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder of the results")
    found.add_argument("--after", type=Path, help="wait until this file exists before the first case")
    found.add_argument("--seconds", type=float, help="from then on: cases that do not begin within them are left out")
    found.add_argument("--dry-run", action="store_true", help="every case up to its first CUDA call, without a GPU")
    return found


def wait_for_turn(options: argparse.Namespace) -> None:
    """Waits for options.after, and then sets DEADLINE to options.seconds from now, if that is earlier."""
    while options.after and not options.after.exists() and seconds_left() > 0:
        time.sleep(0.1)
    if options.seconds is not None:
        os.environ["DEADLINE"] = str(time.time() + min(options.seconds, seconds_left()))


def seconds_left() -> float:
    """Seconds until DEADLINE, which the scripts set; a day without it."""
    return float(os.environ.get("DEADLINE") or time.time() + 86400) - time.time()


class Cases:
    """Runs cases one after the other; a case that fails, or is not reached in time, costs itself alone."""

    def __init__(self, dry: bool):
        self.dry, self.failed = dry, 0

    def run(self, name: str, case: Callable[[], str], seconds: float = 5.0) -> bool:
        """Calls `case`, which returns a line on what it found. seconds: what it takes at least. True if it ran."""
        if seconds_left() < seconds:
            print(f"{name}: left out, {seconds_left():.0f} s left", flush=True)
            return False
        started = time.perf_counter()
        try:
            text = case()
        except Exception as error:
            text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:160]
            if self.dry and NO_GPU.search(str(error)):
                print(f"{name}: reached the first CUDA call ({type(error).__name__}: {text})", flush=True)
                return True
            self.failed += 1
            traceback.print_exc(limit=-6)
            print(f"{name}: FAILED: {type(error).__name__}: {text}", flush=True)
            free()
            return False
        print(f"{name}: {text} [{time.perf_counter() - started:.1f} s]", flush=True)
        return True


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
