"""REINFORCE and mirror descent on whole completions, without a host synchronization."""

from __future__ import annotations

import torch
from torch import Tensor

from ..preference.segment_sum import segment_sum

POLICY_LOSSES = ("rloo", "mdloo")
# sums over completions; "count" is what the others are divided by
POLICY_METRICS = ("loss", "policy/approxkl", "policy/ratio", "count")


def leave_one_out(rewards: Tensor, groups: Tensor) -> Tensor:
    """[S] advantages A_i = R_i - mean of the rewards of the other completions of its prompt, the RLOO
    estimator of arXiv 2402.14740.

    rewards [S] of any float dtype; groups [S] ascending int64, the prompt of each completion, numbered from 0 without
    gaps. Equal rewards of a prompt give exactly 0. Computed in fp64, returned in the dtype of rewards. Raises
    ValueError on shapes that do not match. A prompt with one completion has no others: its advantage is NaN.
    """
    if rewards.dim() != 1 or groups.shape != rewards.shape:
        raise ValueError(f"rewards {list(rewards.shape)} and groups {list(groups.shape)} must be [completions]")
    if not rewards.numel():
        return rewards.clone()
    counts = torch.bincount(groups)
    first = counts.cumsum(0) - counts
    # an advantage does not change if a constant is taken off all rewards of a prompt; without it equal ones would leave
    # rounding
    centered = rewards.double()
    centered = centered - centered[first].index_select(0, groups)
    total = torch.zeros_like(counts, dtype=torch.float64).index_add_(0, groups, centered)
    n = counts.index_select(0, groups)
    return (centered - (total.index_select(0, groups) - centered) / (n - 1)).to(rewards.dtype)


def policy_loss(
    policy_logp: Tensor, advantages: Tensor, *, segments: Tensor, num_segments: int, loss_type: str = "rloo",
    start_logp: Tensor | None = None, mirror_weight: float = 1.0, denominator: Tensor | float | None = None,
) -> tuple[Tensor, Tensor]:
    """A policy-gradient loss on completions as single actions, and its metrics.

    policy_logp [M]: log-probs of the completions' tokens under the policy in training; segments [M] ascending
    completion ids, as PackedGroups.target_segment; num_segments = S. advantages [S], without gradient. With l_i the sum
    over completion i, the loss is the sum over completions over `denominator` (default S) of

    "rloo":  -A_i l_i, REINFORCE on completions that the policy itself wrote, arXiv 2402.14740. Its gradient is that
             of the expected reward; its value means nothing.
    "mdloo": -w_i A_i + g (w_i log w_i - w_i + 1), w_i = exp(l_i - l_i at the start of the iteration): leave-one-out
             advantages in mirror descent policy optimization, arXiv 2407.21075. That (on-policy MDPO, arXiv 2005.09814)
             maximizes E_pi[A] - g KL(pi || pi_start) by several steps on completions of pi_start. The second term is
             never negative, its mean over pi_start is that KL, and its gradient that of the KL. In the first step of an
             iteration w = 1, and the gradient is that of "rloo". g is mirror_weight; start_logp [M] has the log-probs
             under pi_start, default: policy_logp without gradient.

    Returns (loss, metrics): loss 0-dim in fp32 or fp64; metrics fp32 sums in the order of POLICY_METRICS, to be added
    over microbatches and ranks: the loss, the KL term before g, w, and S. Raises ValueError on shapes that do not match
    and on options that the loss would ignore.
    """
    if loss_type not in POLICY_LOSSES:
        raise ValueError(f"unknown loss_type {loss_type!r}; known are {POLICY_LOSSES}")
    if loss_type == "rloo" and start_logp is not None:
        raise ValueError("rloo is on-policy: start_logp is for mdloo")
    if policy_logp.dim() != 1 or segments.shape != policy_logp.shape or advantages.shape != (num_segments,):
        raise ValueError(f"policy_logp {list(policy_logp.shape)}, segments {list(segments.shape)} and advantages "
                         f"{list(advantages.shape)} must be [tokens], [tokens] and [{num_segments}]")
    if start_logp is not None and start_logp.shape != policy_logp.shape:
        raise ValueError(f"start_logp {list(start_logp.shape)} must have the shape of policy_logp")
    dtype = torch.promote_types(policy_logp.dtype, torch.float32)
    edges = torch.arange(num_segments + 1, dtype=segments.dtype, device=segments.device)
    offsets = torch.searchsorted(segments, edges)
    logp, advantages = policy_logp.to(dtype), advantages.detach().to(dtype)
    start = logp.detach() if start_logp is None else start_logp.detach().to(dtype)
    log_ratio = segment_sum(logp - start, offsets)
    ratio = log_ratio.exp()
    drift = ratio * log_ratio - ratio + 1
    if loss_type == "rloo":
        each = -advantages * segment_sum(logp, offsets)
    else:
        each = mirror_weight * drift - ratio * advantages
    total = each.sum()
    metrics = torch.stack([total, drift.sum(), ratio.sum(), torch.full_like(total, num_segments)]).detach().float()
    return total / (num_segments if denominator is None else denominator), metrics
