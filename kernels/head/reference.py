"""The head's log-probabilities in plain PyTorch: what the tests compare with."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, *, logit_scale: float = 1.0, temperature: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """[N, V] logits: softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap) / temperature."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits / temperature


def gather_logprob(logits: Tensor, target: Tensor, ignore_index: int = -100) -> Tensor:
    """log_softmax(logits)[..., target], 0 where the target is ignored."""
    kept = target != ignore_index
    logp = logits.log_softmax(-1).gather(-1, target.where(kept, 0).unsqueeze(-1)).squeeze(-1)
    return logp.where(kept, 0.0)


def logit_stats(logits: Tensor, target: Tensor, ignore_index: int = -100) -> dict[str, Tensor]:
    """Every statistic of linear_logprob, each [N], 0 where the target is ignored."""
    kept = target != ignore_index
    logp = logits.log_softmax(-1)
    p = logp.exp()
    target_logit = logits.gather(-1, target.where(kept, 0).unsqueeze(-1))
    stats = {
        "lse": logits.logsumexp(-1), "entropy": -(p * logp.where(p > 0, 0.0)).sum(-1), "mean_logit": logits.mean(-1),
        "top1": (target_logit >= logits).all(-1).to(logits.dtype), "log_sum_p2": (2 * logp).logsumexp(-1),
    }
    return {name: value.where(kept, 0.0) for name, value in stats.items()}
