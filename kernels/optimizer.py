"""AdamW for the CPU (csrc/cpu.cpp): one pass over memory for the gradient norm and one for the update.

The update reads a gradient in the dtype autograd left it in and also writes the bf16 weight that the model computes
with. On a GPU, or if csrc/cpu.cpp was not built, use PyTorch's fused AdamW.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _cpu

# Elements per partial sum of squares in csrc/cpu.cpp.
_BLOCK = 1 << 16


def available(masters: Sequence[Tensor]) -> bool:
    """Whether csrc/cpu.cpp was built and all masters are fp32, contiguous and on the CPU."""
    return all(m.dtype == torch.float32 and m.is_contiguous() and _cpu.takes(m) for m in masters)


def total_norm(grads: Sequence[Tensor]) -> Tensor:
    """The 2-norm over all gradients, each bf16 or fp32, as an fp32 scalar."""
    blocks = [-(-grad.numel() // _BLOCK) for grad in grads]
    sums = torch.empty(sum(blocks), dtype=torch.float64)
    for grad, part in zip(grads, sums.split(blocks), strict=True):
        torch.ops.strop.cpu_square_sums(grad.contiguous(), part)
    return sums.sum().sqrt().float()


def adamw_(
    master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, weight: Tensor | None, factor: Tensor, *,
    lr: float, betas: tuple[float, float], eps: float, weight_decay: float, step: int,
) -> None:
    """One AdamW step (arXiv 1711.05101) in place, with torch.optim.AdamW's arithmetic.

    master, exp_avg, exp_avg_sq: fp32 of one shape. grad: bf16 or fp32, first multiplied by `factor`, an fp32 scalar
    (gradient clipping). weight: bf16, set to the new master; None to skip. step counts from 1.
    """
    none = master.new_empty(0, dtype=torch.bfloat16)
    moments = (exp_avg, exp_avg_sq)
    options = (lr, *betas, eps, weight_decay, step)
    torch.ops.strop.cpu_adamw(
        master, grad.contiguous(), *moments, none if weight is None else weight, factor.reshape(1), *options
    )
