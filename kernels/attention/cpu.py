"""Prefix attention on the CPU: csrc/cpu_attention.cpp for bf16, and for fp32 on processors that cannot multiply bf16;
otherwise PyTorch's flash attention forward and whole rows of scores backward.

Flash attention runs in two parts: prompts and completions attend causally to themselves; completions 2..K of a group
also attend, in one call, to their prompt, and the two parts merge by log-sum-exp.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _cpu
from ..layout import PackedGroups

_flash_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

# Query tokens per block of csrc/cpu_attention.cpp, and per slice of a group whose gradients one thread accumulates.
_QUERIES = 64
_SLICE = 1024
# Without it: query rows per block of whole score rows, and scores of all heads per block, to fit the caches.
_BLOCK = 192
_SCORES = 1 << 21


def forward(q: Tensor, k: Tensor, v: Tensor, groups: PackedGroups, scale: float) -> tuple[Tensor, Tensor]:
    """q: [1, H, T, D]; k, v: [1, Hkv, T, D]. Returns out, shaped as q, and the log-sum-exp [1, H, T] in lse_dtype."""
    lse = q.new_empty(q.shape[:3], dtype=lse_dtype(q, k, v))
    if _cpu.multiplies(q, k, v):
        out = empty_rows_first(q, *q.shape[1::2])
        tables = _tables(groups.prompt_bounds, groups.completion_bounds, groups.completion_group)
        rows = (_cpu.dense_rows(x)[0] for x in (q, k, v))
        torch.ops.strop.cpu_prefix_attention(*rows, tables.segments, tables.blocks, scale, out[0], lse)
        return out, lse
    out = torch.empty_like(q, memory_format=torch.preserve_format)
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


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, groups: PackedGroups, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from forward's inputs and outputs."""
    if _cpu.multiplies(q, k, v):
        grads = tuple(empty_rows_first(x, *x.shape[1::2]) for x in (q, k, v))
        tables = _tables(groups.prompt_bounds, groups.completion_bounds, groups.completion_group)
        shares = q.new_empty(2, k.shape[1], tables.share_rows, k.shape[3], dtype=torch.float32)
        rows = (_cpu.dense_rows(x)[0] for x in (grad_out, q, k, v, out))
        torch.ops.strop.cpu_prefix_attention_backward(
            *rows, lse, *tables[:3], scale, shares, *(grad[0] for grad in grads)
        )
        return grads
    wide = (x.to(lse.dtype) for x in (grad_out, q, k, v))
    return tuple(grad.to(q.dtype) for grad in _whole_rows_backward(*wide, groups, scale))


def lse_dtype(q: Tensor, k: Tensor, v: Tensor) -> torch.dtype:
    """At least fp32; fp64 where csrc runs fp32, because for a peaked softmax an fp32 lse loses digits."""
    if q.dtype == torch.float32 and _cpu.multiplies(q, k, v):
        return torch.float64
    return torch.promote_types(q.dtype, torch.float32)


def empty_rows_first(x: Tensor, heads: int, size: int) -> Tensor:
    """For x [1, H, T, D] an empty [1, heads, T, size], laid out in memory as [T, heads, size]."""
    return x.new_empty(1, x.shape[2], heads, size).transpose(1, 2)


class _Tables(NamedTuple):
    """The groups as csrc/cpu_attention.cpp reads them, int64: segments [S, 3], blocks [B, 7], slices [N, 6]; and the
    number of rows of partial gradients over all slices."""

    segments: Tensor
    blocks: Tensor
    slices: Tensor
    share_rows: int


@dataclass
class _Slice:
    """Blocks first_block to last_block, processed by one thread, and the rows first to last of their keys. Their
    partial gradients start at row `at` of the shares. group: in a group's last slice, the index of its first slice."""

    first_block: int
    last_block: int
    first: int
    last: int
    at: int = 0
    group: int = -1


@lru_cache(maxsize=8)  # all layers of a model use the same tables
def _tables(prompt_bounds, completion_bounds, completion_group) -> _Tables:
    completions = [[] for _ in prompt_bounds]
    for group, bounds in zip(completion_group, completion_bounds, strict=True):
        completions[group].append(bounds)
    segments, blocks, slices, column, share_rows = [], [], [], 0, 0
    for prompt, spans in zip(prompt_bounds, completions, strict=True):
        before, of_group, queries = (prompt[0], prompt[0], column), [], 0
        for start, end in (prompt, *spans):
            segments.append((start, end, column))
            for first in range(start, end, _QUERIES):
                last = min(first + _QUERIES, end)
                if not of_group or queries >= _SLICE:
                    of_group.append(_Slice(len(blocks), 0, prompt[0], 0))
                    queries = 0
                blocks.append((first, last, start, column, *before))
                of_group[-1].last_block, of_group[-1].last = len(blocks), last
                queries += last - first
            if (start, end) == prompt:
                before = (*prompt, column)
            column += (end - start + 1) // 2 * 2
        for part in of_group:
            part.at = share_rows
            share_rows += part.last - part.first
        if of_group:
            of_group[-1].group = len(slices)
        slices += of_group
    return _Tables(
        torch.tensor(segments).view(-1, 3), torch.tensor(blocks).view(-1, 7),
        torch.tensor([astuple(part) for part in slices]).view(-1, 6), share_rows,
    )


def _whole_rows_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, groups: PackedGroups, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """In fp32 or fp64, with the softmax recomputed over whole rows of scores.

    exp(score - lse) carries the rounding of lse and of scores that the forward rounded differently; for a peaked
    softmax that is several times the error of a plain softmax. So this uses neither the output nor lse.
    """
    grads = tuple(torch.zeros_like(x) for x in (q, k, v))
    heads, key_heads, size = q.shape[1], k.shape[1], q.shape[3]
    spans = _causal_spans(groups.prompt_bounds, groups.completion_bounds, groups.completion_group)
    for (start, last), group in zip(spans, groups.completion_group, strict=True):
        prompt = groups.prompt_bounds[group]
        before = (start, start) if start == prompt[0] else prompt  # the first completion's span includes its prompt
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
    """In place: scores [B, r * N, M] become softmax weights, the weights' gradient becomes that of q k^T. The N rows'
    own keys are the last N of M."""
    if _cpu.takes(scores, grad_weights):
        torch.ops.strop.cpu_causal_softmax_backward(scores, grad_weights, rows, scale)
        return
    keys = scores.shape[-1]
    future = torch.ones(rows, keys, dtype=torch.bool).triu(keys - rows + 1)
    scores.mul_(scale).view(-1, rows, keys).masked_fill_(future, -torch.inf)
    scores.copy_(scores.softmax(-1))
    grad_weights.copy_(torch._softmax_backward_data(grad_weights, scores, -1, scores.dtype)).mul_(scale)


def _causal_spans(prompt_bounds, completion_bounds, completion_group) -> list[tuple[int, int]]:
    """Row ranges that attend causally to themselves: a prompt with its first completion, then each later completion."""
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
