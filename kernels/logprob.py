"""Log-probabilities of target tokens, from hidden states and the head's weight, or from logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import chunked
from .chunked import STATS, Head


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    stats: Sequence[str] = (),
    byte_budget: int | None = None,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """log softmax(x)[target] with x = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap) / temperature,
    without ever holding all of x.

    hidden [N, D], weight [V, D], bias [V]: one dtype of bf16, fp16, fp32, fp64, or autocast's. target [N] integer,
    ignore_index where a row has none. softcap None means no cap. byte_budget bounds the scratch for logits (default
    64 MiB); when it holds all N*V of them they are kept for the backward, else they are computed again there.

    Returns logp [N] in fp32 (fp64 for fp64), 0 for ignored rows; with stats also a dict of them, each [N] in the same
    dtype, 0 for ignored rows and without gradient: "lse" of x, "entropy" in nats, "mean_logit" the mean of x over the
    vocabulary, "top1" 1 where no x is above the target's, "log_sum_p2" = log sum p^2 (WPO, arXiv 2406.11827).
    Differentiable once, in hidden, weight and bias. Raises ValueError on shapes, dtypes and values that do not fit.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = bias if bias is None else bias.to(dtype)
    _check(hidden, weight, target, bias, temperature, softcap, stats)
    head = Head(float(logit_scale), float(temperature), float(softcap or 0.0))
    budget = chunked.DEFAULT_BYTE_BUDGET if byte_budget is None else byte_budget
    logp, *values = _LinearLogprob.apply(hidden, weight, target, bias, head, ignore_index, tuple(stats), budget)
    return (logp, dict(zip(stats, values, strict=True))) if stats else logp


def _check(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    stats: Sequence[str],
) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden [N, D] and weight [V, D] do not fit: {list(hidden.shape)}, {list(weight.shape)}")
    if target.shape != hidden.shape[:1]:
        raise ValueError(f"target must be [{hidden.shape[0]}], got {list(target.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}], got {list(bias.shape)}")
    if weight.shape[0] == 0:
        raise ValueError("weight has no rows: the vocabulary is empty")
    dtypes = {hidden.dtype, weight.dtype} | (set() if bias is None else {bias.dtype})
    if len(dtypes) > 1 or not hidden.is_floating_point():
        raise ValueError(f"hidden, weight and bias must share one floating dtype, got {sorted(map(str, dtypes))}")
    if target.is_floating_point() or target.dtype == torch.bool:
        raise ValueError(f"target must be an integer tensor, got {target.dtype}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be above 0 or None, got {softcap}")
    if unknown := set(stats) - set(STATS):
        raise ValueError(f"unknown stats {sorted(unknown)}; known are {STATS}")


def _check_range(target: Tensor, vocab: int) -> None:
    if target.numel() and not 0 <= int(target.min()) <= int(target.max()) < vocab:
        raise ValueError(f"targets span {int(target.min())} to {int(target.max())}, the vocabulary has {vocab}")


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target, bias, head, ignore_index, stats, byte_budget):
        rows = (target != ignore_index).nonzero().squeeze(1)
        sub_hidden, sub_target = (hidden, target) if len(rows) == len(target) else (hidden[rows], target[rows])
        _check_range(sub_target, weight.shape[0])
        need_hidden, need_weight, _, need_bias = ctx.needs_input_grad[:4]
        frozen = need_hidden and not need_weight and not need_bias
        all_bytes = sub_hidden.shape[0] * weight.shape[0] * hidden.element_size()
        keep = (need_weight or need_bias) and all_bytes <= byte_budget
        logp, lse, found, kept, bracket = chunked.forward(
            sub_hidden, weight, sub_target, bias, head, stats, byte_budget, keep=keep, bracket=frozen
        )
        if frozen:
            ctx.save_for_backward(rows, bracket)
        else:
            ctx.save_for_backward(rows, sub_hidden, weight, sub_target, bias, logp, lse, *kept)
        ctx.shape, ctx.frozen, ctx.head, ctx.byte_budget = hidden.shape, frozen, head, byte_budget
        outputs = [logp, *(found[name] for name in stats)]
        if len(rows) != len(target):
            outputs = [x.new_zeros(len(target)).index_copy_(0, rows, x) for x in outputs]
        ctx.mark_non_differentiable(*outputs[1:])
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        rows, *saved = ctx.saved_tensors
        grad = grad[rows]
        if ctx.frozen:
            (bracket,) = saved
            grad_hidden = bracket * grad.to(chunked.compute_dtype(bracket.dtype)).unsqueeze(1)
            return _spread(grad_hidden.to(bracket.dtype), rows, ctx.shape), *[None] * 7
        hidden, weight, target, bias, logp, lse, *kept = saved
        need_hidden, need_weight, _, need_bias = ctx.needs_input_grad[:4]
        live = grad.nonzero().squeeze(1)
        if len(live) < len(grad):
            rows, grad, hidden, target, logp, lse = (x[live] for x in (rows, grad, hidden, target, logp, lse))
            kept = [chunk[live] for chunk in kept]
        grad_hidden, grad_weight, grad_bias = chunked.backward(
            grad,
            hidden,
            weight,
            target,
            bias,
            logp,
            lse,
            kept,
            ctx.head,
            (need_hidden, need_weight, need_bias),
            ctx.byte_budget,
        )
        if need_hidden:
            grad_hidden = _spread(grad_hidden, rows, ctx.shape)
        return grad_hidden, grad_weight, None, grad_bias, *[None] * 4


def _spread(values: Tensor, rows: Tensor, shape: torch.Size) -> Tensor:
    """values at rows of a zero tensor of `shape`; values itself where rows is all of them."""
    return values if values.shape == shape else values.new_zeros(shape).index_copy_(0, rows, values)


def gather_logprob(
    logits: Tensor, target: Tensor, *, ignore_index: int = -100, inplace_backward: bool = False
) -> Tensor:
    """log softmax(logits)[..., target] for those who already hold logits: one read of them forward, one read and one
    write backward.

    logits [..., V] bf16, fp16, fp32 or fp64; target [...] integer, ignore_index where there is none. Returns [...] in
    fp32 (fp64 for fp64), 0 where ignored. inplace_backward writes the gradient over the logits: only for logits that
    nothing else reads after this. Raises ValueError on shapes and targets that do not fit.
    """
    if target.shape != logits.shape[:-1]:
        raise ValueError(f"target must be {list(logits.shape[:-1])}, got {list(target.shape)}")
    flat = logits.reshape(-1, logits.shape[-1])
    return _GatherLogprob.apply(flat, target.reshape(-1), ignore_index, inplace_backward).view(target.shape)


class _GatherLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, ignore_index, inplace_backward):
        kept = target != ignore_index
        safe = target.where(kept, 0)
        _check_range(safe, logits.shape[1])
        logp, lse = chunked.gather_forward(logits, safe)
        ctx.save_for_backward(logits, safe, kept, lse)
        ctx.inplace_backward = inplace_backward
        return logp.where(kept, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        logits, target, kept, lse = ctx.saved_tensors
        out = logits.detach() if ctx.inplace_backward else torch.empty_like(logits)
        return chunked.gather_backward(grad.where(kept, 0.0), logits, target, lse, out), None, None, None
