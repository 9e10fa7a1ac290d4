"""FLOPs of a training step, and the peak FLOP/s of a device, for MFU and for balancing ranks."""

import functools
import time
from dataclasses import dataclass

import torch
from torch import nn

from strop.trainer.planning.hardware import data_sheet
from strop.trainer.training.batch import Example

# Rows of the matrix product that measures an unlisted device: on a GPU a small one would time its launch.
ROWS = {"cuda": 8192, "cpu": 1024}


@functools.cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Peak FLOP/s: from the data sheet for a known GPU, else measured on a matrix product."""
    known = data_sheet(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return known if known and dtype == torch.bfloat16 else measured(device, dtype, ROWS[device.type])


def measured(device: torch.device, dtype: torch.dtype, n: int) -> float:
    """FLOP/s of the fastest of a few [n, n] products."""
    a, seconds = torch.ones(n, n, dtype=dtype, device=device), []
    for _ in range(4):
        started = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2 * n**3 / min(seconds)


@dataclass(frozen=True)
class Sizes:
    """Parameters of the matrices between embedding and head, parameters of the head, and layers * heads * head size."""

    body: int
    head: int
    width: int


def sizes_of(model: nn.Module) -> Sizes:
    """Sizes of a causal LM or a reward model, without adapters: the same rows then cost the same with and without
    LoRA."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = base.config.get_text_config()
    output = base.get_output_embeddings()  # None for a reward model, whose head costs next to nothing
    decoder = base.base_model if output is None else base.get_decoder()
    body = sum(p.numel() for name, p in decoder.named_parameters() if p.dim() == 2 and "lora_" not in name)
    body -= base.get_input_embeddings().weight.numel()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    head = 0 if output is None else output.weight.numel()
    return Sizes(body, head, config.num_hidden_layers * config.num_attention_heads * size)


def training_flops(sizes: Sizes, example: Example) -> int:
    """FLOPs of forward and backward (3 forwards) of a packed example: its prompt once, causal attention, the head on
    targets only."""
    prompt = len(example.group.prompt)
    pairs = prompt * (prompt + 1) // 2
    for completion in example.group.completions:
        pairs += len(completion) * (len(completion) + 1) // 2 + len(completion) * prompt
    return 3 * (2 * sizes.body * example.tokens + 2 * sizes.head * example.predicted() + 4 * sizes.width * pairs)
