"""Head shapes of released models, and the number of tokens per device."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Head:
    """A model's head: hidden size, vocabulary, soft-cap of its logits."""

    name: str
    hidden: int
    vocab: int
    softcap: float | None = None


SMOLLM2 = Head("SmolLM2-135M", 576, 49152)
QWEN = Head("Qwen2.5-0.5B", 896, 151936)
LLAMA_1B = Head("Llama-3.2-1B", 2048, 128256)
GEMMA = Head("Gemma-2-2B", 2304, 256000, softcap=30.0)
LLAMA_8B = Head("Llama-3.1-8B", 4096, 128256)
# The shape most published head timings are for.
WIDE = Head("D4096-V151936", 4096, 151936)
TINY = Head("tiny", 24, 130, softcap=5.0)

# A CPU with few cores gets fewer tokens for larger heads; shapes stay those of the models.
_CPU_TOKENS = {SMOLLM2: 1024, QWEN: 256, LLAMA_1B: 256, GEMMA: 128, LLAMA_8B: 128}


def tokens(head: Head, device: torch.device) -> int:
    return 8192 if device.type == "cuda" else _CPU_TOKENS.get(head, 64)


def heads(device: torch.device) -> tuple[Head, ...]:
    """The heads for this device, most important first."""
    if device.type == "cuda":
        return WIDE, GEMMA, LLAMA_8B, LLAMA_1B, QWEN, SMOLLM2
    return SMOLLM2, QWEN, LLAMA_1B, GEMMA, LLAMA_8B


def head_inputs(head: Head, count: int, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """hidden [count, D], weight [V, D], target [count], with logits about as peaked as a trained model's.

    Kernels that skip negligible probabilities should find a realistic number of them; with white noise they would
    skip all.
    """
    draw = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, generator=draw, dtype=dtype)

    weight = normal(head.vocab, head.hidden).mul_(head.hidden**-0.5)
    guess, other = (torch.randint(head.vocab, (count,), device=device, generator=draw) for _ in range(2))
    target = torch.where(torch.rand(count, device=device, generator=draw) < 0.6, guess, other)
    # A row of the weight has length 1: this puts the guess's logit at log V + 1 among others of variance 1.
    scale = float(torch.tensor(head.vocab).log() + 1)
    hidden = normal(count, head.hidden) + scale * weight[guess]
    return hidden, weight, target
