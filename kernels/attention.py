"""Attention over PackedGroups: a completion sees its prompt and itself, never its siblings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.bias import causal_lower_right

from .layout import PackedGroups
from .reference import attention_mask

_flash_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


# Up to so many scores a head, writing them out in fp32 beats flash attention's 16-bit backward on the CPU.
EXPLICIT_SCORES = 1 << 14


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: PackedGroups,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention within each completion and onto its prompt.

    q: [1, H, T, D]; k, v: [1, Hkv, T, D], H a multiple of Hkv; any float dtype. scale defaults to 1/sqrt(D).
    sliding_window counts positions, the token itself included, as in transformers: a query at position p sees keys at
    positions above p - sliding_window. softcap bounds the scaled scores by tanh before masking (Gemma 2).
    Returns [1, H, T, D]. Raises ValueError when the shapes do not belong to the groups.
    """
    if q.dim() != 4 or q.shape[0] != 1 or q.shape[2] != groups.num_tokens:
        raise ValueError(f"q must be [1, heads, {groups.num_tokens}, head size], got {list(q.shape)}")
    if k.shape[:1] + k.shape[2:3] != q.shape[:1] + q.shape[2:3] or k.shape[:3] != v.shape[:3]:
        raise ValueError(f"k {list(k.shape)} and v {list(v.shape)} must cover the same tokens as q {list(q.shape)}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads are not a multiple of {k.shape[1]} key heads")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    spans = _spans(groups)
    if sliding_window is not None and sliding_window >= max(length for *_, length in spans):
        sliding_window = None
    if softcap is not None or sliding_window is not None:
        return torch.cat([_explicit(q, k, v, span, scale, sliding_window, softcap) for span in spans], dim=2)
    if q.device.type == "cpu" and q.shape[-1] == v.shape[-1]:
        return _PrefixAttentionCPU.apply(q, k, v, groups, scale)
    return torch.cat([_sdpa(q, k, v, span, scale) for span in spans], dim=2)


def _spans(groups: PackedGroups) -> list[tuple[int, int, int, int, int]]:
    """(prompt start, prompt end, query start, query end, keys), in row order, the first completion with its prompt."""
    spans = []
    for c, (start, end) in enumerate(groups.completion_bounds):
        prompt_start, prompt_end = groups.prompt_bounds[groups.completion_group[c]]
        keys = prompt_end - prompt_start + end - start
        spans.append((prompt_start, prompt_end, prompt_start if start == prompt_end else start, end, keys))
    return spans


def _keys(x: Tensor, span: tuple[int, int, int, int, int]) -> Tensor:
    prompt_start, prompt_end, start, end, _ = span
    if start == prompt_start or prompt_start == prompt_end:
        return x[:, :, start:end]
    return torch.cat([x[:, :, prompt_start:prompt_end], x[:, :, start:end]], dim=2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, span: tuple[int, int, int, int, int], scale: float) -> Tensor:
    queries, keys = span[3] - span[2], span[4]
    # SDPA's is_causal aligns the mask top-left; later completions need it bottom-right.
    bias = None if queries == keys else causal_lower_right(queries, keys)
    return F.scaled_dot_product_attention(
        q[:, :, span[2] : span[3]],
        _keys(k, span),
        _keys(v, span),
        attn_mask=bias,
        is_causal=bias is None,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def _explicit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    span: tuple[int, int, int, int, int],
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    """One span with its mask written out: what SDPA has no argument for."""
    queries, keys = span[3] - span[2], span[4]
    position = torch.arange(keys, device=q.device)
    visible = attention_mask(position[keys - queries :], position, sliding_window)
    q, k, v = q[:, :, span[2] : span[3]], _keys(k, span), _keys(v, span)
    if softcap is None:
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale, enable_gqa=grouped)
    q_grouped = q.unflatten(1, (k.shape[1], -1))
    scores = torch.tanh((q_grouped @ k.unsqueeze(2).mT) * (scale / softcap)) * softcap
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32))
    return (weights.to(q.dtype) @ v.unsqueeze(2)).flatten(1, 2)


class _PrefixAttentionCPU(torch.autograd.Function):
    """Two-part flash attention: prompts and completions attend causally to themselves; completions 2..K of a group
    also attend, together in one call, to their prompt, and the two parts merge by log-sum-exp.

    The backward of flash attention needs only the row's final output and log-sum-exp, so handing the merged ones to
    each part's backward gives each part's exact share of the gradient.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, groups: PackedGroups, scale: float) -> Tensor:
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
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.groups, ctx.scale = groups, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor):
        q, k, v, out, lse = ctx.saved_tensors
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)

        def part(rows: slice, keys: slice, is_causal: bool) -> tuple[Tensor, Tensor, Tensor]:
            scores = (rows.stop - rows.start) * (keys.stop - keys.start)
            of_keys = k[:, :, keys], v[:, :, keys]
            parts = (grad_out[:, :, rows], q[:, :, rows], *of_keys, out[:, :, rows], lse[:, :, rows])
            if q.element_size() == 2 and scores <= EXPLICIT_SCORES:
                return _explicit_backward(*parts, is_causal, ctx.scale)
            return _flash_cpu_backward(*parts, 0.0, is_causal, scale=ctx.scale)

        for start, end in _causal_parts(ctx.groups):
            rows = slice(start, end)
            grad_q[:, :, rows], grad_k[:, :, rows], grad_v[:, :, rows] = part(rows, rows, True)
        for rows, prompt in _cross_parts(ctx.groups):
            cross_q, cross_k, cross_v = part(rows, prompt, False)
            grad_q[:, :, rows] += cross_q
            grad_k[:, :, prompt] += cross_k
            grad_v[:, :, prompt] += cross_v
        return grad_q, grad_k, grad_v, None, None


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
    return [(start, end) for _, _, start, end, _ in _spans(groups)]


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
