"""Attention over PackedGroups by variable-length kernels, on keys and values gathered per completion.

Query spans [P C1][C2] .. attend to key spans [P C1][P C2] ..: the rows of q already have this layout, those of k and v
are gathered. Both kernels align the causal mask bottom-right, and positions are consecutive within a span, so windows
of rows are windows of positions. Every completion after the first costs a copy of its prompt's keys and values.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..layout import PackedGroups

DTYPES = (torch.bfloat16, torch.float16)
# Looked up once at import: torch.compile must not trace into importlib.
HAS_FLASH_ATTN = find_spec("flash_attn") is not None
# Before 2.12 varlen_attn has no such argument and takes grouped heads as they are.
GROUPED_HEADS = {"enable_gqa": True} if torch.__version__ >= (2, 12) else {}


def unable(backend: str, q: Tensor, v: Tensor, cap: float) -> str | None:
    """Why `backend`, "flash_attn" or "varlen", does not support these inputs; None if it does."""
    if backend == "flash_attn" and not HAS_FLASH_ATTN:
        return "flash_attn is not installed"
    if not q.is_cuda or q.dtype not in DTYPES:
        return "it takes bf16 and fp16 on a GPU"
    if q.shape[-1] != v.shape[-1] or q.shape[-1] > 256 or q.shape[-1] % 8:
        return "it takes one head size up to 256 that 8 divides"
    if cap and backend == "varlen":
        return "it has no soft-cap"
    return None


def flash_attn(q: Tensor, k: Tensor, v: Tensor, groups: PackedGroups, scale: float, window: int, cap: float) -> Tensor:
    """q: [1, H, T, D]; k, v: [1, Hkv, T, D]; window and cap are 0 for none. Deterministic."""
    from flash_attn import flash_attn_varlen_func

    out = flash_attn_varlen_func(
        *_rows(q, k, v, groups), groups.query_offsets, groups.key_offsets, groups.max_queries, groups.max_keys,
        softmax_scale=scale, causal=True, window_size=(window - 1, 0) if window else (-1, -1), softcap=cap,
        deterministic=True,
    )
    return out.transpose(0, 1).unsqueeze(0)


def varlen(q: Tensor, k: Tensor, v: Tensor, groups: PackedGroups, scale: float, window: int) -> Tensor:
    """As flash_attn, by PyTorch's kernel. Deterministic under torch.use_deterministic_algorithms."""
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(
        *_rows(q, k, v, groups), groups.query_offsets, groups.key_offsets, groups.max_queries, groups.max_keys,
        scale=scale, window_size=(window - 1 if window else -1, 0), **GROUPED_HEADS,
    )
    return out.transpose(0, 1).unsqueeze(0)


def _rows(q: Tensor, k: Tensor, v: Tensor, groups: PackedGroups) -> tuple[Tensor, Tensor, Tensor]:
    """[T, H, D] and, twice, [keys, Hkv, D]."""
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (q, k, v))
    return q, _Gather.apply(k, groups.key_index), _Gather.apply(v, groups.key_index)


class _Gather(torch.autograd.Function):
    """x[index] whose backward sums the copies of a row in fp32 and in a fixed order."""

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape = x.shape
        return x.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (index,) = ctx.saved_tensors
        # index_put sorts before it accumulates; index_add would use atomics.
        total = torch.zeros(ctx.shape, dtype=torch.float32, device=grad.device)
        return total.index_put_((index,), grad.float(), accumulate=True).to(grad.dtype), None
