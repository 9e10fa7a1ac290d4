"""A preference loss over rankings of K completions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .segment_sum import sequence_sums


def plackett_luce_loss(
    policy_logp: Tensor, ref_logp: Tensor | None = None, *, completions: int | Sequence[int],
    ranks: Sequence[int] | None = None, segments: Tensor | None = None, num_segments: int | None = None,
    beta: float = 0.1, denominator: Tensor | float | None = None,
) -> Tensor:
    """DPO on rankings: -sum_k log(exp(b r_k) / sum_{j>=k} exp(b r_j)), r the log-ratios of a prompt's K completions,
    best first: the Plackett-Luce model, arXiv 2305.18290 appendix A.3. With K = 2 it is the loss "sigmoid".

    completions: K of every prompt, 2 or more, or a K for each of them. ranks [S]: those of completions in their
    prompts, ascending; None: all differ. Completions with equal ranks are not compared: the sum of each goes over
    itself and those ranked below it. policy_logp and ref_logp are token log-probs [M] with `segments` [M] (ascending
    completion ids, as PackedGroups.target_segment) and num_segments = S, or sequence sums [S], G prompts after each
    other; without ref_logp the log-ratios are log-probs. Returns the 0-dim sum over prompts over `denominator` (default
    G), fp32 or fp64, without a host synchronization. Raises ValueError on shapes that do not fit.
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
        if num_segments is None:
            raise ValueError("segments needs num_segments and one id for each token log-prob")
        ratio = sequence_sums(ratio, segments, num_segments)
    sums = ratio.shape[0] if ratio.dim() == 1 else 0
    counts = [completions] * (sums // max(1, completions)) if isinstance(completions, int) else list(completions)
    if not sums or sum(counts) != sums or min(counts) < 2:
        raise ValueError(f"{list(ratio.shape)} completions are not rankings of {completions}, which must be 2 or more")
    layout = torch.tensor(_layout(counts, ranks))
    layout = layout.pin_memory() if ratio.is_cuda else layout
    place, rank = layout.to(ratio.device, non_blocking=True).unbind(0)
    reward = torch.cat([beta * ratio, ratio.new_zeros(1)]).index_select(0, place.flatten()).view(place.shape)
    # of [prompt, i, j]: whether j is i or ranked below i; padding is compared with itself alone, and so adds nothing
    below = (rank[:, None, :] > rank[:, :, None]) & (rank >= 0)[:, :, None]
    below = below | torch.eye(rank.shape[1], dtype=torch.bool, device=rank.device)
    rest = torch.where(below, reward[:, None, :], -torch.inf).logsumexp(2)
    return (rest - reward).sum() / (len(counts) if denominator is None else denominator)


def _layout(counts: list[int], ranks: Sequence[int] | None) -> list[list[list[int]]]:
    """Two tables [G][K], K the most completions of a prompt: the place of each completion among all of them, and its
    rank. Padded with place S, the number of all, and rank -1."""
    total, longest, first, places, given = sum(counts), max(counts), 0, [], []
    if ranks is not None and len(ranks) != total:
        raise ValueError(f"{len(ranks)} ranks for {total} completions")
    for count in counts:
        mine = list(range(count) if ranks is None else ranks[first:first + count])
        if mine != sorted(mine) or mine[0] < 0:
            raise ValueError("ranks must ascend from 0 or more among the completions of a prompt")
        places.append([*range(first, first + count), *[total] * (longest - count)])
        given.append([*mine, *[-1] * (longest - count)])
        first += count
    return [places, given]
