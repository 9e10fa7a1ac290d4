"""RMSNorm and SwiGLU for the CPU, keeping for the backward what they read and nothing they made.

PyTorch's own composition writes every intermediate to memory and keeps most of them until the backward. Here rows go
through a scratch buffer that stays in a core's cache, and the backward computes the rest again. On a GPU Liger's
kernels do this; they need Triton.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Elements of fp32 scratch that stay in a core's own cache.
_BLOCK_ELEMENTS = 1 << 18


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * (x / sqrt(mean(x^2) + eps)), arXiv 1910.07467, rounded to x's dtype before the product as Llama does.

    x [..., D] bf16, fp16, fp32 or fp64; weight [D] of its dtype. Statistics in fp32 at least.
    """
    return _RMSNorm.apply(x, weight, eps)


def swiglu_linear(gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    """(silu(gate) * up) @ weight.T, arXiv 2002.05202; gate, up [..., F] and weight [D, F] of one dtype.

    Returns [..., D].
    """
    return _SwiGLULinear.apply(gate, up, weight)


def _blocks(rows: int, width: int) -> Iterator[slice]:
    step = max(1, _BLOCK_ELEMENTS // width)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        wide = torch.promote_types(x.dtype, torch.float32)
        out = torch.empty_like(flat)
        inverse = flat.new_empty(flat.shape[0], 1, dtype=wide)
        for block in _blocks(*flat.shape):
            rows = flat[block].to(wide, copy=True)
            mean_square = torch.linalg.vecdot(rows, rows).div_(flat.shape[1]).unsqueeze(1)
            torch.rsqrt(mean_square.add_(eps), out=inverse[block])
            out[block] = rows.mul_(inverse[block])
            out[block] *= weight
        ctx.save_for_backward(flat, weight, inverse)
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        flat, weight, inverse = ctx.saved_tensors
        flat_grad = grad.reshape(flat.shape)
        grad_x = torch.empty_like(flat) if ctx.needs_input_grad[0] else None
        grad_weight = inverse.new_zeros(weight.shape) if ctx.needs_input_grad[1] else None
        wide_weight = weight.to(inverse.dtype)
        for block in _blocks(*flat.shape):
            normal = flat[block].to(inverse.dtype, copy=True).mul_(inverse[block])
            upstream = flat_grad[block].to(inverse.dtype, copy=True)
            product = normal * upstream
            if grad_weight is not None:
                grad_weight += product.sum(0)
            if grad_x is not None:
                pull = torch.mv(product, wide_weight).div_(flat.shape[1]).unsqueeze(1)
                grad_x[block] = upstream.mul_(wide_weight).sub_(normal.mul_(pull)).mul_(inverse[block])
        grad_x = None if grad_x is None else grad_x.view(grad.shape)
        return grad_x, None if grad_weight is None else grad_weight.to(weight.dtype), None


class _SwiGLULinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        return F.linear(F.silu(gate).mul_(up), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        gate, up, weight = ctx.saved_tensors
        grad_weight = None
        active = F.silu(gate)
        if ctx.needs_input_grad[2]:
            product = (active * up).flatten(0, -2)
            grad_weight = grad.flatten(0, -2).mT @ product
        upstream = grad @ weight
        grad_up = active.mul_(upstream)
        return torch.ops.aten.silu_backward(upstream.mul_(up), gate), grad_up, grad_weight
