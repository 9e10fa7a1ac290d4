"""Attention over PackedGroups and over a cache in plain PyTorch: what the tests compare with."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import PackedGroups


def attention_mask(query_position: Tensor, key_position: Tensor, sliding_window: int | None = None) -> Tensor:
    """[Q, K] bool, True where a query sees a key of the same sequence: causal, within the window of positions."""
    distance = query_position[:, None] - key_position[None, :]
    visible = distance >= 0
    return visible if sliding_window is None else visible & (distance < sliding_window)


def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, groups: PackedGroups, *, scale: float | None = None,
    sliding_window: int | None = None, softcap: float | None = None,
) -> Tensor:
    """strop.kernels.prefix_attention with the whole [T, T] mask and scores materialized."""
    row_group = torch.empty(groups.num_tokens, dtype=torch.int64)
    row_completion = torch.full((groups.num_tokens,), -1)
    for g, (start, end) in enumerate(groups.prompt_bounds):
        row_group[start:end] = g
    for c, (start, end) in enumerate(groups.completion_bounds):
        row_group[start:end] = groups.completion_group[c]
        row_completion[start:end] = c
    same_group = row_group[:, None] == row_group[None, :]
    own = (row_completion[None, :] == -1) | (row_completion[:, None] == row_completion[None, :])
    position = groups.position_ids
    visible = same_group.to(q.device) & own.to(q.device) & attention_mask(position, position, sliding_window)
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v


def attention_over_cache(
    q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, completion_k: Tensor, completion_v: Tensor,
    chunks: Tensor, group: Tensor, seen: Tensor, length: Tensor, *, scale: float, softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """strop.kernels.attention.cached.attention_over_cache, token by token."""
    heads, rows = k.shape[0], len(completion_k) // (k.shape[0] * int(chunks[:, 1].sum()))

    def own(buffer: Tensor, row: int) -> Tensor:  # a view [Hkv, size, D] for each chunk
        return [
            buffer[rows * heads * start : rows * heads * (start + size)].view(rows, heads, size, -1)[row]
            for start, size in chunks.tolist()
        ]

    places = list(enumerate(zip(group.tolist(), seen.tolist(), length.tolist(), strict=True)))
    for i, (g, s, t) in places:
        for new, prompt, completion in ((k, prompt_k, completion_k), (v, prompt_v, completion_v)):
            if t < 0:
                prompt[g, :, s - 1] = new[:, i]
            else:
                c = max(c for c, start in enumerate(chunks[:, 0].tolist()) if start <= t)
                own(completion, i)[c][:, t - int(chunks[c, 0])] = new[:, i]
    found = q.new_empty(q.shape[1], q.shape[0], q.shape[2])
    for i, (g, s, t) in places:
        first = 0 if window is None else max(0, s + t + 1 - window)
        keys, values = (
            torch.cat([prompt[g, :, :s], *(own(completion, i) if t >= 0 else [])], 1)[:, first : s + max(t + 1, 0)]
            for prompt, completion in ((prompt_k, completion_k), (prompt_v, completion_v))
        )
        scores = q[:, i].unflatten(0, (heads, -1)) @ keys.mT * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        found[i] = (scores.softmax(-1) @ values).flatten(0, 1)
    return found


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, tables, *, scale: float,
    softcap: float | None = None, window: int | None = None,
) -> Tensor:
    """strop.kernels.attention.paged.decode_attention, row by row, with scores in at least fp32."""
    heads, size, found = k.shape[1], k_pages.shape[2], torch.zeros_like(q, memory_format=torch.contiguous_format)
    wide = torch.promote_types(q.dtype, torch.float32)

    def tokens(pages: Tensor, table: Tensor, count: int) -> Tensor:
        return pages[table[: -(-count // size)].long()].transpose(0, 1).flatten(1, 2)[:, :count]  # [Hkv, count, D]

    prompt_lengths, groups = tables.prompt_length.tolist(), tables.group.tolist()
    for row, length in enumerate(tables.length.tolist()):
        if length < 0:
            continue
        group, place = groups[row], (int(tables.own_pages[row, length // size]), slice(None), length % size)
        k_pages[place], v_pages[place] = k[row], v[row]
        keys, values = (torch.cat([tokens(pages, tables.prompt_pages[group], prompt_lengths[group]),
                                   tokens(pages, tables.own_pages[row], length + 1)], 1)[:, -(window or 1 << 62) :]
                        for pages in (k_pages, v_pages))
        scores = q[row].unflatten(0, (heads, -1)).to(wide) @ keys.to(wide).mT * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        found[row] = (scores.softmax(-1).to(v.dtype) @ values).flatten(0, 1)
    return found
