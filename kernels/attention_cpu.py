"""Prefix attention on the CPU: flash attention forward, the backward with the scores written out block by block.

Two parts: prompts and completions attend causally to themselves; completions 2..K of a group also attend, together in
one call, to their prompt, and the two parts merge by log-sum-exp. The backward needs only the row's final output and
log-sum-exp, so each part's share of the gradient is exact on its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .layout import PackedGroups

_flash_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

# Queries of a block of written-out scores: the block of a few heads by a few hundred keys stays in a core's cache.
_BLOCK = 192
# From so many scores a head on, the matrix unit gains more than its set-up costs.
_LARGE = 1 << 13


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
    grads = tuple(torch.empty_like(x) for x in (q, k, v))
    delta = torch.linalg.vecdot(grad_out.to(lse.dtype), out.to(lse.dtype))
    causal, crossing = _causal_parts(groups), _cross_parts(groups)
    blocks = [min(end - start, _BLOCK) * (end - start) for start, end in causal]
    blocks += [min(rows.stop - rows.start, _BLOCK) * (prompt.stop - prompt.start) for rows, prompt in crossing]
    scratch = lse.new_empty(2, q.shape[1] * max(blocks))

    def part(rows: slice, keys: slice, is_causal: bool) -> tuple[Tensor, Tensor, Tensor]:
        of_rows = (grad_out[0, :, rows], q[0, :, rows], lse[0, :, rows], delta[0, :, rows])
        large = (rows.stop - rows.start) * (keys.stop - keys.start) >= _LARGE
        with _matrix_unit(large and q.dtype == torch.bfloat16):
            return _part_backward(*of_rows, k[0, :, keys], v[0, :, keys], is_causal, scale, scratch)

    for start, end in causal:
        rows = slice(start, end)
        for grad, share in zip(grads, part(rows, rows, True), strict=True):
            grad[0, :, rows] = share
    for rows, prompt in crossing:
        for grad, at, share in zip(grads, (rows, prompt, prompt), part(rows, prompt, False), strict=True):
            grad[0, :, at] += share
    return grads


@contextmanager
def _matrix_unit(use: bool) -> Iterator[None]:
    """While it lasts, if asked, fp32 products run on the CPU's bf16 matrix unit, with fp32 sums and results.

    Operands that were bf16 lose nothing by it; the softmax weights and their gradient are rounded to bf16 as flash
    attention rounds them. The switch is the process's: products of other threads meanwhile round likewise.
    """
    switch = torch.backends.mkldnn.matmul
    if not use or not hasattr(switch, "fp32_precision"):
        yield
        return
    before, switch.fp32_precision = switch.fp32_precision, "bf16"
    try:
        yield
    finally:
        switch.fp32_precision = before


def _part_backward(
    grad_out: Tensor,
    q: Tensor,
    lse: Tensor,
    delta: Tensor,
    k: Tensor,
    v: Tensor,
    is_causal: bool,
    scale: float,
    scratch: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q [H, N, D] and of k, v [Hkv, M, D], from the rows' lse and delta [H, N].

    The query heads of a key head are stacked as rows, [Hkv, r * N, D], so that every product is one batched call and
    sums over them.
    """
    wide, (heads, queries), (key_heads, keys) = lse.dtype, q.shape[:2], k.shape[:2]
    k, v = k.to(wide).contiguous(), v.to(wide).contiguous()
    grad_q = torch.empty_like(q)
    grad_k, grad_v = torch.zeros_like(k), torch.zeros_like(v)
    for start in range(0, queries, _BLOCK):
        block = slice(start, min(start + _BLOCK, queries))
        rows, seen = block.stop - block.start, block.stop if is_causal else keys
        stacked = (key_heads, heads // key_heads * rows, -1)
        q_rows, grad_rows, lse_rows, delta_rows = (
            x[:, block].to(wide).reshape(stacked) for x in (q, grad_out, lse, delta)
        )
        weights, grad_scores = (x[: heads * rows * seen].view(*stacked[:2], seen) for x in scratch)
        torch.bmm(q_rows, k[:, :seen].mT, out=weights)
        torch.sub(weights.mul_(scale), lse_rows, out=weights).exp_()
        if is_causal:
            weights.view(heads, rows, seen).tril_(seen - rows)
        torch.bmm(grad_rows, v[:, :seen].mT, out=grad_scores)
        grad_scores.sub_(delta_rows).mul_(weights)
        grad_v[:, :seen] += torch.bmm(weights.mT, grad_rows)
        grad_k[:, :seen] += torch.bmm(grad_scores.mT, q_rows)
        grad_q[:, block] = torch.bmm(grad_scores, k[:, :seen]).mul_(scale).view(heads, rows, -1)
    return grad_q, grad_k.mul_(scale), grad_v


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
