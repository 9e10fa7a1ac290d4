"""linear_logprob and its peers: hidden states and the head's weight to the targets' mean NLL, and back."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from strop.kernels import linear_logprob
from strop.kernels.head.chunked import default_byte_budget

from .shapes import SMOLLM2, Head, head_inputs, heads, tokens
from .suite import DTYPES, Case, Unavailable

NAME = "head"
REFERENCE = "PyTorch"
TRAINED, FROZEN, SCORING = "trained", "frozen", "scoring"


def cases(device: torch.device) -> list[Case]:
    first, *others = heads(device)
    found = [Case(NAME, first, variant, tokens(first, device)) for variant in (TRAINED, FROZEN, SCORING)]
    return found + [Case(NAME, head, TRAINED, tokens(head, device)) for head in others]


def inputs(case: Case, device: torch.device) -> SimpleNamespace:
    hidden, weight, target = head_inputs(case.head, case.tokens, device, DTYPES[case.dtype])
    hidden.requires_grad_(case.variant != SCORING)
    weight.requires_grad_(case.variant == TRAINED)
    return SimpleNamespace(hidden=hidden, weight=weight, target=target)


def floor(case: Case) -> tuple[float, float]:
    """Three GEMMs for a trained head, two for a frozen one; the weight is read once, its gradient written once."""
    products, passes = {TRAINED: (3, 2), FROZEN: (2, 1), SCORING: (1, 1)}[case.variant]
    head = case.head
    return products * 2.0 * case.tokens * head.hidden * head.vocab, passes * head.hidden * head.vocab * 2.0


def flat(result: tuple[Tensor, ...], inputs: SimpleNamespace) -> tuple[Tensor, ...]:
    return result


def _backward(loss: Callable[[], Tensor], x: SimpleNamespace) -> Callable[[], tuple[Tensor, ...]]:
    """The call that computes the loss and every gradient of the case."""
    wanted = [tensor for tensor in (x.hidden, x.weight) if tensor.requires_grad]

    def call() -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(bool(wanted)):
            value = loss()
            return (value.detach(), *torch.autograd.grad(value, wanted)) if wanted else (value,)

    return call


def _plain(hidden: Tensor, weight: Tensor, target: Tensor, softcap: float | None) -> Tensor:
    logits = (hidden @ weight.T).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, target)


def _strop(case: Case, x: SimpleNamespace, byte_budget: int | None = None):
    options = {"softcap": case.head.softcap, "byte_budget": byte_budget}
    return _backward(lambda: -linear_logprob(x.hidden, x.weight, x.target, **options).mean(), x)


def _kept(case: Case, x: SimpleNamespace):
    if case.variant != TRAINED:
        raise Unavailable("only a trained head has products to keep")
    all_logits = case.tokens * case.head.vocab * DTYPES[case.dtype].itemsize
    if all_logits <= default_byte_budget(x.hidden.device):
        raise Unavailable("the default budget holds all logits here")
    return _strop(case, x, all_logits)


def _pytorch(case: Case, x: SimpleNamespace):
    return _backward(lambda: _plain(x.hidden, x.weight, x.target, case.head.softcap), x)


def _compiled(case: Case, x: SimpleNamespace):
    compiled = torch.compile(_plain, fullgraph=True, dynamic=False)
    return _backward(lambda: compiled(x.hidden, x.weight, x.target, case.head.softcap), x)


def _liger(case: Case, x: SimpleNamespace):
    if not x.hidden.is_cuda:
        raise Unavailable("its fused linear cross-entropy is a Triton kernel for GPUs")
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(softcap=case.head.softcap)
    return _backward(lambda: loss(x.weight, x.hidden, x.target), x)


def _liger_per_token(case: Case, x: SimpleNamespace):
    """Liger's kernel of per-token NLLs; on a GPU of capability 9.0 it needs nvidia-cutlass-dsl."""
    if not x.hidden.is_cuda:
        raise Unavailable("its per-token cross-entropy is for GPUs")
    if case.head.softcap is not None:
        raise Unavailable("it has no soft-cap")
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Function

    def loss() -> Tensor:
        found = Function.apply(x.hidden, x.weight, x.target)
        return (found if isinstance(found, Tensor) else found[0]).mean()

    return _backward(loss, x)


def _torch_fused(case: Case, x: SimpleNamespace):
    if case.head.softcap is not None:
        raise Unavailable("it has no soft-cap")
    if not hasattr(F, "linear_cross_entropy"):
        raise Unavailable("this PyTorch has no linear_cross_entropy")
    return _backward(lambda: F.linear_cross_entropy(x.hidden, x.weight, x.target), x)


def _cce(exact: bool):
    def contender(case: Case, x: SimpleNamespace):
        from cut_cross_entropy import linear_cross_entropy

        if not x.hidden.is_cuda and exact:
            raise Unavailable("its kernels are Triton's, for GPUs")
        if not x.hidden.is_cuda and case.head != SMOLLM2:
            raise Unavailable("on a CPU it is torch.compile's code, timed for one model")
        options = {"softcap": case.head.softcap, "impl": "cce" if x.hidden.is_cuda else "torch_compile"}
        if exact:
            options["filter_eps"] = None
        return _backward(lambda: linear_cross_entropy(x.hidden, x.weight, x.target, **options), x)

    return contender


def _trl(case: Case, x: SimpleNamespace):
    return _backward(lambda: -trl_logprob(x.hidden, x.weight, x.target, case.head).mean(), x)


def trl_logprob(hidden: Tensor, weight: Tensor, target: Tensor, head: Head) -> Tensor:
    """Log-probs [N] as TRL's trainers compute them, without their statistics."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as chunk

    return ChunkedLogProbFunction.apply(hidden, weight, None, target, 1.0, chunk, head.softcap, 1.0, ())[0]


def _quack(case: Case, x: SimpleNamespace):
    if not x.hidden.is_cuda:
        raise Unavailable("its kernels are for GPUs")
    if case.head.softcap is not None:
        raise Unavailable("it has no soft-cap")
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return _backward(lambda: chunked_linear_cross_entropy(x.hidden, x.weight, x.target, reduction="mean"), x)


CONTENDERS = {
    "Strop": _strop,
    "Strop, logits kept": _kept,
    "PyTorch": _pytorch,
    "torch.compile": _compiled,
    "PyTorch, linear_cross_entropy": _torch_fused,
    "Liger": _liger,
    "Liger, per token": _liger_per_token,
    "cut-cross-entropy": _cce(exact=False),
    "cut-cross-entropy, exact": _cce(exact=True),
    "TRL": _trl,
    "QuACK": _quack,
}
