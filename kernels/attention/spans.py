"""Attention over PackedGroups in plain PyTorch, one span of query rows at a time.

A span is a prompt with its first completion, or a later completion. SDPA has no argument for a sliding window or a
softcap; with these the scores are materialized for one block of query rows at a time, in the forward and again in the
backward.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layout import Bounds, PackedGroups
from .reference import attention_mask

# Query rows per block of materialized scores.
BLOCK = 256

# prompt start, prompt end, first query row, its end
_Span = tuple[int, int, int, int]


def sdpa(q: Tensor, k: Tensor, v: Tensor, groups: PackedGroups, scale: float) -> Tensor:
    """q: [1, H, T, D]; k, v: [1, Hkv, T, D or other]. SDPA's fused kernels on concatenated keys."""
    return torch.cat([_sdpa(q, k, v, span, scale) for span in _spans(groups)], dim=2)


def explicit_forward(
    q: Tensor, k: Tensor, v: Tensor, groups: PackedGroups | Bounds, scale: float, window: int, cap: float
) -> Tensor:
    """As sdpa, with a softcap and a window of positions, 0 for none. Computes in at least fp32."""
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_empty(1, q.shape[2], q.shape[1], v.shape[-1]).transpose(1, 2)
    k_wide, v_wide = k[0].to(wide), v[0].to(wide)
    for rows, keys, hidden in _blocks(groups, window, q.device):
        weights, _ = _weights(q[0, :, rows].to(wide), k_wide, keys, hidden, scale, cap)
        parts = weights.split([key.stop - key.start for key in keys], dim=-1)
        block = sum(torch.bmm(part, v_wide[:, key]) for part, key in zip(parts, keys, strict=True))
        out[0, :, rows] = block.view(q.shape[1], -1, v.shape[-1]).to(q.dtype)
    return out


def explicit_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, groups: PackedGroups | Bounds, scale: float, window: int,
    cap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from explicit_forward's inputs."""
    wide, stacked = torch.promote_types(q.dtype, torch.float32), (k.shape[1], -1)
    k_wide, v_wide = k[0].to(wide), v[0].to(wide)
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k_wide), torch.zeros_like(v_wide)
    for rows, keys, hidden in _blocks(groups, window, q.device):
        q_rows = q[0, :, rows].to(wide)
        weights, slope = _weights(q_rows, k_wide, keys, hidden, scale, cap)
        grad_rows = grad_out[0, :, rows].to(wide).reshape(*stacked, v.shape[-1])
        sizes = [key.stop - key.start for key in keys]
        grad_scores = torch.cat([torch.bmm(grad_rows, v_wide[:, key].mT) for key in keys], dim=-1)
        delta = torch.linalg.vecdot(weights, grad_scores).unsqueeze(-1)
        grad_scores.sub_(delta).mul_(weights).mul_(scale)
        if slope is not None:
            grad_scores.mul_(slope)
        q_rows = q_rows.reshape(*stacked, q.shape[-1])
        grad_block = 0
        for key, share, weight in zip(keys, grad_scores.split(sizes, -1), weights.split(sizes, -1), strict=True):
            grad_block = grad_block + torch.bmm(share, k_wide[:, key])
            grad_k[:, key] += torch.bmm(share.mT, q_rows)
            grad_v[:, key] += torch.bmm(weight.mT, grad_rows)
        grad_q[0, :, rows] = grad_block.view(q.shape[1], -1, q.shape[-1]).to(q.dtype)
    return grad_q, grad_k.to(k.dtype)[None], grad_v.to(v.dtype)[None]


def _spans(groups: PackedGroups | Bounds) -> list[_Span]:
    """In row order; the first completion's span includes its prompt's rows."""
    spans = []
    for (start, end), group in zip(groups.completion_bounds, groups.completion_group, strict=True):
        prompt_start, prompt_end = groups.prompt_bounds[group]
        spans.append((prompt_start, prompt_end, prompt_start if start == prompt_end else start, end))
    return spans


def _keys(x: Tensor, span: _Span) -> Tensor:
    prompt_start, prompt_end, start, end = span
    if start == prompt_start or prompt_start == prompt_end:
        return x[:, :, start:end]
    return torch.cat([x[:, :, prompt_start:prompt_end], x[:, :, start:end]], dim=2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, span: _Span, scale: float) -> Tensor:
    q, k, v = q[:, :, span[2] : span[3]], _keys(k, span), _keys(v, span)
    # SDPA's is_causal aligns the mask top-left; completions after the first need it bottom-right.
    bias = None
    if q.shape[2] != k.shape[2]:
        from torch.nn.attention.bias import causal_lower_right  # imports the compiler

        bias = causal_lower_right(q.shape[2], k.shape[2])
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=bias, is_causal=bias is None, scale=scale, enable_gqa=grouped
    )


def _blocks(
    groups: PackedGroups | Bounds, window: int, device: torch.device
) -> Iterator[tuple[slice, list[slice], Tensor]]:
    """Query rows, one or two row ranges of the keys they may see, and which of those are masked: [rows, keys]."""
    for prompt_start, prompt_end, start, end in _spans(groups):
        shared = 0 if start == prompt_start else prompt_end - prompt_start
        for row in range(start, end, BLOCK):
            rows = slice(row, min(row + BLOCK, end))
            # Positions within the span's keys: the prompt's, then the span's own.
            first, last = shared + row - start, shared + rows.stop - start
            seen = max(0, first - window + 1) if window else 0
            keys = [slice(prompt_start + seen, prompt_end)] if seen < shared else []
            keys.append(slice(start + max(seen - shared, 0), rows.stop))
            positions = torch.arange(seen, last, device=device)
            yield rows, keys, ~attention_mask(positions[first - seen :], positions, window or None)


def _weights(
    q: Tensor, k: Tensor, keys: list[slice], hidden: Tensor, scale: float, cap: float
) -> tuple[Tensor, Tensor | None]:
    """Attention weights of q [H, N, D], with the query heads of a key head stacked as rows: [Hkv, r * N, keys]; and the
    derivative of the softcap, of the same shape, or None."""
    stacked = q.reshape(k.shape[0], -1, q.shape[-1])
    scores = torch.cat([torch.bmm(stacked, k[:, key].mT) for key in keys], dim=-1).mul_(scale)
    slope = None
    if cap:
        bounded = scores.div_(cap).tanh_()
        slope = 1 - bounded * bounded
        scores = bounded.mul_(cap)
    scores.view(*q.shape[:2], -1).masked_fill_(hidden, -torch.inf)
    return scores.softmax(-1), slope
