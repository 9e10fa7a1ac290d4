"""A preference loss over rankings of K completions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .segment_sum import segment_sum


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
        if num_segments is None or segments.shape != policy_logp.shape:
            raise ValueError("segments needs num_segments and one id for each token log-prob")
        edges = torch.arange(num_segments + 1, dtype=segments.dtype, device=segments.device)
        ratio = segment_sum(ratio, torch.searchsorted(segments, edges))
    sums = ratio.shape[0] if ratio.dim() == 1 else 0
    counts = [completions] * (sums // max(1, completions)) if isinstance(completions, int) else list(completions)
    if not sums or sum(counts) != sums or min(counts) < 2:
        raise ValueError(f"{list(ratio.shape)} completions are not rankings of {completions}, which must be 2 or more")
    place, compared = _layout(counts, ranks)
    if ratio.is_cuda:
        place, compared = (t.pin_memory().to(ratio.device, non_blocking=True) for t in (place, compared))
    reward = torch.cat([beta * ratio, ratio.new_zeros(1)]).index_select(0, place.flatten()).view(place.shape)
    rest = torch.where(compared, reward[:, None, :], -torch.inf).logsumexp(2)
    return (rest - reward).sum() / (len(counts) if denominator is None else denominator)


def _layout(counts: list[int], ranks: Sequence[int] | None) -> tuple[Tensor, Tensor]:
    """On the host: place [G, K] int64 of each prompt's completions, K the most of any; and compared [G, K, K] bool:
    whether j is i or ranked below i. A prompt with fewer is padded with place S, which is compared with itself alone
    and so adds nothing."""
    count, longest, total = torch.tensor(counts), max(counts), sum(counts)
    inner = torch.arange(longest).expand(len(counts), longest)
    there = inner < count[:, None]
    place = torch.where(there, inner + (count.cumsum(0) - count)[:, None], total)
    rank = inner
    if ranks is not None:
        if len(ranks) != total:
            raise ValueError(f"{len(ranks)} ranks for {total} completions")
        rank = torch.tensor([*ranks, 0])[place]
        if bool(((rank.diff(dim=1) < 0) & there[:, 1:]).any()):
            raise ValueError("ranks must ascend among the completions of a prompt")
    below = (rank[:, None, :] > rank[:, :, None]) & there[:, None, :] & there[:, :, None]
    return place, below | torch.eye(longest, dtype=torch.bool)
