"""fp32 masters of the weights that a model computes with, their gradients, and AdamW on them."""

import torch
from torch import nn

from strop.kernels import optimizer
from strop.trainer.config import Train
from strop.trainer.run.world import World


class Masters:
    """fp32 parameters are their own masters; of others there is a copy, which the optimizer moves.

    Gradients are used as autograd left them, but where several backward passes or ranks add up, fp32 sums of them.
    `masters`, `params` and `optimizer.state` (step, exp_avg and exp_avg_sq of each master) are for reading and for
    resuming.
    """

    def __init__(self, params: list[nn.Parameter], section: Train, world: World):
        self.params, self.section, self.world = params, section, world
        self.masters = [p if p.dtype == torch.float32 else nn.Parameter(p.detach().float()) for p in params]
        self.optimizer = torch.optim.AdamW(self.masters, lr=section.lr, betas=section.betas, eps=section.eps,
                                           weight_decay=section.weight_decay, fused=True)
        self.in_one_pass = optimizer.available(self.masters)
        self.sums: list[torch.Tensor | None] | None = None  # made when first needed, then kept
        self.folded = False  # whether the sums hold anything of this step

    @torch.no_grad()
    def fold(self) -> None:
        """Adds the parameters' gradients to the fp32 sums; a step's first ones replace the last step's. To be called
        before a further backward pass would add to gradients in fewer bits."""
        if self.sums is None:
            self.sums = [None if m is p else torch.zeros_like(m)
                         for p, m in zip(self.params, self.masters, strict=True)]
        for param, total in zip(self.params, self.sums, strict=True):
            if total is None:  # autograd adds to these in fp32 by itself
                continue
            if param.grad is not None:
                (total.add_ if self.folded else total.copy_)(param.grad)
                param.grad = None
            elif not self.folded:
                total.zero_()
        self.folded = True

    @torch.no_grad()
    def gradients(self) -> list[torch.Tensor]:
        """This rank's gradients of the step, in the order of `params`; zeros where there are none."""
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
        """Adds gradients over the ranks, clips, moves masters and parameters. number: of the step, from 1. Returns the
        norm of the gradients, unclipped."""
        grads = self.gradients()
        self.world.sum_(grads)
        norm = (self._move_in_one_pass if self.in_one_pass else self._move)(grads, number, lr)
        for param, master in zip(self.params, self.masters, strict=True):
            param.grad = master.grad = None
        self.folded = False
        return norm

    def _move_in_one_pass(self, grads: list[torch.Tensor], number: int, lr: float) -> torch.Tensor:
        norm, factor = optimizer.total_norm(grads), torch.ones(())
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

    def _move(self, grads: list[torch.Tensor], number: int, lr: float) -> torch.Tensor:
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
        """Gives the parameters these values, one tensor each."""
        for param, value in zip(self.params, values, strict=True):
            if param is not value:
                param.copy_(value)
