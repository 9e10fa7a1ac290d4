"""Prefix attention on the CPU: flash attention forward, the backward with the scores written out block by block.

Two parts: prompts and completions attend causally to themselves; completions 2..K of a group also attend, together in
one call, to their prompt, and the two parts merge by log-sum-exp. In 16 bits the backward needs only the row's final
output and log-sum-exp, so each part's share of the gradient is exact on its own; wider inputs get the precision of
whole rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from . import _cpu
from .layout import PackedGroups

_flash_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

# Queries of a block of written-out scores, and scores of all heads that go through together, within the caches.
_BLOCK = 192
_SCORES = 1 << 21
# From blocks of so many scores on, the matrix unit gains more than its set-up costs.
_LARGE = 1 << 12


def attention_forward(q: Tensor, k: Tensor, v: Tensor, groups: PackedGroups, scale: float) -> tuple[Tensor, Tensor]:
    """q: [1, H, T, D]; k, v: [1, Hkv, T, D]. Returns the output, as q, and the log-sum-exp [1, H, T], at least fp32."""
    out = torch.empty_like(q, memory_format=torch.preserve_format)
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    bounds = (groups.prompt_bounds, groups.completion_bounds, groups.completion_group)
    for start, end in _causal_spans(*bounds):
        rows = slice(start, end)
        out[:, :, rows], lse[:, :, rows] = _flash_cpu(
            q[:, :, rows], k[:, :, rows], v[:, :, rows], 0.0, True, scale=scale
        )
    for rows, prompt in _cross_spans(*bounds):
        rows, prompt = slice(*rows), slice(*prompt)
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
    if q.element_size() == 2:
        return _written_out_backward(grad_out, q, k, v, out, lse, groups, scale)
    return _whole_rows_backward(grad_out, q, k, v, groups, scale)


def _whole_rows_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, groups: PackedGroups, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """For fp32 and fp64: all scores of a row are there at once, for a softmax that errs no more than a plain one.

    e^(score - lse) carries the rounding of lse, and of scores that came out otherwise in the forward; where the softmax
    is sharp, that alone is several times what a plain softmax errs. So the output and lse are of no use here.
    """
    grads = tuple(torch.zeros_like(x) for x in (q, k, v))
    heads, key_heads, size = q.shape[1], k.shape[1], q.shape[3]
    spans = _causal_spans(groups.prompt_bounds, groups.completion_bounds, groups.completion_group)
    for (start, last), group in zip(spans, groups.completion_group, strict=True):
        prompt = groups.prompt_bounds[group]
        before = (start, start) if start == prompt[0] else prompt  # the first completion's span holds its prompt
        step = min(_BLOCK, max(32, _SCORES // (heads * (last - start + prompt[1] - prompt[0]))))
        for first in range(start, last, step):
            rows = slice(first, min(first + step, last))
            keys = slice(*before), slice(start, rows.stop)
            q_rows, grad_rows = (x[0, :, rows].reshape(key_heads, -1, size) for x in (q, grad_out))
            k_keys, v_keys = (torch.cat([x[0, :, span] for span in keys], 1) for x in (k, v))
            weights, grad_scores = torch.bmm(q_rows, k_keys.mT), torch.bmm(grad_rows, v_keys.mT)
            _causal_softmax_backward(weights, grad_scores, rows.stop - first, scale)
            grads[0][0, :, rows] = torch.bmm(grad_scores, k_keys).view(-1, rows.stop - first, size)
            shares = torch.bmm(grad_scores.mT, q_rows), torch.bmm(weights.mT, grad_rows)
            for grad, share in zip(grads[1:], shares, strict=True):
                for span, part in zip(keys, share.split([s.stop - s.start for s in keys], 1), strict=True):
                    grad[0, :, span] += part
    return grads


def _causal_softmax_backward(scores: Tensor, grad_weights: Tensor, rows: int, scale: float) -> None:
    """In place: scores [B, r * N, M] to softmax weights, the weights' gradient to that of q k^T; the N rows' own keys
    are the last N of M."""
    if _cpu.takes(scores, grad_weights):
        torch.ops.strop.cpu_causal_softmax_backward(scores, grad_weights, rows, scale)
        return
    keys = scores.shape[-1]
    future = torch.ones(rows, keys, dtype=torch.bool).triu(keys - rows + 1)
    scores.mul_(scale).view(-1, rows, keys).masked_fill_(future, -torch.inf)
    scores.copy_(scores.softmax(-1))
    grad_weights.copy_(torch._softmax_backward_data(grad_weights, scores, -1, scores.dtype)).mul_(scale)


def _written_out_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, groups: PackedGroups, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """For 16-bit inputs: the scores of equally large blocks are written out in fp32, block by block in the cache.

    The query heads of a key head are stacked as rows, [.., r * N, D], so that every product is one batched call and
    sums over them. What is not a product csrc/cpu.cpp does in one pass each, or PyTorch in several.
    """
    fused = _cpu.takes(grad_out, q, k, v, out)
    (heads, tokens), key_heads = lse.shape[1:], k.shape[1]
    grads = tuple(lse.new_zeros(tokens, *x.shape[1::2]) for x in (q, k, v))
    delta = _row_dot(grad_out, out, lse.dtype, fused)
    lse = lse[0].mT.contiguous()
    for batch in _batches(groups.prompt_bounds, groups.completion_bounds, groups.completion_group, heads):
        (count, rows), keys = batch.rows.shape, batch.keys.shape[1]
        q_rows, grad_rows = (_stacked(x, batch.rows, key_heads, lse.dtype, fused) for x in (q, grad_out))
        k_keys, v_keys = (_stacked(x, batch.keys, key_heads, lse.dtype, fused) for x in (k, v))
        with _matrix_unit(q.dtype == torch.bfloat16 and rows * keys >= _LARGE):
            weights, grad_scores = torch.bmm(q_rows, k_keys.mT), torch.bmm(grad_rows, v_keys.mT)
            _softmax_backward(weights, grad_scores, lse, delta, batch, scale, fused)
            shares = (
                torch.bmm(grad_scores, k_keys).view(count, heads, rows, -1),
                torch.bmm(grad_scores.mT, q_rows).view(count, key_heads, keys, -1),
                torch.bmm(weights.mT, grad_rows).view(count, key_heads, keys, -1),
            )
        for grad, share, bounds in zip(grads, shares, (batch.row_bounds, *(batch.key_bounds,) * 2), strict=True):
            _add_rows(grad, share, bounds, fused)
    return tuple(grad.to(x.dtype).transpose(0, 1)[None] for grad, x in zip(grads, (q, k, v), strict=True))


def _row_dot(grad_out: Tensor, out: Tensor, dtype: torch.dtype, fused: bool) -> Tensor:
    """Sums of products of rows: two [1, H, T, D] to [T, H]."""
    if not fused:
        return (grad_out.to(dtype) * out).sum(-1)[0].mT.contiguous()
    delta = out.new_empty(out.shape[2], out.shape[1], dtype=dtype)
    torch.ops.strop.cpu_row_dot(_dense_rows(grad_out)[0], _dense_rows(out)[0], delta)
    return delta


def _stacked(x: Tensor, rows: Tensor, key_heads: int, dtype: torch.dtype, fused: bool) -> Tensor:
    """[1, H, T, D] at rows [B, N] to [B * Hkv, r * N, D]: the r heads of a key head stacked."""
    (_, heads, _, size), (count, length) = x.shape, rows.shape
    stacked = x.new_empty(count * key_heads, heads // key_heads * length, size, dtype=dtype)
    if fused:
        torch.ops.strop.cpu_stack_rows(_dense_rows(x)[0], rows, stacked)
    else:
        picked = x[0].transpose(0, 1).index_select(0, rows.view(-1)).view(count, length, heads, size)
        stacked.view(count, heads, length, size).copy_(picked.transpose(1, 2))
    return stacked


def _softmax_backward(
    scores: Tensor, grad_weights: Tensor, lse: Tensor, delta: Tensor, batch: _Batch, scale: float, fused: bool
) -> None:
    """In place: scores [B * Hkv, r * N, M] to softmax weights, the weights' gradient to that of q k^T.

    lse and delta [T, H] of the queries. What a query does not see has weight 0.
    """
    if fused:
        torch.ops.strop.cpu_softmax_backward(scores, grad_weights, lse, delta, batch.rows, batch.visible, scale)
        return
    (count, rows), keys = batch.rows.shape, batch.keys.shape[1]
    lse_rows, delta_rows = (x[batch.rows].transpose(1, 2).reshape(*scores.shape[:2], 1) for x in (lse, delta))
    scores.mul_(scale).sub_(lse_rows).exp_()
    hidden = torch.arange(keys) >= batch.visible.unsqueeze(2)
    scores.view(count, -1, rows, keys).masked_fill_(hidden.unsqueeze(1), 0.0)
    grad_weights.sub_(delta_rows).mul_(scores).mul_(scale)


def _add_rows(total: Tensor, share: Tensor, bounds: Tensor, fused: bool) -> None:
    """total [T, H, D] += share [B, H, N, D] at the rows from bounds[b, 0] to bounds[b, 1]."""
    if fused:
        torch.ops.strop.cpu_add_rows(share, bounds, total)
        return
    for block, (start, end) in zip(share, bounds.tolist(), strict=True):
        total[start:end] += block[:, : end - start].transpose(0, 1)


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


@dataclass(frozen=True)
class _Batch:
    """Blocks of attention scores of one padded size: B blocks of N query rows by M keys.

    rows [B, N], keys [B, M]: int64 row offsets; padding repeats row 0. visible [B, N] int64: how many of its block's
    keys a query sees, 0 for padding. row_bounds, key_bounds [B, 2] int64: half-open ranges of rows.
    """

    rows: Tensor
    keys: Tensor
    visible: Tensor
    row_bounds: Tensor
    key_bounds: Tensor


@lru_cache(maxsize=8)  # the layers of a model ask for the same batches
def _batches(prompt_bounds, completion_bounds, completion_group, heads: int) -> tuple[_Batch, ...]:
    """All scores of the groups, in blocks of at most _BLOCK queries; a batch holds at most _SCORES of them."""
    sizes: dict[tuple[int, int], list] = {}
    parts = [(span, span, True) for span in _causal_spans(prompt_bounds, completion_bounds, completion_group)]
    parts += [(*pair, False) for pair in _cross_spans(prompt_bounds, completion_bounds, completion_group)]
    for (first, last), (key_start, key_end), is_causal in parts:
        for start in range(first, last, _BLOCK):
            end = min(start + _BLOCK, last)
            seen = end if is_causal else key_end
            size = (-(end - start) // 32 * -32, -(seen - key_start) // 32 * -32)
            sizes.setdefault(size, []).append((((start, end), (key_start, seen)), is_causal))
    batches = []
    for (rows, keys), blocks in sorted(sizes.items()):
        step = max(1, _SCORES // (heads * rows * keys))
        for i in range(0, len(blocks), step):
            batches.append(_batch(blocks[i : i + step], rows, keys))
    return tuple(batches)


def _batch(blocks: list, rows: int, keys: int) -> _Batch:
    row_bounds, key_bounds = (torch.tensor([spans[side] for spans, _ in blocks]) for side in (0, 1))
    is_causal = torch.tensor([causal for _, causal in blocks]).unsqueeze(1)
    row_index, key_index = row_bounds[:, :1] + torch.arange(rows), key_bounds[:, :1] + torch.arange(keys)
    row_is_padding, key_is_padding = row_index >= row_bounds[:, 1:], key_index >= key_bounds[:, 1:]
    visible = torch.where(is_causal, row_index + 1, key_bounds[:, 1:]) - key_bounds[:, :1]
    return _Batch(
        rows=row_index.masked_fill_(row_is_padding, 0),
        keys=key_index.masked_fill_(key_is_padding, 0),
        visible=visible.masked_fill_(row_is_padding, 0),
        row_bounds=row_bounds,
        key_bounds=key_bounds,
    )


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


def _causal_spans(prompt_bounds, completion_bounds, completion_group) -> list[tuple[int, int]]:
    """Row ranges that attend causally to themselves: prompt with first completion, then each further completion."""
    return [
        (prompt_bounds[g][0] if start == prompt_bounds[g][1] else start, end)
        for g, (start, end) in zip(completion_group, completion_bounds, strict=True)
    ]


def _cross_spans(prompt_bounds, completion_bounds, completion_group) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """(rows of completions 2..K, rows of their prompt) for every group that has both."""
    last_end = dict(zip(completion_group, (end for _, end in completion_bounds), strict=True))
    first_end: dict[int, int] = {}
    for group, (_, end) in zip(completion_group, completion_bounds, strict=True):
        first_end.setdefault(group, end)
    return [
        ((first_end[g], last_end[g]), (start, end))
        for g, (start, end) in enumerate(prompt_bounds)
        if end > start and last_end[g] > first_end[g]
    ]
