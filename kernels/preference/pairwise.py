"""The pairwise preference losses as one GPU launch: which of them it covers, and the custom op around it."""

from __future__ import annotations

import torch
from torch import Tensor

from .losses import LOSSES, Options

# Losses of _triton/preference.py by name: its number, and whether scores are divided by lengths.
_FUSED = {
    "sigmoid": ("SIGMOID", False),
    "sigmoid_norm": ("SIGMOID", True),
    "simpo": ("SIGMOID", True),
    "robust": ("ROBUST", False),
    "ipo": ("IPO", False),
    "ipo_norm": ("IPO", True),
    "hinge": ("HINGE", False),
    "exo_pair": ("EXO", False),
    "discopop": ("DISCOPOP", False),
    "nca_pair": ("NCA", False),
    "bco_pair": ("BCO", False),
    "apo_zero": ("APO_ZERO", False),
    "apo_down": ("APO_DOWN", False),
    "sppo_hard": ("SPPO", False),
    "dpop": ("DPOP", False),
}
NLL_NORMALIZATIONS = ("batch_tokens", "sequence_mean", "sequence_sum")


def covers(name: str, baseline: Tensor | float) -> bool:
    """Whether the fused kernel has this loss, everything that kernels/losses.py does not see left aside."""
    return name in _FUSED and not isinstance(baseline, Tensor)


def pairwise_sums(
    policy_logp: Tensor,
    ref_logp: Tensor | None,
    offsets: Tensor,
    name: str,
    o: Options,
    length_normalization: bool,
    nll_normalization: str,
    baseline: float,
) -> Tensor:
    """[12] fp32 sums in the order of PREFERENCE_METRICS, differentiable in policy_logp through "loss" and "nll_loss".

    policy_logp [M] fp32, ref_logp [M], [2B] or None, offsets [2B + 1] int64.
    """
    kind, by_length = _FUSED[name]
    normalize = by_length or (length_normalization and LOSSES[name].scores)
    # Every other loss of the sigmoid's formula has no offset.
    gamma = o.simpo_gamma if name == "simpo" else 0.0
    numbers = [o.beta, o.label_smoothing, gamma, o.discopop_tau, float(baseline), o.dpop_lambda]
    nll = NLL_NORMALIZATIONS.index(nll_normalization)
    return _pairwise(policy_logp, ref_logp, offsets, kind, normalize, nll, numbers)[0]


@torch.library.custom_op("strop::pairwise_loss", mutates_args=())
def _pairwise(
    policy_logp: Tensor,
    ref_logp: Tensor | None,
    offsets: Tensor,
    kind: str,
    normalize: bool,
    nll: int,
    numbers: list[float],
) -> tuple[Tensor, Tensor, Tensor]:
    from .._triton import preference

    loss = getattr(preference, kind)
    return preference.pairwise(policy_logp, ref_logp, offsets, loss, normalize, nll, tuple(numbers))


@_pairwise.register_fake
def _(policy_logp, ref_logp, offsets, kind, normalize, nll, numbers):
    completions = offsets.shape[0] - 1
    return tuple(policy_logp.new_empty(size) for size in (12, completions, completions // 2))


@torch.library.custom_op("strop::pairwise_loss_backward", mutates_args=())
def _pairwise_backward(grad: Tensor, offsets: Tensor, slope: Tensor, nll_slope: Tensor, tokens: int) -> Tensor:
    from .._triton import preference

    return preference.pairwise_backward(grad, offsets, slope, nll_slope, tokens)


@_pairwise_backward.register_fake
def _(grad, offsets, slope, nll_slope, tokens):
    return slope.new_empty(tokens)


def _setup(ctx, inputs, output) -> None:
    policy_logp, _, offsets, *_ = inputs
    _, slope, nll_slope = output
    ctx.save_for_backward(offsets, slope, nll_slope)
    ctx.tokens = policy_logp.shape[0]
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad: Tensor | None, *_):
    if grad is None:
        return (None,) * 7
    return _pairwise_backward(grad, *ctx.saved_tensors, ctx.tokens), *[None] * 6


_pairwise.register_autograd(_autograd, setup_context=_setup)
