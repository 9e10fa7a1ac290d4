"""gather_logprob and its peers: materialized logits to the targets' log-probs, and back."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from strop.kernels import gather_logprob

from .shapes import LLAMA_1B, SMOLLM2, WIDE, Head, head_inputs
from .suite import DTYPES, Case, Unavailable

NAME = "gather"
REFERENCE = "PyTorch"
FORWARD, BOTH = "forward", "forward and backward"


def cases(device: torch.device) -> list[Case]:
    sizes: dict[Head, int] = {WIDE: 8192, LLAMA_1B: 8192} if device.type == "cuda" else {SMOLLM2: 512, LLAMA_1B: 256}
    return [Case(NAME, head, variant, count) for head, count in sizes.items() for variant in (BOTH, FORWARD)]


def inputs(case: Case, device: torch.device) -> SimpleNamespace:
    # A narrow head makes logits of the usual distribution; its width does not matter here.
    narrow = Head(case.head.name, 32, case.head.vocab)
    with torch.no_grad():
        hidden, weight, target = head_inputs(narrow, case.tokens, device, DTYPES[case.dtype])
        logits = hidden @ weight.T
    return SimpleNamespace(logits=logits.requires_grad_(case.variant == BOTH), target=target)


def floor(case: Case) -> tuple[float, float]:
    """One read of the logits; for the gradient another read and a write."""
    passes = 3 if case.variant == BOTH else 1
    return 0.0, passes * case.tokens * case.head.vocab * DTYPES[case.dtype].itemsize


def flat(result: tuple[Tensor, ...], inputs: SimpleNamespace) -> tuple[Tensor, ...]:
    return tuple(x.reshape(inputs.logits.shape) if x.dim() == 3 else x for x in result)


def _call(logp: Callable[[Tensor, Tensor], Tensor], logits: Tensor, target: Tensor):
    """The call that computes the mean log-prob and, if logits require it, its gradient."""

    def call() -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(logits.requires_grad):
            value = logp(logits, target).mean()
        return (value.detach(), *torch.autograd.grad(value, logits)) if logits.requires_grad else (value,)

    return call


def _of(logp: Callable[[Tensor, Tensor], Tensor]):
    return lambda case, x: _call(logp, x.logits, x.target)


def _plain(logits: Tensor, target: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)


def _in_place(case: Case, x: SimpleNamespace):
    if case.variant != BOTH:
        raise Unavailable("only a backward can be in place")
    # After the first call these hold a gradient: different values, the same work.
    logits = x.logits.detach().clone().requires_grad_()
    return _call(lambda logits, target: gather_logprob(logits, target, inplace_backward=True), logits, x.target)


def _csrc(case: Case, x: SimpleNamespace):
    if not x.logits.is_cuda:
        raise Unavailable("CUDA C++")
    from strop.kernels.head import cuda

    call = _call(gather_logprob, x.logits, x.target)

    def preferring() -> tuple[Tensor, ...]:
        before, cuda.prefer = cuda.prefer, True
        try:
            return call()
        finally:
            cuda.prefer = before

    return preferring


def _compiled(case: Case, x: SimpleNamespace):
    return _call(torch.compile(_plain, fullgraph=True, dynamic=False), x.logits, x.target)


def _trl(case: Case, x: SimpleNamespace):
    from trl.trainer.utils import selective_log_softmax

    # Its trainers call it with [rows, tokens, V]; on a CPU it runs row by row.
    logits = x.logits.detach().view(8, -1, case.head.vocab).requires_grad_(case.variant == BOTH)
    return _call(selective_log_softmax, logits, x.target.view(8, -1))


def _liger(case: Case, x: SimpleNamespace):
    if not x.logits.is_cuda:
        raise Unavailable("its cross-entropy is a Triton kernel for GPUs")
    from liger_kernel.transformers import LigerCrossEntropyLoss

    # It writes the gradient over the logits in its forward.
    logits = x.logits.detach().clone().requires_grad_(case.variant == BOTH)
    loss = LigerCrossEntropyLoss(reduction="none")
    return _call(lambda logits, target: -loss(logits, target), logits, x.target)


def _quack(case: Case, x: SimpleNamespace):
    if not x.logits.is_cuda:
        raise Unavailable("its kernels are for GPUs")
    from quack.cross_entropy import cross_entropy

    return _call(lambda logits, target: -cross_entropy(logits, target, reduction="none"), x.logits, x.target)


CONTENDERS = {
    "Strop": _of(gather_logprob),
    "Strop, in place": _in_place,
    "Strop, CUDA C++": _csrc,
    "PyTorch": _of(_plain),
    "torch.compile": _compiled,
    "Liger": _liger,
    "TRL": _trl,
    "QuACK": _quack,
}
