"""Attention of new tokens over cached keys and values on the CPU, csrc/cpu_cached.cpp: one operator that stores the new
keys and values and attends, and reads a prompt once for all completions of its group."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _cpu

_NO_WINDOW = 1 << 40


# whether attention_over_cache has an operator for q [Hq, N, D], k and v [Hkv, N, D]
takes = _cpu.multiplies


def attention_over_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    completion_k: Tensor,
    completion_v: Tensor,
    chunks: Tensor,
    group: Tensor,
    seen: Tensor,
    length: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Stores k and v [Hkv, N, D] of N new tokens in the cache and attends with q [Hq, N, D] -> [N, Hq, D].

    Token i sees the first seen[i] tokens of the prompt group[i]. If length[i] is not negative, it is token number
    length[i], counted from 0, of completion i and sees that, too, up to itself; else it is the last of the tokens seen.
    group, seen, length: [N] int64. window: how many tokens back a token sees, itself among them.

    prompt_k, prompt_v: [G, Hkv, P, D]. completion_k, completion_v: [R * Hkv * C, D], chunk after chunk, each
    [R, Hkv, size, D] of the tokens from `start` on; chunks [n, 2] int64: start and size. All of q's dtype, which
    `takes` must take. Raises RuntimeError on tensors that do not fit and on places outside of the cache.
    """
    attended = q.new_empty(q.shape[1], q.shape[0], q.shape[2])
    torch.ops.strop.cpu_cached_attention(
        *(_cpu.dense_rows(x) for x in (q, k, v)), prompt_k, prompt_v, completion_k, completion_v, chunks,
        group, seen, length, scale, softcap or 0.0, _NO_WINDOW if window is None else window, attended,
    )  # fmt: skip
    return attended
