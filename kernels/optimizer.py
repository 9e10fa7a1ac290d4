"""AdamW for the CPU: the gradients' norm, and then the update, in one pass over memory each, by csrc/cpu.cpp.

An update reads a gradient as autograd left it and writes the weight that the model computes with, so that neither takes
a pass of its own. On a GPU, and where csrc/cpu.cpp was not built, PyTorch's fused AdamW is to be used.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _cpu

# Elements whose squares csrc/cpu.cpp sums by themselves.
_BLOCK = 1 << 16


def available(masters: Sequence[Tensor]) -> bool:
    """Whether csrc/cpu.cpp was built and these, all of them fp32, are on the CPU and contiguous."""
    return all(m.dtype == torch.float32 and m.is_contiguous() and _cpu.takes(m) for m in masters)


def total_norm(grads: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, bf16 or fp32, as an fp32 scalar."""
    blocks = [-(-grad.numel() // _BLOCK) for grad in grads]
    sums = torch.empty(sum(blocks), dtype=torch.float64)
    for grad, part in zip(grads, sums.split(blocks), strict=True):
        torch.ops.strop.cpu_square_sums(grad.contiguous(), part)
    return sums.sum().sqrt().float()


def adamw_(
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    weight: Tensor | None,
    factor: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """One step of AdamW, arXiv 1711.05101, as torch.optim.AdamW takes it, in place.

    master, exp_avg, exp_avg_sq: fp32 of one shape. grad: bf16 or fp32, which `factor`, an fp32 scalar, multiplies first
    (clipping). weight: bf16, receives the new master; None for none. step counts from 1.
    """
    none = master.new_empty(0, dtype=torch.bfloat16)
    moments = (exp_avg, exp_avg_sq)
    options = (lr, *betas, eps, weight_decay, step)
    torch.ops.strop.cpu_adamw(
        master, grad.contiguous(), *moments, none if weight is None else weight, factor.reshape(1), *options
    )
