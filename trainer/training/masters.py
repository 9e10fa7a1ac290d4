"""fp32 master weights, their gradients, and AdamW on them."""

import torch
from torch import nn

from strop.kernels import optimizer
from strop.trainer.config import Train
from strop.trainer.run.world import World


class Masters:
    """fp32 parameters are their own masters; others have an fp32 copy that the optimizer updates.

    Gradients are used as autograd left them; several backward passes or ranks accumulate into fp32 sums. Checkpoints
    read and restore `masters` and `optimizer.state` (step, exp_avg and exp_avg_sq of each master).
    """

    def __init__(self, params: list[nn.Parameter], section: Train, world: World):
        self.params, self.section, self.world = params, section, world
        self.masters = [p if p.dtype == torch.float32 else nn.Parameter(p.detach().float()) for p in params]
        self.optimizer = torch.optim.AdamW(self.masters, lr=section.lr, betas=section.betas, eps=section.eps,
                                           weight_decay=section.weight_decay, fused=True)
        self.in_one_pass = optimizer.available(self.masters)
        self.sums: list[torch.Tensor | None] | None = None  # allocated when first needed
        self.folded = False  # whether the sums hold gradients of this step

    @torch.no_grad()
    def fold(self) -> None:
        """Adds the parameters' gradients to the fp32 sums; the first call of a step overwrites the sums. Call it before
        another backward pass would accumulate in bf16."""
        if self.sums is None:
            self.sums = [None if m is p else torch.zeros_like(m)
                         for p, m in zip(self.params, self.masters, strict=True)]
        for param, total in zip(self.params, self.sums, strict=True):
            if total is None:  # an fp32 parameter: autograd accumulates in fp32
                continue
            if param.grad is not None:
                (total.add_ if self.folded else total.copy_)(param.grad)
                param.grad = None
            elif not self.folded:
                total.zero_()
        self.folded = True

    def discard(self) -> None:
        """Forgets the gradients of this step."""
        for param in self.params:
            param.grad = None
        self.folded = False

    @torch.no_grad()
    def gradients(self) -> list[torch.Tensor]:
        """This rank's gradients of the step, in the order of `params`; zeros for parameters without a gradient."""
        if self.folded or self.world.size > 1 or not self.in_one_pass:
            self.fold()
        grads = []
        for param, total in zip(self.params, self.sums if self.folded else [None] * len(self.params), strict=True):
            if total is None and param.grad is None:
                param.grad = torch.zeros_like(param)
            grads.append(param.grad if total is None else total)
        return grads

    @torch.no_grad()
    def step(self, number: int, lr: float) -> torch.Tensor:
        """Sums gradients over the ranks, clips, updates masters and parameters. number: the step, from 1. Returns the
        unclipped gradient norm."""
        grads = self.gradients()
        self.world.sum_(grads)
        norm = (self._update_in_one_pass if self.in_one_pass else self._update)(grads, number, lr)
        for param, master in zip(self.params, self.masters, strict=True):
            param.grad = master.grad = None
        self.folded = False
        return norm

    def _update_in_one_pass(self, grads: list[torch.Tensor], number: int, lr: float) -> torch.Tensor:
        norm = optimizer.total_norm(grads)
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
        norm = nn.utils.get_total_norm(grads)
        if self.section.grad_clip:
            nn.utils.clip_grads_with_norm_(self.masters, self.section.grad_clip, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.copy(self.masters)
        return norm

    @torch.no_grad()
    def copy(self, values: list[torch.Tensor]) -> None:
        """Sets the parameters to `values`, one tensor each."""
        for param, value in zip(self.params, values, strict=True):
            if param is not value:
                param.copy_(value)
