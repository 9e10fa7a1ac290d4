"""Tokens per second of K completions per prompt on a CPU: Strop's sampler beside transformers and vLLM.

    python -m benchmarks.sampling [--k 8,32] [--prompt 64,512] [--vllm-python PYTHON] [--write]

Contenders run one after the other, each in a process of its own (benchmarks.sampling_sides), on the same prompts of
random tokens; every completion has all its tokens. Prefill counts. Peak memory is the process's, weights included. vLLM
needs a Python that has it: --vllm-python, or STROP_VLLM_PYTHON.

The floor is what the work cannot go below on this machine: the FLOPs of the products at the fastest rate of one, or
the bytes at the rate of a copy, whichever takes longer. Per step of --batch-size completions, the weights are read
once, the KV of a prompt once for all its completions, and those of each completion.

--write puts the numbers into benchmarks/results/<device>/sampling.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

import torch

from strop.trainer.run.world import World

from . import measure, sampling_sides
from .step_sides import MODELS, model_folder

SIDES = Path(sampling_sides.__file__)
LIMIT = 1800  # seconds for a contender


def floor_of(config, job: dict) -> tuple[float, float]:
    """(FLOPs, bytes) of a job."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers, heads, kv_heads = config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads
    body = layers * (config.hidden_size * head_dim * (2 * heads + 2 * kv_heads)
                     + 3 * config.hidden_size * config.intermediate_size)
    head, width = config.vocab_size * config.hidden_size, layers * heads * head_dim
    groups, k, p, n = job["prompts"], job["k"], job["prompt"], job["new"]
    rows, size = groups * k, 2 if job["dtype"] == "bfloat16" else 4
    # the first token follows from the prompt; n - 1 are fed
    scores = groups * p * (p + 1) / 2 + rows * sum(p + i for i in range(1, n))
    flops = 2 * body * (groups * p + rows * (n - 1)) + 2 * head * (groups + rows * (n - 1)) + 4 * width * scores
    steps = -(-rows // job["batch_size"]) * (n - 1)
    kv = 2 * layers * kv_heads * head_dim * size  # of a token
    moved = (steps + 1) * (body + head) * size + kv * (n - 1) * (groups * p + rows * n / 2)
    return flops, moved


def run(job: dict, python: str | None) -> dict:
    """The result of one contender, or the reason why it has none."""
    if python is None:
        return {"failed": "no interpreter was named that has it (--vllm-python)"}
    try:
        done = subprocess.run([python, str(SIDES), json.dumps(job)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              text=True, timeout=LIMIT, env=os.environ | {"OMP_NUM_THREADS": str(job["threads"])})
    except subprocess.TimeoutExpired:
        return {"failed": f"took over {LIMIT} s"}
    except OSError as e:
        return {"failed": f"cannot be started: {e.strerror}"}
    lines = done.stdout.splitlines()
    return json.loads(lines[-1]) if lines else {"failed": f"ended by itself, status {done.returncode}"}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="SmolLM2-135M", choices=MODELS)
    parser.add_argument("--contenders", default=",".join(sampling_sides.CONTENDERS))
    parser.add_argument("--k", default="8,32", help="completions per prompt")
    parser.add_argument("--prompt", default="64,512", help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens of a completion")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=128, help="completions decoded together")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vllm-python", default=os.environ.get("STROP_VLLM_PYTHON"), help="an interpreter with vLLM")
    parser.add_argument("--write", action="store_true", help="keep the results")
    options = parser.parse_args(arguments)
    from transformers import AutoConfig

    device, folder = torch.device("cpu"), model_folder(options.model)
    dtype, name = ("bfloat16", "bf16") if World(device=device).multiplies_bf16 else ("float32", "fp32")
    rates, config, kept = measure.rates(device, (name,)), AutoConfig.from_pretrained(folder), {}
    for k, prompt in itertools.product(*([int(n) for n in text.split(",")] for text in (options.k, options.prompt))):
        job = {"model": str(folder), "k": k, "prompt": prompt, "new": options.new, "prompts": options.prompts,
               "batch_size": options.batch_size, "dtype": dtype, "rounds": options.rounds,
               "threads": torch.get_num_threads()}
        flops, moved = floor_of(config, job)
        floor = measure.floor_seconds(rates, flops=flops, bytes=moved, dtype=name)
        case = kept[f"{options.model} K={k} {prompt}:{options.new}"] = {
            **job, "model": options.model, "floor": {"seconds": floor, "flops": flops, "bytes": moved, "rates": rates},
            "contenders": {}}
        for contender in options.contenders.split(","):
            python = options.vllm_python if contender == "vllm" else sys.executable
            found = case["contenders"][contender] = run(job | {"contender": contender}, python)
            if "failed" not in found:
                seconds = median(found["seconds"])
                found |= {"tokens_per_second": found["tokens"] / seconds, "fraction_of_floor": floor / seconds}
            print(f"K={k} {prompt}:{options.new} {contender:28} " + (
                found.get("failed") or f"{found['tokens_per_second']:8,.0f} tokens/s {found['fraction_of_floor']:5.0%} "
                f"of the floor {found['peak_bytes'] / 2**30:5.2f} GiB   load {os.getloadavg()[0]:.1f}"), flush=True)
    if options.write:
        measure.keep_cases("sampling.json", device, kept, add=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
