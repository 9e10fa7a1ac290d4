"""Attention over PackedGroups by variable-length kernels, on keys and values gathered per completion.

Query spans [P C1][C2] .. attend to key spans [P C1][P C2] ..: the rows of q already have this layout, those of k and v
are gathered. All kernels align the causal mask bottom-right, and positions are consecutive within a span, so windows
of rows are windows of positions. Every completion after the first costs a copy of its prompt's keys and values.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..layout import PackedGroups

DTYPES = (torch.bfloat16, torch.float16)


def _installed(distribution: str) -> bool:
    """Asked by the distribution's name: flash-attn and flash-attn-4 share the import name flash_attn."""
    try:
        return bool(version(distribution))
    except PackageNotFoundError:
        return False


# Looked up once at import: torch.compile must not trace into importlib.
INSTALLED = {"flash_attn": _installed("flash-attn"), "flash_attn_4": _installed("flash-attn-4"), "varlen": True}
# Before 2.12 varlen_attn has no such argument and takes grouped heads as they are.
GROUPED_HEADS = {"enable_gqa": True} if torch.__version__ >= (2, 12) else {}


def unable(backend: str, q: Tensor, v: Tensor, cap: float) -> str | None:
    """Why `backend`, "flash_attn", "flash_attn_4" or "varlen", does not support these inputs; None if it does."""
    if not INSTALLED[backend]:
        return f"{backend.replace('_', '-')} is not installed"
    if not q.is_cuda or q.dtype not in DTYPES:
        return "it takes bf16 and fp16 on a GPU"
    if q.shape[-1] != v.shape[-1] or q.shape[-1] > 256 or q.shape[-1] % 8:
        return "it takes one head size up to 256 that 8 divides"
    if cap and backend != "flash_attn":
        return "it has no soft-cap"
    if backend == "flash_attn_4" and (q.shape[-1] > 128 or _capability(q.device) not in (9, 10)):
        return "it takes head sizes up to 128 on GPUs of compute capability 9 and 10"
    return None


def _capability(device: torch.device) -> int:
    """Major compute capability; 9 without a GPU, as under FakeTensorMode."""
    return torch.cuda.get_device_capability(device)[0] if torch.cuda.is_available() else 9


_capability._dynamo_marked_constant = True  # see prefix.py


def flash_attn(q: Tensor, k: Tensor, v: Tensor, groups: PackedGroups, scale: float, window: int, cap: float) -> Tensor:
    """q: [1, H, T, D]; k, v: [1, Hkv, T, D]; window and cap are 0 for none. Deterministic."""
    from flash_attn import flash_attn_varlen_func

    out = flash_attn_varlen_func(
        *_rows(q, k, v, groups), groups.query_offsets, groups.key_offsets, groups.max_queries, groups.max_keys,
        softmax_scale=scale, causal=True, window_size=(window - 1, 0) if window else (-1, -1), softcap=cap,
        deterministic=True,
    )
    return out.transpose(0, 1).unsqueeze(0)


def flash_attn_4(q: Tensor, k: Tensor, v: Tensor, groups: PackedGroups, scale: float, window: int) -> Tensor:
    """As flash_attn, by the CuTe kernels of flash-attn-4. Its backward has no soft-cap for variable lengths."""
    from flash_attn.cute import flash_attn_varlen_func

    out, _ = flash_attn_varlen_func(
        *_rows(q, k, v, groups), cu_seqlens_q=groups.query_offsets, cu_seqlens_k=groups.key_offsets,
        max_seqlen_q=groups.max_queries, max_seqlen_k=groups.max_keys, softmax_scale=scale, causal=True,
        window_size=(window - 1, 0) if window else (None, None), deterministic=True,
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
