"""AdamW in one pass over memory: 30 bytes a parameter with a bf16 gradient and weight, 32 with an fp32 gradient."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from . import launch

BLOCK, WARPS = 2048, 4


@triton.jit
def adamw_kernel(
    master_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, weight_ptr, factor_ptr, count, keep, step_size, rest1, beta2,
    rest2, root2, eps, WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32) * tl.load(factor_ptr)
    exp_avg = tl.load(exp_avg_ptr + at, mask=inside, other=0.0)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + at, mask=inside, other=0.0)
    master = tl.load(master_ptr + at, mask=inside, other=0.0)
    exp_avg += (grad - exp_avg) * rest1
    exp_avg_sq = exp_avg_sq * beta2 + grad * grad * rest2
    master = master * keep - step_size * exp_avg / (tl.sqrt_rn(exp_avg_sq) / root2 + eps)
    tl.store(exp_avg_ptr + at, exp_avg, mask=inside)
    tl.store(exp_avg_sq_ptr + at, exp_avg_sq, mask=inside)
    tl.store(master_ptr + at, master, mask=inside)
    if WEIGHT:
        tl.store(weight_ptr + at, master.to(weight_ptr.dtype.element_ty), mask=inside)


def adamw_(
    master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, weight: Tensor | None, factor: Tensor,
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int,
) -> None:
    """strop.kernels.optimizer.adamw_ on contiguous tensors of one size; factor stays on the device."""
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    numbers = (1 - lr * weight_decay, lr / correction1, 1 - beta1, beta2, 1 - beta2, math.sqrt(correction2), eps)
    tensors = (master, grad, exp_avg, exp_avg_sq, master if weight is None else weight, factor)
    count = master.numel()
    options = {"WEIGHT": weight is not None, "BLOCK": BLOCK, "num_warps": WARPS}
    launch(adamw_kernel, (triton.cdiv(count, BLOCK),), *tensors, count, *numbers, **options)
