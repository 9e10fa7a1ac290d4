"""How much another busy process slows a training step, with libgomp's waiting as it is by default and as
Strop sets it (trainer/environment.py).

    python -m benchmarks.contention [--tries 3] [--write]

A step is that of benchmarks.step_sides: DPO, SmolLM2-135M, 4 pairs of 64:32 tokens, all cores. A try is a process that
takes steps alone, then beside each neighbor; both settings take turns. A neighbor is `sh -c 'while :; do :; done'` at
the given niceness. --write keeps the numbers in benchmarks/results/<device>/contention.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from statistics import median

import torch

from strop.trainer.environment import SPIN
from strop.trainer.run.world import World

from . import measure
from .step_sides import Job, model_folder, strop_step

SETTINGS = {"libgomp's default": {}, f"GOMP_SPINCOUNT={SPIN}": {"GOMP_SPINCOUNT": SPIN}}
NEIGHBORS = {"one at nice 10": [10], "two at nice 10": [10, 10], "one at nice 0": [0]}
STEPS = 5


def child() -> None:
    """Seconds of a step alone and beside each neighbor, as one JSON line."""
    dtype = "bfloat16" if World().multiplies_bf16 else "float32"
    job = Job(model="SmolLM2-135M", task="dpo", prompt=64, completion=32, rows=4, device="cpu", max_tokens=8192,
              trl_tokens=2048, dtype=dtype)
    _, step = strop_step(job, model_folder(job.model))

    def seconds() -> float:
        found = []
        for _ in range(STEPS):
            started = time.perf_counter()
            step()
            found.append(time.perf_counter() - started)
        return median(found)

    for _ in range(3):
        step()
    found = {"alone": seconds()}
    for name, levels in NEIGHBORS.items():
        busy = [subprocess.Popen(["nice", "-n", str(n), "sh", "-c", "while :; do :; done"]) for n in levels]
        try:
            found[name] = seconds()
        finally:
            for process in busy:
                process.kill()
                process.wait()
    print(json.dumps(found))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=3, help="processes per setting")
    parser.add_argument("--write", action="store_true", help="keep the results")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        child()
        return 0
    tries: dict[str, list[dict]] = {name: [] for name in SETTINGS}
    for _ in range(options.tries):
        for name, setting in SETTINGS.items():
            environment = {k: v for k, v in os.environ.items() if not k.startswith(("GOMP_", "OMP_"))} | setting
            done = subprocess.run([sys.executable, "-m", "benchmarks.contention", "--child"], env=environment,
                                  stdout=subprocess.PIPE, text=True, check=True)
            tries[name].append(json.loads(done.stdout.splitlines()[-1]))
    cases = {}
    for name, found in tries.items():
        alone = median(t["alone"] for t in found)
        cases[name] = {"alone_seconds": alone,
                       "times_as_long": {n: [round(t[n] / t["alone"], 2) for t in found] for n in NEIGHBORS}}
        print(f"{name}: {alone:.2f} s alone; times as long beside "
              + "; ".join(f"{n}: {', '.join(map(str, v))}" for n, v in cases[name]["times_as_long"].items()))
    if options.write:
        measure.keep_cases("contention.json", torch.device("cpu"), cases)
    return 0


if __name__ == "__main__":
    sys.exit(main())
