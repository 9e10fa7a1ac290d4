"""fp32 master weights, their gradients, and AdamW on them."""

import weakref
from collections.abc import Callable

import torch
from torch import nn

from strop.kernels import optimizer
from strop.trainer.config import Train
from strop.trainer.run.world import World
from strop.trainer.training.buckets import Buckets


class Masters:
    """fp32 parameters are their own masters; others have an fp32 copy that the optimizer updates.

    Gradients of a single backward pass are used as autograd left them; several backward passes or ranks accumulate into
    fp32 sums. Checkpoints read and restore `masters` and `optimizer.state` (step, exp_avg and exp_avg_sq of each
    master).
    """

    def __init__(self, params: list[nn.Parameter], section: Train, world: World, buckets: Buckets | None = None,
                 norm_of_all: Callable[[torch.Tensor], torch.Tensor] | None = None):
        """buckets: hold the sums, and sum them over the ranks. norm_of_all: from the norm of these gradients to that of
        all, where other ranks have other parameters."""
        self.params, self.section, self.world = params, section, world
        self.masters = [p if p.dtype == torch.float32 else nn.Parameter(p.detach().float()) for p in params]
        self.optimizer = torch.optim.AdamW(self.masters, lr=section.lr, betas=section.betas, eps=section.eps,
                                           weight_decay=section.weight_decay, fused=True)
        self.in_one_pass = optimizer.available(self.masters)
        self.buckets, self.norm_of_all = buckets, norm_of_all
        # allocated when first needed; None where autograd accumulates in fp32
        self.sums: list[torch.Tensor | None] | None = buckets.sums if buckets else None
        self.filled = [False] * len(params)  # whether the sum holds gradients of this step
        if buckets:
            arrived = weakref.WeakMethod(self._arrived)  # Python does not see the cycle that a hook makes, nor frees it
            for i, param in enumerate(params):
                param.register_post_accumulate_grad_hook(lambda _, i=i: arrived()(i))

    @property
    def folded(self) -> bool:
        return any(self.filled)

    @torch.no_grad()
    def fold(self) -> None:
        """Adds the parameters' gradients to the fp32 sums; the first call of a step overwrites the sums. Call it before
        another backward pass would accumulate in bf16."""
        if self.sums is None:
            self.sums = [None if m is p else torch.zeros_like(m)
                         for p, m in zip(self.params, self.masters, strict=True)]
        for i in range(len(self.params)):
            self._fold(i)

    def _fold(self, i: int) -> None:
        param, total = self.params[i], self.sums[i]
        if total is None:
            return
        if param.grad is not None:
            (total.add_ if self.filled[i] else total.copy_)(param.grad)
            param.grad = None
        elif not self.filled[i]:
            total.zero_()
        self.filled[i] = True

    @torch.no_grad()
    def _arrived(self, i: int) -> None:
        """The gradient of parameter i is complete."""
        if self.buckets.is_last:
            self._fold(i)
            self.buckets.complete(i)

    def discard(self) -> None:
        """Forgets the gradients of this step."""
        for param in self.params:
            param.grad = None
        self.filled = [False] * len(self.params)

    @torch.no_grad()
    def gradients(self) -> list[torch.Tensor]:
        """This rank's gradients of the step, in the order of `params`; zeros for parameters without a gradient."""
        if self.folded or self.buckets or not self.in_one_pass:
            self.fold()
        grads = []
        for param, total in zip(self.params, self.sums if self.sums and self.folded else [None] * len(self.params),
                                strict=True):
            if total is None and param.grad is None:
                param.grad = torch.zeros_like(param)
            grads.append(param.grad if total is None else total)
        return grads

    @torch.no_grad()
    def step(self, number: int, lr: float) -> torch.Tensor:
        """Sums gradients over the ranks, clips, updates masters and parameters. number: the step, from 1. Returns the
        unclipped gradient norm."""
        grads = self.gradients()
        if self.buckets:
            self.buckets.finish()
        else:
            self.world.sum_(grads)
        norm = (self._update_in_one_pass if self.in_one_pass else self._update)(grads, number, lr)
        for param, master in zip(self.params, self.masters, strict=True):
            param.grad = master.grad = None
        self.filled = [False] * len(self.params)
        return norm

    def _update_in_one_pass(self, grads: list[torch.Tensor], number: int, lr: float) -> torch.Tensor:
        norm = self._norm(optimizer.total_norm(grads))
        factor = torch.ones_like(norm)
        if self.section.grad_clip:
            factor = (self.section.grad_clip / (norm + 1e-6)).clamp(max=1.0)
        options = {"lr": lr, "betas": self.section.betas, "eps": self.section.eps,
                   "weight_decay": self.section.weight_decay, "step": number}
        for param, master, grad in zip(self.params, self.masters, grads, strict=True):
            state = self.optimizer.state[master]
            if not state:
                state |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(master),
                          "exp_avg_sq": torch.zeros_like(master)}
            state["step"].fill_(number)
            optimizer.adamw_(master, grad, state["exp_avg"], state["exp_avg_sq"], None if master is param else param,
                             factor, **options)
        return norm

    def _update(self, grads: list[torch.Tensor], number: int, lr: float) -> torch.Tensor:
        for master, grad in zip(self.masters, grads, strict=True):
            master.grad = grad
        norm = self._norm(nn.utils.get_total_norm(grads))
        if self.section.grad_clip:
            nn.utils.clip_grads_with_norm_(self.masters, self.section.grad_clip, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.copy(self.masters)
        return norm

    def _norm(self, norm: torch.Tensor) -> torch.Tensor:
        return self.norm_of_all(norm) if self.norm_of_all else norm

    @torch.no_grad()
    def copy(self, values: list[torch.Tensor]) -> None:
        """Sets the parameters to `values`, one tensor each."""
        for param, value in zip(self.params, values, strict=True):
            if param is not value:
                param.copy_(value)

    def set_moments(self, moments: list[dict[str, torch.Tensor]], step: int) -> None:
        """Sets the optimizer's state of each master to its exp_avg and exp_avg_sq after `step` steps."""
        for master, found in zip(self.masters, moments, strict=True):
            self.optimizer.state[master] = {
                "step": torch.tensor(float(step), device=master.device), **found} if found else {}
