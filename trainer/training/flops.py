"""FLOPs of a training step, and the peak FLOP/s of a device, for MFU and for balancing ranks."""

import functools
import time
from dataclasses import dataclass

import torch
from torch import nn

from strop.trainer.training.batch import Example

# dense bf16 FLOP/s from the vendors' data sheets
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12, "MI300X": 1307e12}


@functools.cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Peak FLOP/s: from the data sheet for a known GPU, else measured on a matrix product."""
    cuda, n, seconds = device.type == "cuda", 1024, []
    if cuda and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        if known := next((value for key, value in PEAKS.items() if key in name), None):
            return known
    a = torch.ones(n, n, dtype=dtype, device=device)
    for _ in range(4):
        started = time.perf_counter()
        a @ a
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * n**3 / min(seconds)


@dataclass(frozen=True)
class Sizes:
    """Parameters of the matrices between embedding and head, parameters of the head, and layers * heads * head size."""

    body: int
    head: int
    width: int


def sizes_of(model: nn.Module) -> Sizes:
    """Sizes of a causal LM, without adapters: the same rows then cost the same with and without LoRA."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = base.config.get_text_config()
    body = sum(p.numel() for name, p in base.get_decoder().named_parameters() if p.dim() == 2 and "lora_" not in name)
    body -= base.get_input_embeddings().weight.numel()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    head = base.get_output_embeddings().weight.numel()
    return Sizes(body, head, config.num_hidden_layers * config.num_attention_heads * size)


def training_flops(sizes: Sizes, example: Example) -> int:
    """FLOPs of forward and backward (3 forwards) of a packed example: its prompt once, causal attention, the head on
    targets only."""
    prompt = len(example.group.prompt)
    pairs = prompt * (prompt + 1) // 2
    for completion in example.group.completions:
        pairs += len(completion) * (len(completion) + 1) // 2 + len(completion) * prompt
    return 3 * (2 * sizes.body * example.tokens + 2 * sizes.head * sum(example.targets()) + 4 * sizes.width * pairs)
