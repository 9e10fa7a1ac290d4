"""Attention over PackedGroups: a completion sees its prompt and itself, never its siblings."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._triton import HAS_TRITON
from ..layout import Bounds, PackedGroups
from . import cpu, spans, varlen

BACKENDS = ("triton", "flash_attn", "flash_attn_4", "varlen", "sdpa")

# What backend=None takes instead of "triton" where it supports the inputs, by major compute capability: backends that
# benchmarks.attention measured to be faster, e.g. {9: "flash_attn_4"}. None so far.
FASTER: dict[int, str] = {}


def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, groups: PackedGroups, *, scale: float | None = None,
    sliding_window: int | None = None, softcap: float | None = None, backend: str | None = None,
) -> Tensor:
    """Causal attention within each completion and onto its prompt.

    q: [1, H, T, D]; k, v: [1, Hkv, T, D], H a multiple of Hkv; one float dtype, or autocast's; on the groups' device.
    scale defaults to 1/sqrt(D). sliding_window counts positions, the token itself included, as in transformers: a query
    at position p sees keys at positions above p - sliding_window. softcap bounds the scaled scores by tanh before
    masking (Gemma 2).

    backend: one of BACKENDS. None picks what FASTER names for the GPU, "triton" or "sdpa", the first of them that is
    supported. "triton", our kernels, supports bf16, fp16 and fp32 and head sizes up to 256 on a GPU; "flash_attn" and
    "flash_attn_4", if installed, and "varlen", torch.nn.attention.varlen, support bf16 and fp16 on a GPU and copy each
    prompt's keys for every completion after the first; "sdpa" is plain PyTorch and supports everything, the CPU
    included.

    Returns [1, H, T, D]; differentiable once. Raises ValueError if shapes, dtypes or devices do not match the groups,
    on options out of range and on inputs that the requested backend does not support.
    """
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    _check(q, k, v, groups)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    # A window at least as long as every row hides nothing.
    window = 0 if sliding_window is None or sliding_window >= groups.max_keys else sliding_window
    cap = float(softcap or 0.0)
    if not scale > 0 or window < 0 or cap < 0 or sliding_window == 0:
        raise ValueError(f"scale {scale}, sliding_window {sliding_window} and softcap {softcap} must be above 0")
    backend = _choose(backend, q, v, cap)
    if backend == "flash_attn":
        return varlen.flash_attn(q, k, v, groups, scale, window, cap)
    if backend == "flash_attn_4":
        return varlen.flash_attn_4(q, k, v, groups, scale, window)
    if backend == "varlen":
        return varlen.varlen(q, k, v, groups, scale, window)
    if backend == "sdpa" and q.is_cuda and not window and not cap:
        return spans.sdpa(q, k, v, groups, scale)
    layout = (groups.segments, groups.tiles, groups.readers_end, groups.position_ids)
    return _op(q, k, v, *layout, float(scale), window, cap, backend == "triton")[0]


def _check(q: Tensor, k: Tensor, v: Tensor, groups: PackedGroups) -> None:
    if q.dim() != 4 or q.shape[0] != 1 or q.shape[2] != groups.num_tokens:
        raise ValueError(f"q must be [1, heads, {groups.num_tokens}, head size], got {list(q.shape)}")
    if k.shape[:1] + k.shape[2:3] != q.shape[:1] + q.shape[2:3] or k.shape[:3] != v.shape[:3]:
        raise ValueError(f"k {list(k.shape)} and v {list(v.shape)} must cover the same tokens as q {list(q.shape)}")
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"q has head size {q.shape[3]}, k {k.shape[3]}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads are not a multiple of {k.shape[1]} key heads")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must share one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if groups.position_ids.device != q.device:
        raise ValueError(f"q is on {q.device}, the groups are on {groups.position_ids.device}")


def _choose(backend: str | None, q: Tensor, v: Tensor, cap: float) -> str:
    if backend is not None:
        if backend not in BACKENDS:
            raise ValueError(f"unknown backend {backend!r}; known are {BACKENDS}")
        if reason := _unable(backend, q, v, cap):
            raise ValueError(f"attention backend {backend}: {reason}")
        return backend
    if not q.is_cuda:
        return "sdpa"
    for name in (FASTER.get(_capability(q.device)), "triton"):
        if name is not None and _unable(name, q, v, cap) is None:
            return name
    return "sdpa"


def _unable(backend: str, q: Tensor, v: Tensor, cap: float) -> str | None:
    """Why the backend does not support these inputs; None if it does."""
    if backend == "sdpa":
        return None
    if backend != "triton":
        return varlen.unable(backend, q, v, cap)
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return "it takes bf16, fp16 and fp32 on a GPU"
    if q.shape[-1] != v.shape[-1] or q.shape[-1] > 256:
        return "it takes one head size up to 256"
    if not HAS_TRITON:
        return "triton is not installed"
    return None if _capability(q.device) >= 8 else "it needs a GPU of compute capability 8.0 or later"


def _capability(device: torch.device) -> int:
    """Major compute capability; 8 without a GPU, as under FakeTensorMode."""
    if device not in _capabilities:
        _capabilities[device] = torch.cuda.get_device_capability(device)[0] if torch.cuda.is_available() else 8
    return _capabilities[device]


_capabilities: dict[torch.device, int] = {}


# torch.compile then calls it at trace time instead of tracing into it. torch.compiler.assume_constant_result sets this
# too, but imports the compiler into every process.
_capability._dynamo_marked_constant = True


# Defined by schema, with an autograd.Function under the Autograd key: the same as torch.library.custom_op with
# register_autograd, at less overhead per call. Outputs and gradients are laid out rows first in memory, as models
# produce q, k and v and consume the output.
_library = torch.library.Library("strop", "FRAGMENT")
_LAYOUT = "Tensor segments, Tensor tiles, Tensor readers_end, Tensor positions"
_NUMBERS = "float scale, int window, float cap, bool triton"
_library.define(f"prefix_attention(Tensor q, Tensor k, Tensor v, {_LAYOUT}, {_NUMBERS}) -> (Tensor, Tensor)")
_library.define(
    "prefix_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_LAYOUT}, {_NUMBERS}) -> (Tensor, Tensor, Tensor)"
)
_op, _backward_op = torch.ops.strop.prefix_attention.default, torch.ops.strop.prefix_attention_backward.default


def _explicit(q: Tensor, v: Tensor, window: int, cap: float, triton: bool) -> bool:
    """Whether spans.explicit_* runs, which materializes blocks of scores and needs no log-sum-exp."""
    return not triton and bool(window or cap or q.shape[-1] != v.shape[-1] or q.is_cuda)


def _forward(q, k, v, segments, tiles, readers_end, positions, scale, window, cap, triton):
    """out [1, H, T, Dv] and lse [1, H, T], at least fp32; lse is empty if the backward does not need it."""
    if triton:
        from .._triton import attention_launch

        return attention_launch.forward(q, k, v, tiles, readers_end, positions, scale, window, cap)
    bounds = Bounds.of(segments)
    if _explicit(q, v, window, cap, triton):
        out = spans.explicit_forward(q, k, v, bounds, scale, window, cap)
        return out, q.new_empty(0, dtype=torch.promote_types(q.dtype, torch.float32))
    out, lse = cpu.forward(q, k, v, bounds, scale)
    return _rows_first(out), lse


def _backward(grad_out, q, k, v, out, lse, segments, tiles, readers_end, positions, scale, window, cap, triton):
    if triton:
        from .._triton import attention_launch

        layout = (tiles, readers_end, positions)
        return attention_launch.backward(grad_out, q, k, v, out, lse, *layout, scale, window, cap)
    bounds = Bounds.of(segments)
    if _explicit(q, v, window, cap, triton):
        grads = spans.explicit_backward(grad_out, q, k, v, bounds, scale, window, cap)
    else:
        grads = cpu.backward(grad_out, q, k, v, out, lse, bounds, scale)
    return tuple(_rows_first(grad) for grad in grads)


def _rows_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _forward_fake(q, k, v, segments, tiles, readers_end, positions, scale, window, cap, triton):
    explicit = _explicit(q, v, window, cap, triton)
    plain = torch.promote_types(q.dtype, torch.float32)
    dtype = plain if explicit or triton else cpu.lse_dtype(q, k, v)
    lse = q.new_empty((0,) if explicit else q.shape[:3], dtype=dtype)
    return cpu.empty_rows_first(q, q.shape[1], v.shape[3]), lse


def _backward_fake(grad_out, q, k, v, *_):
    return tuple(cpu.empty_rows_first(x, *x.shape[1::2]) for x in (q, k, v))


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, *layout_and_numbers):
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = _op(q, k, v, *layout_and_numbers)
        ctx.save_for_backward(q, k, v, out, lse, *layout_and_numbers[:4])
        ctx.numbers = layout_and_numbers[4:]
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor | None, _):
        if grad_out is None:
            return (None,) * 11
        return *_backward_op(grad_out, *ctx.saved_tensors, *ctx.numbers), *[None] * 8


_library.impl("prefix_attention", _forward, "CompositeExplicitAutograd")
_library.impl("prefix_attention_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("strop::prefix_attention", _forward_fake, lib=_library)
torch.library.register_fake("strop::prefix_attention_backward", _backward_fake, lib=_library)
_library.impl("prefix_attention", _PrefixAttention.apply, "Autograd")
