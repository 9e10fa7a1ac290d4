"""A step of DPO, SFT or reward modeling of Strop beside TRL's: the same model, tokens, optimizer and precision,
interleaved in one run.

    python -m benchmarks.train_step [--tasks dpo,sft,reward] [--shapes 512:64,128:64,64:256] [--rounds 2] [--write]

Each side runs in a process of its own that waits while the other takes a step, so that neither peak memory nor warm-up
of one touches the other. benchmarks.step_sides has the steps; TRL runs once with fp32 weights under autocast, which is
its own way, and once with bf16 weights and the fp32 masters in the optimizer; the faster counts. On a processor that
does not multiply bf16 both sides compute in fp32. Losses of both sides are compared before times are.

--write puts the numbers into benchmarks/results/<device>/train_step.json; `python -m benchmarks.docs` makes the tables
of docs/performance.md from it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median

import torch

from strop.trainer.run.world import World

from . import measure as bench
from .step_sides import Job, model_folder, sharing_ratio, strop_step, trl_trainer

WARM_UP = 2


# -- one side, in its own process: `go` reads a line before each step, `done` answers it -----------------------------


class Turns:
    """Wait for the parent before each step; report time, peak memory and loss after it."""

    def __init__(self, device: str):
        self.device = torch.device(device)

    def go(self) -> None:
        if sys.stdin.readline().strip() != "step":
            os._exit(0)  # the trainer's loop has no other way out in the middle of an epoch
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")
        self.started = time.perf_counter()

    def done(self, loss: float | None = None) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
        else:
            fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            peak = int(fields["VmHWM"].split()[0]) << 10
        seconds = time.perf_counter() - self.started
        print(json.dumps({"seconds": seconds, "peak_bytes": peak, "loss": loss}), file=sys.__stdout__, flush=True)


def strop_side(job: Job, folder: Path) -> None:
    flops, step = strop_step(job, folder)
    print(json.dumps({"flops": flops}), file=sys.__stdout__, flush=True)
    turns = Turns(job.device)
    while True:
        turns.go()
        turns.done(step().item())


def trl_side(job: Job, folder: Path) -> None:
    from transformers import TrainerCallback

    turns = Turns(job.device)

    class Steps(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            print(json.dumps({"ready": True}), file=sys.__stdout__, flush=True)

        def on_step_begin(self, args, state, control, **kwargs):
            turns.go()

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                turns.done(logs["loss"])

    trl_trainer(job, folder, Steps()).train()


# -- the parent ---------------------------------------------------------------------------------------------------


class Side:
    def __init__(self, job: Job, folder: Path):
        command = [sys.executable, "-m", "benchmarks.train_step", "--worker", json.dumps(asdict(job)), str(folder)]
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )
        self.job, self.steps = job, []
        self.flops = self.read().get("flops")  # sent when it is ready: nobody steps while another still loads

    def read(self) -> dict:
        while line := self.process.stdout.readline():
            if line.startswith('{"'):
                return json.loads(line)
        self.errors.seek(0)
        raise RuntimeError(f"{self.job.side} stopped:\n{self.errors.read().decode()[-4000:]}")

    def step(self) -> dict:
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        self.steps.append(self.read())
        return self.steps[-1]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def measure(job: Job, peer: str, rounds: int) -> dict:
    """Strop and `peer` alternately; the first, cold steps of each do not count."""
    folder = model_folder(job.model)
    job = replace(job, dtype="float32" if peer == "trl fp32" else "bfloat16")
    running = [Side(replace(job, side=side), folder) for side in ("strop", peer)]
    try:
        for turn in range(-WARM_UP, rounds):
            for side in running:
                step = side.step()
                print(
                    f"  {job.task} {job.prompt}:{job.completion} {side.job.side:12} "
                    f"{'warm-up' if turn < 0 else f'round {turn + 1}':8} {step['seconds']:7.2f} s "
                    f"{step['peak_bytes'] / 2**30:6.2f} GiB  loss {step['loss']:.4f}",
                    flush=True,
                )
    finally:
        for side in running:
            side.close()
    alike = len(running[0].steps) if job.dtype == "float32" else 1  # in bf16 rounding drives later steps apart
    for losses in zip(*([step["loss"] for step in side.steps[:alike]] for side in running), strict=True):
        if max(losses) - min(losses) > 0.02 * max(losses):
            raise RuntimeError(f"the sides do not compute the same loss: {losses}")
    found = {
        name: {
            "seconds": median(s["seconds"] for s in side.steps[WARM_UP:]),
            "all_seconds": [s["seconds"] for s in side.steps],
            "peak_bytes": max(s["peak_bytes"] for s in side.steps),
        }
        for name, side in zip(("strop", "peer"), running, strict=True)
    }
    shared = {"tokens": job.distinct_tokens, "flops": running[0].flops, "flop_ratio": sharing_ratio(job, folder)}
    return {**asdict(job), "side": peer, **shared, **found}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--tasks", default="dpo,sft")
    parser.add_argument("--shapes", default="512:64,128:64,64:256", help="prompt:completion tokens")
    parser.add_argument("--models", default="Llama-3.2-1B,Llama-3.2-3B" if cuda else "SmolLM2-135M")
    in_bf16 = World(device=torch.device("cuda" if cuda else "cpu")).multiplies_bf16
    parser.add_argument("--peers", default="trl autocast,trl masters" if in_bf16 else "trl fp32")
    parser.add_argument("--rows", type=int, default=8, help="pairs (DPO) or rows (SFT) of a step")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=8192, help="Strop's budget of a microbatch")
    parser.add_argument("--trl-tokens", type=int, default=8192 if cuda else 2048, help="TRL's length of an SFT pack")
    parser.add_argument("--write", action="store_true", help="keep the results")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        job = Job(**json.loads(options.worker[0]))
        (strop_side if job.side == "strop" else trl_side)(job, Path(options.worker[1]))
        return 0
    device = torch.device("cuda" if cuda else "cpu")
    path = bench.results_folder(device) / "train_step.json"
    kept = json.loads(path.read_text())["cases"] if path.exists() else {}
    dtype = torch.bfloat16 if in_bf16 else torch.float32
    rate = bench.matmul_rate(device, dtype)
    sizes = {"device": device.type, "max_tokens": options.max_tokens, "trl_tokens": options.trl_tokens}
    for model, task, shape in itertools.product(
        *(x.split(",") for x in (options.models, options.tasks, options.shapes))
    ):
        prompt, completion = map(int, shape.split(":"))
        rows = options.rows * (2 if task == "sft" else 1)
        job = Job(model=model, task=task, prompt=prompt, completion=completion, rows=rows, **sizes)
        for peer in options.peers.split(","):
            found = measure(job, peer, options.rounds)
            before, rate = rate, bench.matmul_rate(device, dtype)  # a machine's best of both: its clock comes and goes
            found["matmul_rate"] = max(before, rate)
            ours, theirs = found["strop"], found["peer"]
            print(
                f"{task} {shape} {peer}: {theirs['seconds'] / ours['seconds']:.2f} times Strop's time, "
                f"{theirs['peak_bytes'] / ours['peak_bytes']:.2f} times its memory; sharing and skipping give "
                f"{found['flop_ratio']:.2f}",
                flush=True,
            )
            kept[f"{model} {task} {shape} {peer}"] = found
            if options.write:
                bench.keep_cases(path.name, device, kept)
    return 0


if __name__ == "__main__":
    sys.exit(main())
