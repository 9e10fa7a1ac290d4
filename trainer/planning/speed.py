"""Seconds of stages from FLOPs, bytes and a device's rates: lower bounds but for the shares below."""

from dataclasses import dataclass

from strop.trainer.planning.hardware import Hardware
from strop.trainer.planning.shape import Shape

# Shares of the peak rates that the work reaches. Assumed; benchmarks/memory.py prints the CPU's.
OF_FLOPS, OF_BANDWIDTH = 0.4, 0.6
HOST_BANDWIDTH, LINK = 100e9, 25e9  # bytes/s of a node's memory, and of a GPU's link to it
NEWTON_SCHULZ = 5  # iterations of Muon


@dataclass(frozen=True)
class Lengths:
    """Expected tokens of a prompt and of a completion."""

    prompt: int
    completion: int


def step_flops(shape: Shape, examples: int, completions: int, lengths: Lengths, *, checkpointing: bool, lora: bool,
               scores: bool) -> float:
    """FLOPs of an optimizer step: a prompt once per example, causal attention, the head on completions. Backward is two
    forwards, one without gradients of the weights; checkpointing adds a forward."""
    prompt, completion = lengths.prompt, lengths.completion
    tokens, targets = prompt + completions * completion, 0 if scores else completions * completion
    pairs = prompt**2 / 2 + completions * (completion**2 / 2 + completion * prompt)
    width = shape.layers * shape.heads * shape.head_size
    forward = 2 * shape.linear * tokens + 4 * width * pairs
    passes = 3 - lora + checkpointing
    return examples * (passes * forward + (3 - lora) * 2 * shape.embedding * targets)


def state_bytes(trained: int, moments: int, split: bool) -> int:
    """That AdamW reads and writes: masters and moments twice, the gradient, the weight; of split masters the low half
    and the weight twice. moments: their bytes."""
    return (10 if split else 12) * trained + 2 * moments


def muon_flops(shape: Shape, lora_rank: int) -> float:
    """FLOPs of Muon's Newton-Schulz iterations over the matrices of all layers: three products each."""
    pairs = [(lora_rank, n) for pair in shape.matrices for n in pair] if lora_rank else shape.matrices
    sizes = [(min(pair), max(pair)) for pair in pairs]
    return shape.layers * NEWTON_SCHULZ * sum(4 * m * m * n + 2 * m**3 for m, n in sizes)


def step_seconds(on: Hardware, flops: float, trained: int, state: int, *, offload: bool, shards: int) -> float:
    """Of an optimizer step on every rank: its FLOPs, then AdamW's bytes, `state` over all ranks, where masters and
    moments are. Communication is not counted."""
    compute = flops / on.ranks / (OF_FLOPS * on.flops)
    state /= shards
    if not offload:
        return compute + state / (OF_BANDWIDTH * on.bandwidth)
    return compute + state * on.per_node / HOST_BANDWIDTH + 4 * trained / shards / LINK


def sampling_seconds(shape: Shape, on: Hardware, *, prompts: int, k: int, rows: int, lengths: Lengths, width: int,
                     replicas: int) -> float:
    """Of k completions of every prompt on `replicas` copies of the weights, `rows` completions at a time on each:
    prefill, then steps that each read the weights and the cache, or compute, whichever takes longer. Launches are not
    counted."""
    devices = on.ranks / replicas  # of a replica
    rate, bandwidth = OF_FLOPS * on.flops * devices, OF_BANDWIDTH * on.bandwidth * devices
    share = -(-prompts // replicas)
    width_ = shape.layers * shape.heads * shape.head_size
    prefill = share * (2 * shape.linear * lengths.prompt + 2 * width_ * lengths.prompt**2) / rate
    rows = max(1, min(rows, share * k))
    token = 2 * shape.layers * shape.kv_heads * shape.head_size * width
    read = width * (shape.linear + shape.embedding)
    read += token * (rows / k * lengths.prompt + rows * lengths.completion / 2)
    flops = rows * (2 * (shape.linear + shape.embedding) + 4 * width_ * (lengths.prompt + lengths.completion / 2))
    steps = share * k * lengths.completion / rows
    return prefill + steps * max(flops / rate, read / bandwidth)
