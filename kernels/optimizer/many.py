"""Many tensors at once: on a GPU a launch for all of one form, elsewhere one tensor after the other.

A launch takes the host tens of microseconds, so one for each tensor of a model takes longer than the device needs for
what it does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from .._triton import HAS_TRITON
from .adamw import adamw_
from .formats import State, key_of, mix


def on_gpu(x: Tensor) -> bool:
    """Whether the kernels for many tensors run: they need addresses, which fake tensors do not have."""
    return HAS_TRITON and x.is_cuda and not isinstance(x, FakeTensor)


class AdamW:
    """`adamw_` on many parameters, the same bits for each. Holds on to the states' tensors; a new one is needed when
    others take their place."""

    def __init__(self, states: Sequence[State]):
        self.states, self.groups, self.dtypes = states, None, None

    def step(self, grads: Sequence[Tensor], factor: Tensor, *, lr: float, betas: tuple[float, float], eps: float,
             weight_decay: float, step: int) -> None:
        """One step of all, with grads in their order. The key of a parameter is key_of(step, number)."""
        if not (grads and on_gpu(grads[0])):
            for state, grad in zip(self.states, grads, strict=True):
                adamw_(state.master, grad, state.exp_avg, state.exp_avg_sq, state.weight, factor, scales=state.scales,
                       key=key_of(step, state.number), first=state.first, lr=lr, betas=betas, eps=eps,
                       weight_decay=weight_decay, step=step)
            return
        from .._triton import adamw

        dtypes = [grad.dtype for grad in grads]
        if dtypes != self.dtypes:
            self.dtypes, self.groups = dtypes, adamw.groups_of(self.states, dtypes)
        numbers, seed = list(adamw.numbers_of(lr, *betas, eps, weight_decay, step)), mix(0, step)
        for group in self.groups:
            group.step(grads, factor, numbers, seed)


class Sums:
    """fp32 sums of gradients of another dtype."""

    def __init__(self, sums: Sequence[Tensor]):
        self.sums, self.table = sums, None
        self.in_one_launch = bool(sums) and all(on_gpu(x) and x.is_contiguous() for x in sums)

    def add(self, grads: Sequence[Tensor | None], overwrite: bool) -> None:
        """Adds the gradients to the sums, or sets the sums to them; None is zero."""
        if not self.in_one_launch or any(grad is not None and grad.dtype != torch.bfloat16 for grad in grads):
            for total, grad in zip(self.sums, grads, strict=True):
                if grad is not None:
                    (total.copy_ if overwrite else total.add_)(grad)
                elif overwrite:
                    total.zero_()
            return
        from .._triton import sums

        if self.table is None:
            self.table = sums.table_of(self.sums)
        sums.add(self.table, self.sums, grads, overwrite)
