"""A preference loss over rankings of K completions."""

from __future__ import annotations

import torch
from torch import Tensor

from .segment_sum import segment_sum


def plackett_luce_loss(
    policy_logp: Tensor, ref_logp: Tensor | None = None, *, completions: int, segments: Tensor | None = None,
    num_segments: int | None = None, beta: float = 0.1, denominator: Tensor | float | None = None,
) -> Tensor:
    """DPO on rankings: -sum_k log(exp(b r_k) / sum_{j>=k} exp(b r_j)), r the log-ratios of a prompt's K completions,
    best first: the Plackett-Luce model, arXiv 2305.18290 appendix A.3. With K = 2 it is the loss "sigmoid".

    completions: K, at least 2, of every prompt. policy_logp and ref_logp are token log-probs [M] with `segments` [M]
    (ascending completion ids, as PackedGroups.target_segment) and num_segments = S, or sequence sums [S], G = S / K
    prompts after each other; without ref_logp the log-ratios are log-probs. Returns the 0-dim sum over prompts over
    `denominator` (default G), fp32 or fp64, without a host synchronization. Raises ValueError on shapes that do not
    fit.
    """
    if ref_logp is not None and ref_logp.shape != policy_logp.shape:
        raise ValueError(f"ref_logp {list(ref_logp.shape)} must have the shape of policy_logp "
                         f"{list(policy_logp.shape)}")
    if not beta > 0:
        raise ValueError(f"beta must be above 0, got {beta}")
    dtype = torch.promote_types(policy_logp.dtype, torch.float32)
    ratio = policy_logp.to(dtype)
    if ref_logp is not None:
        ratio = ratio - ref_logp.detach().to(dtype)
    if segments is not None:
        if num_segments is None or segments.shape != policy_logp.shape:
            raise ValueError("segments needs num_segments and one id for each token log-prob")
        edges = torch.arange(num_segments + 1, dtype=segments.dtype, device=segments.device)
        ratio = segment_sum(ratio, torch.searchsorted(segments, edges))
    if ratio.dim() != 1 or completions < 2 or ratio.shape[0] % completions or not ratio.shape[0]:
        raise ValueError(f"{list(ratio.shape)} completions are not rankings of {completions}, which must be 2 or more")
    reward = beta * ratio.view(-1, completions)
    rest = reward.flip(1).logcumsumexp(1).flip(1)  # log-sum-exp over a completion and all that are ranked below it
    total = (rest - reward).sum()
    return total / (reward.shape[0] if denominator is None else denominator)
