"""Tokens per second of the in-process sampler at the shape of Llama-3.2-1B, beside transformers' generate.

    python -m benchmarks.gpu.sampling [--out FOLDER] [--dry-run]

K = 8 completions per prompt of 512 tokens, all of full length, for 128 and 512 rows decoded together; once more without
CUDA graphs, with top-k and top-p, and beside transformers. The floor of a step is a read of the weights and of all KV,
each prompt's once, at the rate of a copy. Writes OUT/sample.json, with seconds by kernel and the host's launches and
waits of 32 steps. --dry-run samples from a tiny model on the CPU.
"""

from __future__ import annotations

import copy
import json
import random
import sys
import time
from collections import Counter
from itertools import pairwise

import torch

from strop.kernels.integrations.transformers import fuse_layers, merge_projections
from strop.trainer.sampling.in_process import Generator
from strop.trainer.sampling.on_device import DeviceEngine

from .. import measure
from ..step_sides import random_model
from . import cases

K = 8
# Rows, prompt tokens, new tokens.
SHAPES = ((128, 512, 256), (512, 512, 256), (128, 2048, 256))


def prompts_of(rows: int, length: int, vocab: int) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(10, vocab - 10) for _ in range(length)] for _ in range(rows // K)]


def floor_seconds(model, rows: int, prompt: int, new: int, copy_rate: float) -> float:
    """Of one decode step, averaged over the completion's length."""
    config = model.config
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    kv = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
    return (weights + kv * (rows // K * prompt + rows * new / 2)) / copy_rate


def fused(model):
    """A copy as load_for_generation makes it."""
    model = copy.deepcopy(model)
    fuse_layers(model, inference=True)
    merge_projections(model)
    return model


def ours(model, rows: int, prompt: int, new: int, device: torch.device, rate: float, found: dict,
         graphs: bool = True, sampling: dict | None = None) -> str:
    generator, prompts = Generator(model), prompts_of(rows, prompt, model.config.vocab_size)
    generator.engine = generator.engine or DeviceEngine(model, device)  # also in a dry run
    generator.engine.graphs.capturing &= graphs
    options = {"k": K, "temperature": 1.0, "batch_size": rows, **(sampling or {})}
    generator.generate(prompts, max_new_tokens=new, **options)  # compiles and captures
    start = measure.start_peak(device)
    steps = []

    def count(finished: int, drawn: int) -> None:
        steps.append((time.perf_counter(), drawn))

    began = time.perf_counter()
    generator.generate(prompts, max_new_tokens=new, on_progress=count, **options)
    measure.synchronize(device)
    seconds = time.perf_counter() - began
    # the first draw follows the last prefill
    decode = [(b - a, drawn) for (a, _), (b, drawn) in pairwise(steps) if drawn == rows]
    step = sum(t for t, _ in decode) / max(1, len(decode))
    tokens = rows * new
    floor = floor_seconds(model, rows, prompt, new, rate)
    found["strop"] = {
        "seconds": seconds, "tokens": tokens, "step_seconds": step, "floor_seconds": floor,
        "peak_bytes": measure.peak_since(start, device), "kv_bytes": generator.engine.pool.nbytes(),
        "graphs": len(generator.engine.graphs.held), "profile": profile(generator, prompts, options, device),
    }
    return (f"{tokens / seconds:,.0f} tokens/s, a decode step {step * 1e3:.2f} ms ({floor / step:.0%} of the floor's "
            f"rate), {found['strop']['peak_bytes'] / 2**30:.1f} GiB beyond the weights")


def profile(generator: Generator, prompts: list, options: dict, device: torch.device) -> dict:
    """Seconds by kernel, of 32 tokens; the host's busy time where there is no GPU."""
    cuda = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU, *[torch.profiler.ProfilerActivity.CUDA] * cuda]
    try:
        generator.generate(prompts, max_new_tokens=32, **options)  # other settings are captured anew
        with torch.profiler.profile(activities=activities) as prof:
            generator.generate(prompts, max_new_tokens=32, **options)
            measure.synchronize(device)
        wanted = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
        times, syncs, launches = Counter(), 0, Counter()
        for event in prof.events():
            syncs += "Synchronize" in event.name
            if event.name.startswith("cu") and any(kind in event.name for kind in ("Launch", "Memcpy", "Memset")):
                launches[event.name] += 1
            if event.device_type == wanted:
                times[event.name] += (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6
        return {"synchronizations": syncs, "launches": dict(launches), "seconds": dict(times.most_common(25))}
    except Exception as error:  # what was timed stays
        return {"failed": f"{type(error).__name__}: {error}"}


def theirs(model, rows: int, prompt: int, new: int, device: torch.device, found: dict) -> str:
    """transformers' generate on the same prompts, which repeats each prompt K times."""
    model.set_attn_implementation("sdpa")
    ids = torch.tensor(prompts_of(rows, prompt, model.config.vocab_size), device=device)
    options = {"do_sample": True, "top_k": 0, "num_return_sequences": K, "pad_token_id": 2, "eos_token_id": None}

    def generate(tokens: int) -> float:
        began = time.perf_counter()
        mask = torch.ones_like(ids)
        model.generate(ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, **options)
        measure.synchronize(device)
        return time.perf_counter() - began

    generate(2)
    short = max(2, new // 8)
    once, twice = generate(short), generate(2 * short)
    found["transformers"] = {"step_seconds": (twice - once) / short, "tokens": short}
    return f"a decode step {(twice - once) / short * 1e3:.2f} ms"


def main(arguments: list[str] | None = None) -> int:
    options = cases.parser(__doc__).parse_args(arguments)
    from transformers import LlamaForCausalLM  # noqa: F401

    cases.wait_for_turn(options)
    device, shapes = torch.device("cuda"), SHAPES
    if options.dry_run:
        device, shapes = torch.device("cpu"), ((16, 24, 8), (32, 24, 8))
    rate = measure.copy_rate(device)
    with torch.device(device):
        model = random_model("tiny" if options.dry_run else "Llama-3.2-1B")
    model = model.to(torch.float32 if options.dry_run else torch.bfloat16).eval()
    running, found = cases.Cases(options.dry_run), {}

    def run(name: str, case: str, function, *arguments, **keys) -> None:
        held = found.setdefault(case, {})
        running.run(f"{name}, {case}", lambda: function(*arguments, found=held, **keys), seconds=15)
        cases.free()
        written = {"date": time.strftime("%Y-%m-%d"), "environment": measure.environment(device), "cases": found}
        (options.out / "sample.json").write_text(json.dumps(written, indent=1) + "\n")

    quick = fused(model)
    named = [(shape, f"{shape[0]} rows, {shape[1]}+{shape[2]} tokens, K = {K}") for shape in shapes]
    for shape, name in named:  # all of ours first
        run("Strop", name, ours, quick, *shape, device, rate)
    shape, name = named[0]
    run("Strop", f"{name}, top-k 50 and top-p 0.9", ours, quick, *shape, device, rate,
        sampling={"top_k": 50, "top_p": 0.9})
    run("Strop", f"{name}, without graphs", ours, quick, *shape, device, rate, graphs=False)
    del quick
    for shape, name in named[:1]:
        run("transformers", name, theirs, model, *shape, device)
    return 1 if running.failed else 0


if __name__ == "__main__":
    sys.exit(main())
