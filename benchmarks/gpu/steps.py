"""Training steps of one side, Strop's or TRL's, at the shape of Llama-3.2-1B with random weights.

    python -m benchmarks.gpu.steps --side "strop compiled"|strop|"trl masters"|"trl autocast" [--out FOLDER] [--dry-run]

The sides run one after the other, each in a process of its own, on microbatches of up to 8,192 tokens. "strop compiled"
is the training section's `compile: true`. Writes OUT/train_step.json, whose cases compare TRL's sides with
the faster of Strop's, and for Strop OUT/step_profile.json: device time by part of the step and by kernel, from
torch.profiler, of the task that a side is taken for. --dry-run trains a tiny model on the CPU instead.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median

import torch

from .. import measure
from ..step_profile import kind_of
from ..step_sides import Job, model_folder, sharing_ratio, strop_engine, strop_step, trl_trainer
from . import cases

SIDES = ("strop compiled", "strop", "trl masters", "trl autocast")
SHAPES = ((512, 64), (2048, 512))
TASKS = ("dpo", "sft")
TOKENS = 8192
WARM_UP, ROUNDS = 2, 3
PROFILED = {"strop": "dpo", "strop compiled": "sft"}  # the task that each side is taken for


def jobs(side: str, dry: bool) -> list[Job]:
    """The most important first: DPO of both shapes, then SFT."""
    shapes, tokens = (((16, 8), (32, 16)), 128) if dry else (SHAPES, TOKENS)
    found = []
    for task in TASKS:
        for prompt, completion in shapes:
            rows, length = (8, 2 * (prompt + completion)) if task == "dpo" else (16, prompt + completion)
            fit = max(n for n in range(1, rows + 1) if rows % n == 0 and (n == 1 or n * length <= tokens))
            found.append(Job(
                model="tiny" if dry else "Llama-3.2-1B", task=task, prompt=prompt, completion=completion, rows=rows,
                device="cpu" if dry else "cuda", max_tokens=tokens, trl_tokens=tokens, trl_pairs=fit, side=side,
                dtype="float32" if dry else "bfloat16",
            ))
    return found


class Clock:
    """Seconds and peak bytes of each step, between `start` and `stop`."""

    def __init__(self, device: str):
        self.device, self.seconds, self.peaks, self.losses = torch.device(device), [], [], []

    def start(self) -> None:
        measure.synchronize(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.began = time.perf_counter()

    def stop(self) -> None:
        measure.synchronize(self.device)
        self.seconds.append(time.perf_counter() - self.began)
        self.peaks.append(torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0)

    def record(self) -> dict:
        return {"seconds": median(self.seconds[WARM_UP:]), "all_seconds": self.seconds,
                "peak_bytes": max(self.peaks), "losses": self.losses}


@contextmanager
def kept(path: Path):
    """The JSON object in `path`, written back at the end."""
    found = json.loads(path.read_text()) if path.exists() else {}
    yield found
    written = path.with_suffix(".tmp")
    written.write_text(json.dumps(found, indent=1) + "\n")
    written.replace(path)


def keep(out: Path, job: Job, record: dict, rate: float, folder: Path) -> str:
    """Puts a side's record into train_step.json; a case is complete when both sides have it."""
    name = f"{job.model} {job.task} {job.prompt}:{job.completion}"
    with kept(out / "train_step.json") as found:
        found |= {"date": time.strftime("%Y-%m-%d"), "environment": measure.environment(torch.device(job.device))}
        sides = found.setdefault("sides", {})
        sides.setdefault(name, {})[job.side] = record | {"matmul_rate": rate}
        mine = [side for side in sides[name] if side.startswith("strop")]
        best = min(mine, key=lambda side: sides[name][side]["seconds"], default=None)
        for peer, theirs in sides[name].items() if best else ():
            if peer not in mine:
                ours = sides[name][best]
                apart = abs(ours["losses"][0] - theirs["losses"][0]) / abs(theirs["losses"][0])
                found.setdefault("cases", {})[f"{name} {peer}"] = {
                    **asdict(replace(job, side=peer)), "of": best, "tokens": job.distinct_tokens,
                    "flops": ours["flops"], "flop_ratio": sharing_ratio(job, folder), "matmul_rate": rate,
                    "loss_apart": apart,
                    "strop": {k: ours[k] for k in ("seconds", "all_seconds", "peak_bytes")},
                    "peer": {k: theirs[k] for k in ("seconds", "all_seconds", "peak_bytes")},
                }
    tokens = job.distinct_tokens / record["seconds"]
    text = f"{record['seconds'] * 1e3:.1f} ms, {tokens:,.0f} tokens/s, {record['peak_bytes'] / 2**30:.1f} GiB"
    if job.side.startswith("strop"):
        from strop.trainer.training.flops import peak_flops

        achieved, peak = record["flops"] / record["seconds"], peak_flops(torch.device(job.device), torch.bfloat16)
        text += f", MFU {achieved / peak:.1%} of the data sheet, {achieved / rate:.1%} of a matrix product"
    elif best:
        text += f", {record['seconds'] / ours['seconds']:.2f} times the time of {best}"
    return text


