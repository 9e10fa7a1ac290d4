"""preference_loss alone, from token log-probs to the loss, its gradient and TRL's metrics."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from strop.kernels import preference_loss

from .shapes import Head
from .suite import Case

NAME = "preference"
REFERENCE = "PyTorch"
BETA = 0.1
LENGTH = 256
# No head: the sizes are those of the log-probs.
NO_HEAD = Head("log-probs", 0, 0)


def cases(device: torch.device) -> list[Case]:
    return [
        Case(NAME, NO_HEAD, f"{loss}, {pairs} pairs x {LENGTH}", 2 * pairs * LENGTH, "fp32")
        for pairs in (8, 64)
        for loss in ("sigmoid", "ipo_norm")
    ]


def inputs(case: Case, device: torch.device) -> SimpleNamespace:
    draw = torch.Generator(device).manual_seed(0)
    # Completions of different lengths, packed into one row, and padded to [2B, T] for the peers.
    completions = case.tokens // LENGTH
    lengths = torch.randint(LENGTH // 2, LENGTH + 1, (completions,), device=device, generator=draw)
    mask = torch.arange(LENGTH, device=device) < lengths.unsqueeze(1)
    policy = -torch.rand(completions, LENGTH, device=device, generator=draw) * mask
    ref = (policy + 0.1 * torch.randn(policy.shape, device=device, generator=draw)) * mask
    in_turns = torch.arange(completions, device=device).view(2, -1).T.reshape(-1)
    packed_mask = mask[in_turns]
    segments = torch.arange(completions, device=device).repeat_interleave(lengths[in_turns])
    return SimpleNamespace(
        policy=policy.requires_grad_(),
        ref=ref,
        mask=mask,
        packed_policy=policy.detach()[in_turns][packed_mask].requires_grad_(),
        packed_ref=ref[in_turns][packed_mask],
        packed_mask=packed_mask,
        segments=segments,
        completions=completions,
        place=in_turns.argsort(),
    )


def floor(case: Case) -> tuple[float, float]:
    """Two rows of log-probs read, one gradient written; completions average three quarters of the maximum length."""
    return 0.0, 3 * 4 * 0.75 * case.tokens


def flat(result: tuple[Tensor, ...], inputs: SimpleNamespace) -> tuple[Tensor, ...]:
    loss, gradient = result
    if gradient.dim() == 1:
        padded = gradient.new_zeros(inputs.packed_mask.shape)
        padded[inputs.packed_mask] = gradient
        gradient = padded[inputs.place]
    return loss, gradient * inputs.mask


def _backward(loss: Callable[[], Tensor], policy: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    def call() -> tuple[Tensor, ...]:
        value = loss()
        return value.detach(), *torch.autograd.grad(value, policy)

    return call


def _strop(case: Case, x: SimpleNamespace):
    options = {"segments": x.segments, "num_segments": x.completions, "beta": BETA}
    options["loss_type"] = case.variant.split(",")[0]
    return _backward(lambda: preference_loss(x.packed_policy, x.packed_ref, **options)[0], x.packed_policy)


def _plain(policy: Tensor, ref: Tensor, mask: Tensor, loss_type: str) -> tuple[Tensor, Tensor]:
    """The formulas of TRL's trainer, on rows of [2B, T] with chosen completions first."""
    chosen_logp, rejected_logp = (policy * mask).sum(1).chunk(2)
    chosen_ref, rejected_ref = (ref * mask).sum(1).chunk(2)
    chosen, rejected = chosen_logp - chosen_ref, rejected_logp - rejected_ref
    if loss_type == "sigmoid":
        losses = -F.logsigmoid(BETA * (chosen - rejected))
    else:
        chosen_length, rejected_length = mask.sum(1).clamp(min=1).chunk(2)
        losses = (chosen / chosen_length - rejected / rejected_length - 1 / (2 * BETA)) ** 2
    with torch.no_grad():
        rewards = BETA * chosen, BETA * rejected
        metrics = torch.stack(
            (
                *(x.mean() for x in rewards),
                (rewards[0] > rewards[1]).float().mean(),
                (rewards[0] - rewards[1]).mean(),
                chosen_logp.mean(),
                rejected_logp.mean(),
            )
        )
    return losses.mean(), metrics


def _pytorch(compiled: bool):
    def contender(case: Case, x: SimpleNamespace):
        loss = torch.compile(_plain, fullgraph=True, dynamic=False) if compiled else _plain
        loss_type = case.variant.split(",")[0]
        return _backward(lambda: loss(x.policy, x.ref, x.mask, loss_type)[0], x.policy)

    return contender


CONTENDERS = {"Strop": _strop, "PyTorch": _pytorch(compiled=False), "torch.compile": _pytorch(compiled=True)}
