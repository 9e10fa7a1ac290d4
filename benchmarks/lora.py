"""Forward and backward of a model with LoRA on every linear layer: PEFT's layers, and fused.

    python -m benchmarks.lora [--dtype float32|bfloat16] [--layers 6] [--tokens 1024] [--rounds 8] [--threads N]

A Llama of SmolLM2-135M's width with random weights and a small head. Both sides take turns in one process.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch

from strop.kernels import Group, PackedGroups
from strop.kernels.integrations.peft import fuse_adapters
from strop.kernels.integrations.transformers import fuse_layers, register
from strop.trainer.config import Lora
from strop.trainer.training.logprobs import Scorer
from strop.trainer.training.policy import add_lora

VOCABULARY = 2048


def model(layers: int, dtype: torch.dtype) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    register()
    torch.manual_seed(0)
    found = LlamaForCausalLM(LlamaConfig(
        hidden_size=576, num_hidden_layers=layers, num_attention_heads=9, num_key_value_heads=3, head_dim=64,
        intermediate_size=1536, vocab_size=VOCABULARY, tie_word_embeddings=True,
    )).to(dtype)
    found.set_attn_implementation("strop")
    fuse_layers(found)
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    for name, value in (("layers", 6), ("tokens", 1024), ("rounds", 8), ("threads", torch.get_num_threads())):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    base, scorers, seconds = model(options.layers, getattr(torch, options.dtype)), {}, {"PEFT": [], "fused": []}
    for side in seconds:
        adapted = add_lora(copy.deepcopy(base), Lora(rank=16), 0).train()
        if side == "fused":
            fuse_adapters(adapted)
        scorers[side] = Scorer(adapted)
    groups = PackedGroups.pack([Group(torch.randint(3, VOCABULARY, (64,)).tolist(),
                                      [torch.randint(3, VOCABULARY, (64,)).tolist()])] * (options.tokens // 128))
    for i in range(options.rounds + 1):
        for side, scorer in scorers.items():
            started = time.perf_counter()
            scorer(groups).sum().backward()
            seconds[side] += [time.perf_counter() - started] * (i > 0)
    median = {side: statistics.median(found) for side, found in seconds.items()}
    print(f"{options.dtype}: PEFT {median['PEFT'] * 1e3:.0f} ms, fused {median['fused'] * 1e3:.0f} ms, "
          f"{median['PEFT'] / median['fused']:.2f} times as fast")


if __name__ == "__main__":
    main()