def time_strop(job: Job, folder: Path, engine, out: Path, rate: float) -> str:
    flops, step = strop_step(job, folder, engine)
    clock = Clock(job.device)
    for _ in range(WARM_UP + ROUNDS):
        clock.start()
        loss = step()
        clock.stop()
        clock.losses.append(loss.item())
    text = keep(out, job, clock.record() | {"flops": flops}, rate, folder)
    if job.task != PROFILED[job.side]:
        return text
    try:
        profiled(job, step, flops / rate, out)
    except Exception as error:  # what was timed stays
        text += f"; no profile: {type(error).__name__}: {error}"
    return text


def profiled(job: Job, step, floor: float, out: Path) -> None:
    """Adds a step's device time by part and by kernel to step_profile.json, and prints the kernels."""
    cuda = job.device == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU, *[torch.profiler.ProfilerActivity.CUDA] * cuda]
    with torch.profiler.profile(activities=activities) as prof:
        began = time.perf_counter()
        step()
        measure.synchronize(torch.device(job.device))
        wall = time.perf_counter() - began
    parts, kernels = Counter(), Counter()
    for event in prof.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and event.is_user_annotation:
            continue  # a range, not a kernel
        if event.device_type == torch.autograd.DeviceType.CPU:
            parts[kind_of(event)] += (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6
        else:
            kernels[event.name] += event.self_device_time_total / 1e6
    busy = sum(kernels.values()) if cuda else sum(parts.values())
    parts = {name: seconds for name, seconds in parts.most_common() if seconds > 1e-6}
    name = f"{job.model}, {job.task.upper()} {job.prompt}:{job.completion}, {job.rows} rows"
    name += ", compiled" if job.side == "strop compiled" else ""
    with kept(out / "step_profile.json") as found:
        found |= {"date": time.strftime("%Y-%m-%d"), "environment": measure.environment(torch.device(job.device))}
        found.setdefault("cases", {})[name] = {
            "step_seconds": sum(parts.values()), "floor_seconds": floor, "seconds": parts, "wall_seconds": wall,
            "busy_seconds": busy, "kernels": dict(kernels.most_common(40)),
        }
    print(f"{name}: profiled {wall * 1e3:.1f} ms, busy {busy * 1e3:.1f} ms")
    for kind, seconds in parts.items():
        print(f"  {seconds * 1e3:8.2f} ms  {kind}")
    for kernel, seconds in kernels.most_common(12):
        print(f"    {seconds * 1e3:8.2f} ms  {kernel[:100]}")


def time_trl(job: Job, folder: Path, out: Path, rate: float) -> str:
    from transformers.trainer_callback import PrinterCallback, TrainerCallback

    clock = Clock(job.device)

    class Timed(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            clock.start()

        def on_step_end(self, args, state, control, **kwargs):
            clock.stop()

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                clock.losses.append(logs["loss"])

    trainer = trl_trainer(job, folder, Timed(), max_steps=WARM_UP + ROUNDS)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return keep(out, job, clock.record(), rate, folder)


def main(arguments: list[str] | None = None) -> int:
    parser = cases.parser(__doc__)
    parser.add_argument("--side", choices=SIDES, default="strop")
    options = parser.parse_args(arguments)
    wanted = jobs(options.side, options.dry_run)
    if options.side.startswith("strop"):
        from transformers import LlamaForCausalLM  # noqa: F401

        import strop.trainer.training.local  # noqa: F401
    else:
        import datasets  # noqa: F401
        from trl import DPOTrainer, SFTTrainer  # noqa: F401
    cases.wait_for_turn(options)
    rate = measure.matmul_rate(torch.device(wanted[0].device), getattr(torch, wanted[0].dtype))
    folder = model_folder(wanted[0].model)
    running = cases.Cases(options.dry_run)
    engine = strop_engine(wanted[0], folder) if options.side.startswith("strop") else None
    for job in wanted:
        name = f"{job.side} {job.task} {job.prompt}:{job.completion}"
        if engine is not None:
            running.run(name, lambda job=job: time_strop(job, folder, engine, options.out, rate))
        else:
            running.run(name, lambda job=job: time_trl(job, folder, options.out, rate), seconds=7)
            cases.free()
    return 1 if running.failed else 0


if __name__ == "__main__":
    sys.exit(main())
