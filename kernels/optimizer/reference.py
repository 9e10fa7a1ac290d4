"""AdamW on every form of its state in plain PyTorch: what the tests compare with, and what runs without a kernel."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import formats

PART = 1 << 16  # elements at a time: temporaries stay in the cache


def adamw_(
    master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, weight: Tensor | None, factor: Tensor,
    scales: tuple[Tensor, Tensor] | None, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
    step: int, key: int, first: int,
) -> None:
    """strop.kernels.optimizer.adamw_."""
    tensors = [x if x is None else x.flatten(1) if x.dim() > 1 else x[:, None]
               for x in (master, grad, exp_avg, exp_avg_sq, weight)]
    rows, width = tensors[0].shape
    each = max(1, PART // width)
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    for start in range(0, rows, each):
        master, grad, exp_avg, exp_avg_sq, weight = (x if x is None else x[start:start + each] for x in tensors)
        grad = grad.float() * factor
        mean, square = exp_avg.float(), exp_avg_sq.float()
        if scales is not None:
            scale, scale_sq = (x[start:start + each] for x in scales)
            mean, square = formats.dequantize(exp_avg, scale), formats.dequantize(exp_avg_sq, scale_sq)
        is_split = master.dtype == torch.int16
        value = formats.join(weight, master) if is_split else master
        mean = mean + (grad - mean) * (1 - beta1)
        square = square * beta2 + grad * grad * (1 - beta2)
        value = value * (1 - lr * weight_decay) - lr / correction1 * mean / (
            square.sqrt() / math.sqrt(correction2) + eps)
        if scales is not None:
            for found, codes, scale_, signed in ((mean, exp_avg, scale, True), (square, exp_avg_sq, scale_sq, False)):
                new = formats.quantize(found, signed)
                codes.copy_(new[0])
                scale_.copy_(new[1])
        elif exp_avg.dtype == torch.bfloat16:
            draw = formats.noise(key, first + start * width, grad.numel(), grad.device).view(grad.shape)
            exp_avg.copy_(formats.round_stochastically(mean, draw & 0xFFFF))
            exp_avg_sq.copy_(formats.round_stochastically(square, draw >> 16))
        else:
            exp_avg.copy_(mean)
            exp_avg_sq.copy_(square)
        if is_split:
            new = formats.split(value)
            weight.copy_(new[0])
            master.copy_(new[1])
        else:
            master.copy_(value)
            if weight is not None:
                weight.copy_(value)
