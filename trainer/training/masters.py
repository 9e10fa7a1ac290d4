"""fp32 master weights, their gradients, and AdamW or Muon on them."""

import weakref
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from strop.kernels import optimizer
from strop.trainer.config import Train
from strop.trainer.run.world import World
from strop.trainer.training.buckets import Buckets

MOMENTUM = 0.95  # of Muon, as in Keller Jordan's post and arXiv 2502.16982


class Joined(Sequence):
    """Masters that are kept as bf16 weights and low halves: each is put together, a copy, where it is asked for."""

    def __init__(self, weights: list[torch.Tensor], lows: list[torch.Tensor]):
        self.weights, self.lows = weights, lows

    def __len__(self) -> int:
        return len(self.lows)

    def __getitem__(self, i: int) -> torch.Tensor:
        return optimizer.join(self.weights[i].detach(), self.lows[i])


class Masters:
    """fp32 parameters are their own masters; others have an fp32 copy that the optimizer updates, or with
    section.masters=split its low half, of which the parameter is the other one.

    Gradients of a single backward pass are used as autograd left them; several backward passes or ranks accumulate into
    fp32 sums. Checkpoints read and restore `masters` and `moments`.
    """

    def __init__(self, params: list[nn.Parameter], section: Train, world: World, buckets: Buckets | None = None,
                 norm_of_all: Callable[[torch.Tensor], torch.Tensor] | None = None, starts: Sequence[int] | None = None,
                 matrices: Sequence[bool] | None = None):
        """buckets: hold the sums, and sum them over the ranks. norm_of_all: from the norm of these gradients to that of
        all, where other ranks have other parameters. starts: of parameters that are slices, the index of their first
        element in the whole. matrices: which parameters Muon trains, if section.optimizer asks for it."""
        self.params, self.section, self.world = params, section, world
        self.starts = starts or [0] * len(params)
        self.is_split = section.masters == "split"
        is_compact = self.is_split or section.moments != "float32"
        for param in params if is_compact else ():
            param.data = param.data.contiguous()  # as all kernels take them
        if self.is_split:
            self.lows = [torch.zeros_like(p, dtype=torch.int16) for p in params]
            self.masters = Joined(params, self.lows)
        else:
            self.masters = [p if p.dtype == torch.float32 else nn.Parameter(p.detach().float()) for p in params]
        self.state: list[dict[str, torch.Tensor]] = [{} for _ in params]
        self.muon: dict[int, torch.optim.Muon] = {}
        if section.optimizer == "muon":
            self.muon = {i: self._muon_of(i) for i, is_matrix in enumerate(matrices) if is_matrix}
        self.in_one_pass = is_compact or optimizer.available(self.masters)
        self.fused = None
        self.rest = [i for i in range(len(params)) if i not in self.muon]  # what AdamW updates
        if not self.in_one_pass:
            self.fused = torch.optim.AdamW([self.masters[i] for i in self.rest], lr=section.lr, betas=section.betas,
                                           eps=section.eps, weight_decay=section.weight_decay, fused=True)
            for i in self.rest:
                self.fused.state[self.masters[i]] = self.state[i]
        self.adamw: optimizer.AdamW | None = None  # made with the moments
        self.buckets, self.norm_of_all = buckets, norm_of_all
        # allocated when first needed; None where autograd accumulates in fp32
        self.sums: list[torch.Tensor | None] | None = buckets.sums if buckets else None
        self.adder: optimizer.Sums | None = None
        self.filled = [False] * len(params)  # whether the sum holds gradients of this step
        if buckets:
            arrived = weakref.WeakMethod(self._arrived)  # Python does not see the cycle that a hook makes, nor frees it
            for i, param in enumerate(params):
                param.register_post_accumulate_grad_hook(lambda _, i=i: arrived()(i))

    def _muon_of(self, i: int) -> torch.optim.Muon:
        """PyTorch's Muon on one matrix. A split master is there during its update only."""
        holder = nn.Parameter(torch.empty(0, 0, device=self.params[i].device)) if self.is_split else self.masters[i]
        muon = torch.optim.Muon([holder], lr=self.section.lr, weight_decay=self.section.weight_decay, momentum=MOMENTUM,
                                nesterov=True, adjust_lr_fn="match_rms_adamw")
        muon.state[holder] = self.state[i]
        return muon

    @property
    def folded(self) -> bool:
        return any(self.filled)

    @torch.no_grad()
    def fold(self) -> None:
        """Adds the parameters' gradients to the fp32 sums; the first call of a step overwrites the sums. Call it before
        another backward pass would accumulate in bf16."""
        if self.sums is None:
            self.sums = [None if p.dtype == torch.float32 else torch.zeros_like(p, dtype=torch.float32)
                         for p in self.params]
        if self.buckets:  # some are there already
            for i in range(len(self.params)):
                self._fold(i)
            return
        folded = [i for i, total in enumerate(self.sums) if total is not None]
        if self.adder is None:
            self.adder = optimizer.Sums([self.sums[i] for i in folded])
        self.adder.add([self.params[i].grad for i in folded], overwrite=not self.folded)
        for i in folded:
            self.params[i].grad, self.filled[i] = None, True

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
        norm = optimizer.total_norm(grads)
        norm = self.norm_of_all(norm) if self.norm_of_all else norm
        factor = torch.ones_like(norm)
        if self.section.grad_clip:
            factor = (self.section.grad_clip / (norm + 1e-6)).clamp(max=1.0)
        for i, muon in self.muon.items():
            self._update_matrix(i, muon, grads[i], factor, lr)
        if self.in_one_pass:
            self.adamw = self.adamw or optimizer.AdamW([self._state_of(i) for i in self.rest])
            self.adamw.step([grads[i] for i in self.rest], factor, lr=lr, betas=self.section.betas,
                            eps=self.section.eps, weight_decay=self.section.weight_decay, step=number)
        else:
            self._update_fused(grads, factor, lr)
        for param in self.params:
            param.grad = None
        self.filled = [False] * len(self.params)
        return norm

    def _state_of(self, i: int) -> optimizer.State:
        """Parameter i as AdamW takes it, with new moments if it has none."""
        param, state = self.params[i], self.state[i]
        if not state:
            state |= optimizer.new_moments(param, self.section.moments)
        mean, square, *scales = (state[name] for name in optimizer.STATE if name in state)
        if self.is_split:
            master, weight = self.lows[i], param
        else:
            master = self.masters[i]
            weight = None if master is param else param
        return optimizer.State(master, mean, square, weight, tuple(scales) or None, self.starts[i], i)

    def _update_fused(self, grads: list[torch.Tensor], factor: torch.Tensor, lr: float) -> None:
        rest = self.rest
        if self.section.grad_clip:
            torch._foreach_mul_([grads[i] for i in rest], factor)
        for i in rest:
            self.masters[i].grad = grads[i]
        for group in self.fused.param_groups:
            group["lr"] = lr
        self.fused.step()
        for i in rest:
            self.masters[i].grad = None
            if self.masters[i] is not self.params[i]:
                self.params[i].copy_(self.masters[i])

    def _update_matrix(self, i: int, muon: torch.optim.Muon, grad: torch.Tensor, factor: torch.Tensor,
                       lr: float) -> None:
        (group,), param = muon.param_groups, self.params[i]
        (holder,) = group["params"]
        if self.is_split:
            holder.data = self.masters[i]
        holder.grad = grad.float() * factor
        group["lr"] = lr
        muon.step()
        holder.grad = None
        if self.is_split:
            self._store(i, holder)
            holder.data = holder.new_empty(0, 0)
        elif holder is not param:
            param.copy_(holder)

    def _store(self, i: int, value: torch.Tensor) -> None:
        """Sets a master and its parameter."""
        if self.is_split:
            for target, half in zip((self.params[i], self.lows[i]), optimizer.split(value), strict=True):
                target.copy_(half)
            return
        self.masters[i].copy_(value)
        if self.masters[i] is not self.params[i]:
            self.params[i].copy_(value)

    @torch.no_grad()
    def set(self, values: Iterable[torch.Tensor]) -> None:
        """Sets masters and parameters to `values`, fp32, one tensor each."""
        for i, value in enumerate(values):
            self._store(i, value)

    def moments(self) -> list[dict[str, torch.Tensor]]:
        """The optimizer's state of each master: what `set_moments` restores, by optimizer.STATE or momentum_buffer."""
        return [{name: value for name, value in state.items() if name != "step"} for state in self.state]

    def set_moments(self, moments: list[dict[str, torch.Tensor]], step: int) -> None:
        """Sets the optimizer's state of each master after `step` steps."""
        self.adamw = None
        for param, state, found in zip(self.params, self.state, moments, strict=True):
            state.clear()
            state |= found
            if "exp_avg" in found and self.fused:
                state["step"] = torch.tensor(float(step), device=param.device)
