"""Where the time of a training step goes, by torch.profiler.

    python -m benchmarks.step_profile [--shapes 512:64,128:64,64:256] [--write]

A step is that of benchmarks.step_sides, DPO with 8 pairs. The times are those that operators spend themselves, by what
they were called from: the head (linear_logprob), attention (prefix_attention), the optimizer (AdamW alone), and what is
left, layers, by kind. Attention is one operator each way with all its products, as is flash attention forward, which
counts for itself and stands where the operator was not built. The floor is the FLOPs of the step at the rate of the
fastest matrix product of the same run.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter

import torch
from torch.profiler import ProfilerActivity, profile

from strop.trainer.run.world import World

from . import measure
from .step_sides import Job, model_folder, strop_step

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear", "mkldnn")
PARTS = {"attention": "attention", "linear_logprob": "head", "adamw": "optimizer", "square_sums": "optimizer"}


def kind_of(event) -> str:
    """The category of an operator's self time: the part of the step that called it, and whether it is a GEMM."""
    if "flash_attention" in event.name:
        return "attention, flash"
    is_product = any(event.name.startswith(name) for name in PRODUCTS)
    up = event
    while up is not None:
        for mark, part in PARTS.items():
            if mark in up.name.lower():
                return f"{part}, products" if is_product and part != "optimizer" else part
        up = up.cpu_parent
    return "layers, products" if is_product else "layers, other"


def seconds_by_kind(prof: profile) -> dict[str, float]:
    found = Counter()
    for event in prof.events():
        found[kind_of(event)] += event.self_cpu_time_total / 1e6
    return dict(found)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="512:64,128:64,64:256", help="prompt:completion tokens")
    parser.add_argument("--write", action="store_true", help="keep the results")
    options = parser.parse_args(arguments)
    device = torch.device("cpu")
    dtype = torch.bfloat16 if World(device=device).multiplies_bf16 else torch.float32
    rate = measure.matmul_rate(device, dtype)
    cases = {}
    for shape in options.shapes.split(","):
        prompt, completion = map(int, shape.split(":"))
        job = Job(model="SmolLM2-135M", task="dpo", prompt=prompt, completion=completion, rows=8, device="cpu",
                  max_tokens=8192, trl_tokens=2048, dtype=str(dtype).removeprefix("torch."))
        flops, step = strop_step(job, model_folder(job.model))
        for _ in range(4):  # until the C library holds all the memory that a step needs
            step()
        with profile(activities=[ProfilerActivity.CPU]) as prof:
            step()
        seconds = seconds_by_kind(prof)
        seconds = dict(sorted(seconds.items(), key=lambda pair: -pair[1]))
        name = f"{job.model}, DPO {shape}, 8 pairs"
        cases[name] = {"step_seconds": sum(seconds.values()), "floor_seconds": flops / rate, "seconds": seconds}
        print(f"{name}: {sum(seconds.values()):.2f} s, floor {flops / rate:.2f} s")
        for kind, value in seconds.items():
            print(f"  {value:6.2f} s  {value / sum(seconds.values()):4.0%}  {kind}")
        print(prof.key_averages().table(sort_by="self_cpu_time_total", row_limit=12, max_name_column_width=40))
    if options.write:
        measure.keep_cases("step_profile.json", device, cases)
    return 0


if __name__ == "__main__":
    sys.exit(main())
