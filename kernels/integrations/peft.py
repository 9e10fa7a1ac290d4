"""LoRA's linear layers with one backward: y = x W^T + b + s (x A^T) B^T.

PEFT's forward leaves the scaling and both sums to operators of their own. Here GEMMs do them: three in the forward, the
last one adding to the first one's result, and at most five in the backward, where PEFT's takes five and two passes over
[tokens, features] tensors. Only x and x A^T are saved.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .transformers import _set_forward


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        low = rows @ a.mT
        out = F.linear(rows, weight, bias).addmm_(low, b.mT, alpha=scale)
        ctx.save_for_backward(x, low, weight, a, b)
        ctx.scale = scale
        return out.view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor):
        x, low, weight, a, b = ctx.saved_tensors
        needs_x, _, needs_bias, needs_a, needs_b, _ = ctx.needs_input_grad
        grad = grad_out.reshape(-1, grad_out.shape[-1])
        grad_x = grad_bias = grad_a = grad_b = None
        if needs_b:
            grad_b = _scaled(grad.mT, low, ctx.scale)
        if needs_a or needs_x:
            grad_low = _scaled(grad, b, ctx.scale)
        if needs_a:
            grad_a = grad_low.mT @ x.reshape(-1, x.shape[-1])
        if needs_x:
            grad_x = (grad @ weight).addmm_(grad_low, a).view(x.shape)
        if needs_bias:
            grad_bias = grad.sum(0)
        return grad_x, None, grad_bias, grad_a, grad_b, None


def _scaled(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """scale * x @ y in one GEMM."""
    return torch.addmm(x.new_empty(()), x, y, beta=0, alpha=scale)


def fuse_adapters(model: nn.Module) -> int:
    """Run PEFT's LoRA layers fused, in place; values stay the same to rounding. Returns how many changed.

    These are plain LoRA of a frozen nn.Linear in one dtype, with one adapter. PEFT's own forward runs under autocast,
    with dropout in training, while adapters are disabled or merged, and where DeepSpeed's stage 3 cuts the weights: it
    gathers those of modules that are called.
    """
    from peft.tuners.lora import Linear

    found = [module for module in model.modules() if type(module) is Linear and _fits(module)]
    for module in found:
        _set_forward(module, _lora_forward(Linear.forward))
    return len(found)


def _fits(module: nn.Module) -> bool:
    base, adapters = module.base_layer, list(module.lora_A)
    if type(base) is not nn.Linear or base.weight.requires_grad or len(adapters) != 1 or module.lora_variant:
        return False
    (name,) = adapters
    a, b = module.lora_A[name], module.lora_B[name]
    plain = type(a) is type(b) is nn.Linear and a.bias is None and b.bias is None and not module.fan_in_fan_out
    return plain and a.weight.dtype == b.weight.dtype == base.weight.dtype


@functools.cache
def _lora_forward(plain: Callable) -> Callable:
    """PEFT's forward `plain`, fused where nothing asks for more."""

    def forward(module: nn.Module, x: Tensor, *arguments, **options) -> Tensor:
        base, active = module.base_layer, module.active_adapters
        fused = not (arguments or options or module.disable_adapters or module.merged)
        fused = fused and len(active) == len(module.lora_A) == 1 and active[0] in module.lora_A
        fused = fused and x.dtype == base.weight.dtype and not hasattr(base.weight, "ds_id")
        if not fused or torch.is_autocast_enabled(x.device.type) or _drops(module.lora_dropout[active[0]]):
            return plain(module, x, *arguments, **options)
        a, b = module.lora_A[active[0]].weight, module.lora_B[active[0]].weight
        return _LoraLinear.apply(x, base.weight, base.bias, a, b, module.scaling[active[0]])

    return forward


def _drops(dropout: nn.Module) -> bool:
    return not isinstance(dropout, nn.Identity) and dropout.training and dropout.p > 0
