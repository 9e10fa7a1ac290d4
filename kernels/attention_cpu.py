"""Prefix attention on the CPU: flash attention per part, merged by log-sum-exp.

Two parts: prompts and completions attend causally to themselves; completions 2..K of a group also attend, together in
one call, to their prompt, and the two parts merge by log-sum-exp. The backward of flash attention needs only the row's
final output and log-sum-exp, so handing the merged ones to each part's backward gives each part's exact share of the
gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import PackedGroups

_flash_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# Up to so many scores a head, writing them out in fp32 beats flash attention's 16-bit backward on the CPU.
EXPLICIT_SCORES = 1 << 14


def attention_forward(q: Tensor, k: Tensor, v: Tensor, groups: PackedGroups, scale: float) -> tuple[Tensor, Tensor]:
    """q: [1, H, T, D]; k, v: [1, Hkv, T, D]. Returns the output, as q, and the log-sum-exp [1, H, T], at least fp32."""
    out = torch.empty_like(q, memory_format=torch.preserve_format)
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    for start, end in _causal_parts(groups):
        rows = slice(start, end)
        out[:, :, rows], lse[:, :, rows] = _flash_cpu(
            q[:, :, rows], k[:, :, rows], v[:, :, rows], 0.0, True, scale=scale
        )
    for rows, prompt in _cross_parts(groups):
        cross, cross_lse = _flash_cpu(q[:, :, rows], k[:, :, prompt], v[:, :, prompt], 0.0, False, scale=scale)
        total = torch.logaddexp(lse[:, :, rows], cross_lse)
        own_share = (lse[:, :, rows] - total).exp_().unsqueeze(-1)
        cross_share = (cross_lse - total).exp_().unsqueeze(-1)
        out[:, :, rows] = out[:, :, rows] * own_share + cross * cross_share
        lse[:, :, rows] = total
    return out, lse


def attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, groups: PackedGroups, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from what attention_forward took and returned."""
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)

    def part(rows: slice, keys: slice, is_causal: bool) -> tuple[Tensor, Tensor, Tensor]:
        scores = (rows.stop - rows.start) * (keys.stop - keys.start)
        of_keys = k[:, :, keys], v[:, :, keys]
        parts = (grad_out[:, :, rows], q[:, :, rows], *of_keys, out[:, :, rows], lse[:, :, rows])
        if q.element_size() == 2 and scores <= EXPLICIT_SCORES:
            return _explicit_backward(*parts, is_causal, scale)
        return _flash_cpu_backward(*parts, 0.0, is_causal, scale=scale)

    for start, end in _causal_parts(groups):
        rows = slice(start, end)
        grad_q[:, :, rows], grad_k[:, :, rows], grad_v[:, :, rows] = part(rows, rows, True)
    for rows, prompt in _cross_parts(groups):
        cross_q, cross_k, cross_v = part(rows, prompt, False)
        grad_q[:, :, rows] += cross_q
        grad_k[:, :, prompt] += cross_k
        grad_v[:, :, prompt] += cross_v
    return grad_q, grad_k, grad_v


def _explicit_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v with the scores written out, from the row's final output and log-sum-exp. Query heads of
    a key head are stacked as rows, so that every product is one batched call."""
    (heads, queries), keys, wide = q.shape[1:3], k.shape[2], lse.dtype
    stacked = (k.shape[1], heads // k.shape[1] * queries, -1)
    q_rows, grad_rows, out_rows = (x[0].to(wide).reshape(stacked) for x in (q, grad_out, out))
    k_wide, v_wide = k[0].to(wide), v[0].to(wide)
    weights = torch.bmm(q_rows, k_wide.mT).mul_(scale).sub_(lse[0].reshape(stacked)).exp_()
    if is_causal:
        weights.view(heads, queries, keys).tril_()
    grad_v = torch.bmm(weights.mT, grad_rows)
    delta = (grad_rows * out_rows).sum(-1, keepdim=True)
    grad_scores = torch.bmm(grad_rows, v_wide.mT).sub_(delta).mul_(weights).mul_(scale)
    grad_q = torch.bmm(grad_scores, k_wide).view(q.shape)
    grad_k = torch.bmm(grad_scores.mT, q_rows)[None]
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v[None].to(v.dtype)


def _causal_parts(groups: PackedGroups) -> list[tuple[int, int]]:
    """Row ranges that attend causally to themselves: prompt with first completion, then each further completion."""
    return [
        (groups.prompt_bounds[g][0] if start == groups.prompt_bounds[g][1] else start, end)
        for g, (start, end) in zip(groups.completion_group, groups.completion_bounds, strict=True)
    ]


def _cross_parts(groups: PackedGroups) -> list[tuple[slice, slice]]:
    """(rows of completions 2..K, rows of their prompt) for every group that has both."""
    last_end = dict(zip(groups.completion_group, (end for _, end in groups.completion_bounds), strict=True))
    first_end: dict[int, int] = {}
    for group, (_, end) in zip(groups.completion_group, groups.completion_bounds, strict=True):
        first_end.setdefault(group, end)
    return [
        (slice(first_end[g], last_end[g]), slice(start, end))
        for g, (start, end) in enumerate(groups.prompt_bounds)
        if end > start and last_end[g] > first_end[g]
    ]
