"""Arithmetic of speed: what a training step costs, and what the device could do."""

import functools
import time

import torch
from torch import nn

from strop.kernels import PackedGroups

# dense matrix-product rates in bf16 by the vendors' data sheets, FLOP/s
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12, "MI300X": 1307e12}


@functools.cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that the device could reach: the data sheet's for a known GPU, else measured on a matrix product."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for key, value in PEAKS.items():
            if key in name and dtype == torch.bfloat16:
                return value
    n = 1024
    a = torch.ones(n, n, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(4):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * n**3 / best


@functools.cache
def _sizes(model: nn.Module) -> tuple[int, int, int]:
    """(parameters of the matrix products between embedding and head, parameters of the head, layers * heads * dim)."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = base.config.get_text_config()
    head = base.get_output_embeddings().weight.numel()
    body = sum(p.numel() for p in base.get_decoder().parameters() if p.dim() == 2)
    body -= base.get_input_embeddings().weight.numel()
    width = config.num_attention_heads * (getattr(config, "head_dim", None)
                                          or config.hidden_size // config.num_attention_heads)
    return body, head, config.num_hidden_layers * width


def training_flops(model: nn.Module, groups: PackedGroups) -> int:
    """FLOPs of forward and backward (3 forwards) over real tokens, attention counted causally, head on targets only."""
    body, head, width = _sizes(model)
    pairs = sum((e - s) * (e - s + 1) // 2 for s, e in groups.prompt_bounds)
    for (s, e), g in zip(groups.completion_bounds, groups.completion_group, strict=True):
        p0, p1 = groups.prompt_bounds[g]
        pairs += (e - s) * (e - s + 1) // 2 + (e - s) * (p1 - p0)
    return 3 * (2 * body * groups.num_tokens + 2 * head * groups.num_targets + 4 * width * pairs)
