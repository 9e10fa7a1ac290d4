"""RMSNorm, SwiGLU and rotary embeddings for the CPU: one pass over memory each way; only inputs are saved for backward.

csrc/cpu.cpp implements them with the intermediate rounding of transformers' layers; for tensors it does not support
(`available`) they run in plain PyTorch. On a GPU, for inference alone, they are Triton kernels of the same rounding; to
train there use Liger's kernels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _cpu
from ._triton import HAS_TRITON

# Rows per partial sum of the weight's gradient in csrc/cpu.cpp.
_NORM_BLOCK = 64


def available(*tensors: Tensor) -> bool:
    """Whether csrc/cpu.cpp was built and supports these tensors: on the CPU, all bf16 or all fp32."""
    return _cpu.takes(*tensors)


def infers(*tensors: Tensor) -> bool:
    """Whether the forward kernels for GPUs support these tensors: without gradients, of one dtype and head size."""
    first = tensors[0].dtype
    return HAS_TRITON and not torch.is_grad_enabled() and first in (torch.bfloat16, torch.float16, torch.float32) and (
        all((x.is_cuda or x.is_meta) and x.dtype == first for x in tensors)
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * (x / sqrt(mean(x^2) + eps)), arXiv 1910.07467, rounded to x's dtype before the product as Llama does.

    x [..., D] and weight [D] of one dtype. Statistics in fp32, for fp64 in fp64.
    """
    if infers(x, weight):
        return torch.ops.strop.rms_norm(x, weight, eps)
    if not available(x, weight):
        return rms_norm_reference(x, weight, eps)
    if not torch.is_grad_enabled():  # calling an autograd.Function takes as long as the norm of a decoding step
        return _normed(x, weight, eps)[0].view(x.shape)
    return _RMSNorm.apply(x, weight, eps)


def swiglu_linear(gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    """(silu(gate) * up) @ weight.T, arXiv 2002.05202; gate, up [..., F] and weight [D, F] of one dtype.

    Returns [..., D].
    """
    if infers(gate, up, weight):
        return F.linear(torch.ops.strop.swiglu(gate, up), weight)
    if not available(gate, up, weight):
        return F.linear(F.silu(gate) * up, weight)
    return _SwiGLULinear.apply(gate, up, weight)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, arXiv 2002.05202, of one shape and dtype, for a down projection that is not a plain linear."""
    if infers(gate, up):
        return torch.ops.strop.swiglu(gate, up)
    if not available(gate, up):
        return F.silu(gate) * up
    if not torch.is_grad_enabled():
        return _product(gate.contiguous(), up.contiguous())
    return _SwiGLU.apply(gate, up)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x * cos + rotate_half(x) * sin, arXiv 2104.09864 with the two halves of a head as pairs, as in transformers.

    x [1, H, T, D], cos and sin [1, T, D] of one dtype. Gradients for x only.
    """
    if not available(x, cos, sin):
        return rotary_reference(x, cos.detach(), sin.detach())
    if not torch.is_grad_enabled():
        return _rotate(x, cos, sin, False)
    return _Rotary.apply(x, cos, sin)


def rotary_pair(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`rotary` of q [1, Hq, T, D] and of k [1, Hkv, T, D], on a GPU in one launch."""
    if infers(q, k, cos, sin):
        return torch.ops.strop.rotary(q, k, cos, sin)
    return rotary(q, cos, sin), rotary(k, cos, sin)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight [D] * (x [..., D] / sqrt(mean(x^2) + eps)), arXiv 1910.07467, rounded to x's dtype before the product."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def rotary_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [1, H, T, D] rotated by cos and sin [1, T, D], arXiv 2104.09864 with the two halves of a head as pairs."""
    first, second = x.chunk(2, -1)
    return x * cos.unsqueeze(1) + torch.cat((-second, first), -1) * sin.unsqueeze(1)


def _normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Normalized rows, the rows themselves and their inverse root mean squares."""
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    out, inverse = torch.empty_like(flat), flat.new_empty(flat.shape[0], dtype=torch.float32)
    torch.ops.strop.cpu_rms_norm(flat, weight, eps, out, inverse)
    return out, flat, inverse


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, flat, inverse = _normed(x, weight, eps)
        ctx.save_for_backward(flat, weight, inverse)
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        flat, weight, inverse = ctx.saved_tensors
        grad_x = torch.empty_like(flat)
        of_blocks = inverse.new_empty(-(-flat.shape[0] // _NORM_BLOCK), flat.shape[1])
        flat_grad = grad.reshape(flat.shape).contiguous()
        torch.ops.strop.cpu_rms_norm_backward(flat_grad, flat, weight, inverse, grad_x, of_blocks)
        return grad_x.view(grad.shape), of_blocks.sum(0).to(weight.dtype), None


def _product(gate: Tensor, up: Tensor) -> Tensor:
    product = torch.empty_like(gate)
    torch.ops.strop.cpu_silu_mul(gate, up, product)
    return product


class _SwiGLULinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up, weight)
        return F.linear(_product(gate, up), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        gate, up, weight = ctx.saved_tensors
        product, grad_gate, grad_up = (torch.empty_like(gate) for _ in range(3))
        torch.ops.strop.cpu_silu_mul_backward(grad @ weight, gate, up, product, grad_gate, grad_up)
        needs_weight = ctx.needs_input_grad[2]
        grad_weight = grad.flatten(0, -2).mT @ product.flatten(0, -2) if needs_weight else None
        return grad_gate, grad_up, grad_weight


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return _product(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        gate, up = ctx.saved_tensors
        product, grad_gate, grad_up = (torch.empty_like(gate) for _ in range(3))
        torch.ops.strop.cpu_silu_mul_backward(grad.contiguous(), gate, up, product, grad_gate, grad_up)
        return grad_gate, grad_up


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return _rotate(grad, *ctx.saved_tensors, True), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    if x.stride(-1) != 1:
        x = x.contiguous()
    # A token's heads are contiguous, as the projections before and after produce and read them.
    turned = torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    torch.ops.strop.cpu_rotate(x[0], cos.contiguous(), sin.contiguous(), back, turned[0])
    return turned


def _on_gpu(name: str):
    def run(*arguments):
        from ._triton import layers

        return getattr(layers, name)(*arguments)

    return run


def _empty_pair(q: Tensor, k: Tensor, *_) -> tuple[Tensor, Tensor]:
    return tuple(x.new_empty(1, x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2) for x in (q, k))


_library = torch.library.Library("strop", "FRAGMENT")
for _name, _schema, _fake in (
    ("rms_norm", "(Tensor x, Tensor weight, float eps) -> Tensor", lambda x, *_: x.new_empty(x.shape)),
    ("swiglu", "(Tensor gate, Tensor up) -> Tensor", lambda gate, _: gate.new_empty(gate.shape)),
    ("rotary", "(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor, Tensor)", _empty_pair),
):
    _library.define(_name + _schema)
    _library.impl(_name, _on_gpu(_name), "CUDA")
    torch.library.register_fake(f"strop::{_name}", _fake, lib=_library)
