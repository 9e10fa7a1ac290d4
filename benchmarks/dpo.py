"""The DPO loss from hidden states, the reference's head included, by Strop and its peers.

8 pairs x 256 completion tokens: 4,096 rows for the head of the policy, and as many for the reference's. Both sides get
hidden states and heads of both models and return the loss and the gradients of the policy's hidden states and weight.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from strop.kernels import linear_logprob, linear_preference_loss

from .head import trl_logprob
from .shapes import LLAMA_1B, SMOLLM2, Head, head_inputs
from .suite import DTYPES, Case, Unavailable

NAME = "dpo"
REFERENCE = "PyTorch"
PAIRS, BETA = 8, 0.1


def cases(device: torch.device) -> list[Case]:
    sizes: tuple[Head, ...] = (SMOLLM2, LLAMA_1B) if device.type == "cuda" else (SMOLLM2,)
    return [Case(NAME, head, f"{PAIRS} pairs x 256", 2 * PAIRS * 256) for head in sizes]


def inputs(case: Case, device: torch.device) -> SimpleNamespace:
    """[2B, T, D] with chosen completions first, as in Liger and TRL, and the same rows in Strop's order."""
    dtype = DTYPES[case.dtype]
    hidden, weight, target = head_inputs(case.head, case.tokens, device, dtype)
    noise = torch.Generator(device).manual_seed(1)

    def near(x: Tensor, share: float) -> Tensor:
        return x + share * x.std() * torch.randn(x.shape, device=device, generator=noise, dtype=dtype)

    # A policy in training differs slightly from the reference.
    ref_hidden, ref_weight = near(hidden, 0.02), near(weight, 0.02)
    rows = torch.arange(case.tokens, device=device).view(2, PAIRS, -1)
    order = rows.transpose(0, 1).reshape(-1)
    shape = (2 * PAIRS, -1, case.head.hidden)
    length = case.tokens // (2 * PAIRS)
    return SimpleNamespace(
        hidden=hidden.view(shape).requires_grad_(),
        weight=weight.requires_grad_(),
        target=target.view(2 * PAIRS, -1),
        ref_hidden=ref_hidden.view(shape),
        ref_weight=ref_weight,
        packed_hidden=hidden.detach()[order].requires_grad_(),
        packed_target=target[order],
        packed_ref_hidden=ref_hidden[order],
        bounds=[(i * length, (i + 1) * length) for i in range(2 * PAIRS)],
        place=order.argsort(),
    )


def floor(case: Case) -> tuple[float, float]:
    """Three GEMMs for the policy's trained head, one for the reference's; two weights read, a gradient written."""
    head = case.head
    return 4 * 2.0 * case.tokens * head.hidden * head.vocab, 3 * head.hidden * head.vocab * 2.0


def flat(result: tuple[Tensor, ...], inputs: SimpleNamespace) -> tuple[Tensor, ...]:
    loss, hidden, weight = result
    return loss, hidden.flatten(0, 1) if hidden.dim() == 3 else hidden[inputs.place], weight


def _backward(loss: Callable[[], Tensor], hidden: Tensor, weight: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    def call() -> tuple[Tensor, ...]:
        value = loss()
        return value.detach(), *torch.autograd.grad(value, (hidden, weight))

    return call


def _strop(case: Case, x: SimpleNamespace):
    def loss() -> Tensor:
        with torch.no_grad():
            ref = linear_logprob(x.packed_ref_hidden, x.ref_weight, x.packed_target)
        return _strop_loss(x, ref)

    return _backward(loss, x.packed_hidden, x.weight)


def _strop_loss(x: SimpleNamespace, ref: Tensor) -> Tensor:
    options = {"target_bounds": x.bounds, "beta": BETA}
    return linear_preference_loss(x.packed_hidden, x.weight, x.packed_target, ref, **options)[0]


def _strop_table(case: Case, x: SimpleNamespace):
    with torch.no_grad():
        ref = linear_logprob(x.packed_ref_hidden, x.ref_weight, x.packed_target)
    return _backward(lambda: _strop_loss(x, ref), x.packed_hidden, x.weight)


def _chunked_loss(module: Callable[[], type], **options):
    """Liger's class, or Strop's drop-in for it."""

    def contender(case: Case, x: SimpleNamespace):
        loss = module()(beta=BETA, **options)
        arguments = (x.weight, x.hidden, x.target, None, x.ref_hidden, x.ref_weight)
        return _backward(lambda: loss(*arguments)[0], x.hidden, x.weight)

    return contender


def _liger() -> type:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    return LigerFusedLinearDPOLoss


def _drop_in() -> type:
    try:
        from strop.kernels.integrations.liger import LigerFusedLinearDPOLoss
    except ImportError as e:
        raise Unavailable("the drop-in is not installed") from e
    return LigerFusedLinearDPOLoss


def _sigmoid_loss(policy: Tensor, ref: Tensor) -> Tensor:
    """From token log-probs [2B, T], chosen first."""
    chosen, rejected = (policy - ref).sum(-1).view(2, -1)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def _plain(hidden: Tensor, weight: Tensor, target: Tensor, ref_hidden: Tensor, ref_weight: Tensor) -> Tensor:
    def logp(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = (hidden @ weight.T).float()
        return logits.log_softmax(-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)

    with torch.no_grad():
        ref = logp(ref_hidden, ref_weight)
    return _sigmoid_loss(logp(hidden, weight), ref)


def _pytorch(compiled: bool):
    def contender(case: Case, x: SimpleNamespace):
        loss = torch.compile(_plain, fullgraph=True, dynamic=False) if compiled else _plain
        arguments = (x.hidden, x.weight, x.target, x.ref_hidden, x.ref_weight)
        return _backward(lambda: loss(*arguments), x.hidden, x.weight)

    return contender


def _trl(case: Case, x: SimpleNamespace):
    def logp(hidden: Tensor, weight: Tensor) -> Tensor:
        return trl_logprob(hidden.flatten(0, 1), weight, x.target.flatten(), case.head).view(x.target.shape)

    def loss() -> Tensor:
        with torch.no_grad():
            ref = logp(x.ref_hidden, x.ref_weight)
        return _sigmoid_loss(logp(x.hidden, x.weight), ref)

    return _backward(loss, x.hidden, x.weight)


CONTENDERS = {
    "Strop": _strop,
    "Strop, Liger's interface": _chunked_loss(_drop_in),
    "Strop, reference from a table": _strop_table,
    "Liger": _chunked_loss(_liger, compiled=False),
    "Liger, compiled": _chunked_loss(_liger, compiled=True),
    "PyTorch": _pytorch(compiled=False),
    "torch.compile": _pytorch(compiled=True),
    "TRL": _trl,
}
