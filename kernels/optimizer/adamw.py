"""AdamW in one pass over memory for the gradient norm and one for the update: C++ on the CPU, Triton on a GPU.

The update reads a gradient in the dtype autograd left it in and also writes the bf16 weight that the model computes
with. Elsewhere use PyTorch's fused AdamW; for the cheaper forms of its state `adamw_` then runs in plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _cpu
from .._triton import HAS_TRITON
from . import reference

# Elements per partial sum of squares in csrc/cpu_adamw.cpp.
_BLOCK = 1 << 16


def available(masters: Sequence[Tensor]) -> bool:
    """Whether all masters are fp32, contiguous and on one kind of device: the CPU, if csrc/ was built for it, or a
    GPU, if Triton is installed."""
    if not all(m.dtype == torch.float32 and m.is_contiguous() for m in masters):
        return False
    return all(_cpu.takes(m) for m in masters) or (HAS_TRITON and all(m.is_cuda for m in masters))


def total_norm(grads: Sequence[Tensor]) -> Tensor:
    """The 2-norm over all gradients, each bf16 or fp32, as an fp32 scalar on their device."""
    if grads[0].device.type != "cpu" or not _cpu.load():
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(grads), dtype=torch.float32)))
    blocks = [-(-grad.numel() // _BLOCK) for grad in grads]
    sums = torch.empty(sum(blocks), dtype=torch.float64)
    for grad, part in zip(grads, sums.split(blocks), strict=True):
        torch.ops.strop.cpu_square_sums(grad.contiguous(), part)
    return sums.sum().sqrt().float()


def adamw_(
    master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, weight: Tensor | None, factor: Tensor, *,
    lr: float, betas: tuple[float, float], eps: float, weight_decay: float, step: int,
    scales: tuple[Tensor, Tensor] | None = None, key: int = 0, first: int = 0,
) -> None:
    """One AdamW step (arXiv 1711.05101) in place, with torch.optim.AdamW's arithmetic in fp32.

    master: fp32; or int16, the low halves of the masters whose high halves are `weight` (`split`). exp_avg, exp_avg_sq:
    fp32; or bf16, rounded stochastically; or int8 and uint8 codes with their `scales`, fp32 (`quantize`). grad: bf16 or
    fp32, first multiplied by `factor`, an fp32 scalar on the same device (gradient clipping). weight: bf16, set to the
    new master; None to skip. All but grad are contiguous and, scales aside, of one shape. step counts from 1.

    key: of the random numbers that round bf16 moments, from 0 to 2^31 - 1, another one for every tensor and step.
    first: index of the first element in the whole tensor, where this is a slice of it.
    """
    options = (lr, *betas, eps, weight_decay, step)
    if not grad.numel():
        return
    if HAS_TRITON and (grad.is_cuda or grad.is_meta):
        _adamw(master, grad.contiguous(), exp_avg, exp_avg_sq, weight, factor, *(scales or (None, None)), *options, key,
               first)
    elif _cpu.takes(grad):
        none = factor.new_empty(0)
        torch.ops.strop.cpu_adamw(master, grad.contiguous(), exp_avg, exp_avg_sq, none if weight is None else weight,
                                  factor.reshape(1), *(scales or (none, none)), *options, key, first)
    else:
        reference.adamw_(master, grad, exp_avg, exp_avg_sq, weight, factor, scales, *options, key, first)


def _on_gpu(master, grad, exp_avg, exp_avg_sq, weight, factor, scale, scale_sq, *options) -> None:
    from .._triton import adamw

    scales = None if scale is None else (scale, scale_sq)
    adamw.adamw_(master, grad, exp_avg, exp_avg_sq, weight, factor, scales, *options)


_library = torch.library.Library("strop", "FRAGMENT")
_library.define(
    "adamw(Tensor(a!) master, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!)? weight, "
    "Tensor factor, Tensor(e!)? scale, Tensor(f!)? scale_sq, float lr, float beta1, float beta2, float eps, "
    "float weight_decay, int step, int key, int first) -> ()"
)
_library.impl("adamw", _on_gpu, "CUDA")
torch.library.register_fake("strop::adamw", lambda *_: None, lib=_library)
_adamw = torch.ops.strop.adamw.default


def _many_on_gpu(*arguments) -> None:
    from .._triton import adamw

    adamw.adamw_many(*arguments)


# What it updates is behind the addresses in `entries`. An operator, so that a profile names its kernel.
_library.define(
    "adamw_many(Tensor(a!) entries, Tensor owner, Tensor factor, float[] numbers, int seed, int[] form, bool aligned) "
    "-> ()"
)
_library.impl("adamw_many", _many_on_gpu, "CompositeExplicitAutograd")
