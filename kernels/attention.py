"""Attention over PackedGroups: a completion sees its prompt and itself, never its siblings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.bias import causal_lower_right

from . import attention_cpu
from .layout import PackedGroups
from .reference import attention_mask


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
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, groups: PackedGroups, scale: float) -> Tensor:
        out, lse = attention_cpu.attention_forward(q, k, v, groups, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.groups, ctx.scale = groups, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor):
        grads = attention_cpu.attention_backward(grad_out, *ctx.saved_tensors, ctx.groups, ctx.scale)
        return *grads, None, None
