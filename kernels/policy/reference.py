"""The formulas of policy_loss and leave_one_out, completion by completion: what tests compare them with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def leave_one_out(rewards: Sequence[Sequence[float]]) -> list[list[float]]:
    """Advantages of the completions of each prompt."""
    return [[r - (sum(mine) - r) / (len(mine) - 1) for r in mine] for mine in rewards]


def policy_loss(logps: Sequence[Tensor], advantages: Sequence[float], loss_type: str,
                start_logps: Sequence[Tensor] | None = None, mirror_weight: float = 1.0) -> Tensor:
    """The mean over completions of the loss. logps, start_logps: of the tokens of each completion."""
    terms = []
    for i, (logp, advantage) in enumerate(zip(logps, advantages, strict=True)):
        if loss_type == "rloo":
            terms.append(-advantage * logp.sum())
            continue
        start = logp.detach() if start_logps is None else start_logps[i]
        log_ratio = logp.sum() - start.sum()
        terms.append(-advantage * log_ratio.exp() + mirror_weight * (log_ratio * log_ratio.exp() - log_ratio.exp() + 1))
    return torch.stack(terms).mean()
