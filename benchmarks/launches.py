"""Kernel launches of a decode step on a GPU, counted without one, on tensors without values.

    python -m benchmarks.launches [--layers 16]

Counts the operators of a step as it is captured in a CUDA graph that are no views, and Triton's launches of those that
are ours. The layers are those of Llama. What a step launches beside the graph, tests/trainer/test_on_device.py counts.
"""

from __future__ import annotations

import argparse
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from strop.kernels.integrations.transformers import fuse_layers, merge_projections
from strop.trainer.sampling.in_process import Generator
from strop.trainer.sampling.on_device import Arena, DeviceBatch, DeviceEngine

SIZES = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8,
         "num_key_value_heads": 2}
# Launches of operators that have another number than one.
LAUNCHES = {"strop.decode_attention": 2, "strop.sample_tokens": 2, "aten.empty": 0, "aten.new_empty": 0}


class Count(TorchDispatchMode):
    """Launches by operator."""

    def __init__(self):
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        name = str(func.overloadpacket)
        self.found[name] += 0 if is_view else LAUNCHES.get(name, 1)
        return func(*args, **(kwargs or {}))


def step_launches(layers: int, **sampling) -> Counter[str]:
    """By operator, of a step of 64 rows."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **SIZES)).bfloat16().eval()
    fuse_layers(model, inference=True)
    merge_projections(model)
    device, count = torch.device("meta"), Count()
    batch = object.__new__(DeviceBatch)  # without a call's prompts, which are prefilled with values
    batch.engine = DeviceEngine(Generator(model).model.to(device), device)
    batch.pool, batch.max_new_tokens, batch.longest_prompt = batch.engine.pool, 256, 512
    batch.sampling = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | sampling
    batch.arena, batch.stops = Arena(device, 64, 8, 16, 8, 8), torch.zeros(2, dtype=torch.int64, device=device)
    batch.pool.take(8)
    with torch.inference_mode():
        with count:
            batch.decode(64, 256)  # allocates the pages
        count.found.clear()
        with count:
            batch.decode(64, 256)
    return +count.found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    layers = parser.parse_args().layers
    found = step_launches(layers)
    for name, launches in found.most_common():
        print(f"{launches:5}  {name}")
    print(f"{found.total():5}  launches, all in one graph, at {layers} layers")


if __name__ == "__main__":
    main()
