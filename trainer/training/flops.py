"""FLOPs of a training step, and the peak FLOP/s of a device, for MFU and for balancing ranks."""

import functools
import re
import time
from dataclasses import dataclass

import torch
from torch import nn

from strop.trainer.training.batch import Example

# Dense bf16 FLOP/s from the vendors' data sheets, by a pattern of the device's name; the first that matches counts. The
# PCIe and NVL boards of a chip have fewer multiprocessors or a lower clock than the SXM ones.
PEAKS = {
    r"H[12]00 NVL": 835e12, r"H100.*(PCIe|HBM2e)": 756e12, r"\bG?H[12]00\b|H800": 989e12, r"\bH20\b": 148e12,
    r"\bG?B[23]00\b": 2250e12, r"\bA[18]00\b": 312e12, r"\bA30\b": 165e12, r"\bA40\b": 150e12, r"\bA10\b": 125e12,
    r"\bL40S\b": 362e12, r"\bL40\b": 181e12, r"\bL4\b": 121e12, r"MI300X|MI325X": 1307e12,
}
# Rows of the matrix product that measures an unlisted device: on a GPU a small one would time its launch.
ROWS = {"cuda": 8192, "cpu": 1024}


@functools.cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Peak FLOP/s: from the data sheet for a known GPU, else measured on a matrix product."""
    known = data_sheet(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return known if known and dtype == torch.bfloat16 else measured(device, dtype, ROWS[device.type])


def data_sheet(name: str) -> float | None:
    """Dense bf16 FLOP/s of the GPU of that name, None if it is not listed."""
    return next((value for pattern, value in PEAKS.items() if re.search(pattern, name)), None)


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
