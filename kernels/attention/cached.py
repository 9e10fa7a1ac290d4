"""Decode attention on the CPU (csrc/cpu_cached.cpp): one operator appends the new keys and values to the cache and
attends, reading each prompt once for all completions of its group."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _cpu

_NO_WINDOW = 1 << 40


# Whether attention_over_cache supports q [Hq, N, D], k and v [Hkv, N, D].
takes = _cpu.multiplies


def attention_over_cache(
    q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, completion_k: Tensor, completion_v: Tensor,
    chunks: Tensor, group: Tensor, seen: Tensor, length: Tensor, *, scale: float, softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Store k and v [Hkv, N, D] of N new tokens in the cache and attend with q [Hq, N, D]; returns [N, Hq, D].

    Token i sees the first seen[i] tokens of prompt group[i]. If length[i] >= 0, it is token length[i] (from 0) of
    completion i and also sees that completion up to itself; otherwise it is prompt token seen[i] - 1. group, seen,
    length: [N] int64. window: the number of most recent tokens a token sees, itself included.

    prompt_k, prompt_v: [G, Hkv, P, D]. completion_k, completion_v: [R * Hkv * C, D], consecutive chunks, each
    [R, Hkv, size, D] of the tokens from `start` on; chunks [n, 2] int64: start and size. All in q's dtype, which
    `takes` must accept. Raises RuntimeError on mismatched tensors and on positions outside the cache.
    """
    attended = q.new_empty(q.shape[1], q.shape[0], q.shape[2])
    torch.ops.strop.cpu_cached_attention(
        *(_cpu.dense_rows(x) for x in (q, k, v)), prompt_k, prompt_v, completion_k, completion_v, chunks,
        group, seen, length, scale, softcap or 0.0, _NO_WINDOW if window is None else window, attended,
    )  # fmt: skip
    return attended
