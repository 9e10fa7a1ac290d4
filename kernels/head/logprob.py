"""Log-probabilities of target tokens, from hidden states and the head's weight, or from logits."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import chunked, passes
from .passes import LogitTransform

STATS = ("lse", "entropy", "mean_logit", "top1", "log_sum_p2")


def linear_logprob(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, *, logit_scale: float = 1.0,
    temperature: float = 1.0, softcap: float | None = None, ignore_index: int = -100, stats: Sequence[str] = (),
    byte_budget: int | None = None,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """log softmax(x)[target] with x = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap) / temperature,
    without materializing x.

    hidden [N, D], weight [V, D], bias [V]: one dtype of bf16, fp16, fp32, fp64, or autocast's. target [N] integer,
    ignore_index in rows without one. softcap None means no cap. byte_budget bounds the scratch for logits (default
    64 MiB on a CPU with AMX, 256 MiB on other CPUs; on a GPU an eighth of the free memory, at least 512 MiB). If all
    N*V logits fit they are kept for the backward, otherwise the backward recomputes them. If neither weight nor bias
    needs a gradient, the forward already computes that of hidden.

    Returns logp [N] in fp32 (fp64 for fp64), 0 in ignored rows; with stats also a dict of them, each [N] in the same
    dtype, 0 in ignored rows, without gradient: "lse" of x, "entropy" in nats, "mean_logit" the mean of x over the
    vocabulary, "top1" 1 if no x exceeds the target's, "log_sum_p2" = log sum p^2 (WPO, arXiv 2406.11827).
    Differentiable once, in hidden, weight and bias. Deterministic. On the CPU ignored rows and rows with zero upstream
    gradient are excluded from every GEMM; on a GPU, where finding them would synchronize, only from the element-wise
    passes. Raises ValueError on mismatched shapes and dtypes and on options out of range; a target outside the
    vocabulary raises on the CPU and gives NaN on a GPU.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = bias if bias is None else bias.to(dtype)
    _check(hidden, weight, target, bias, temperature, softcap, stats)
    budget = chunked.default_byte_budget(hidden.device) if byte_budget is None else byte_budget
    mode = chunked.RECOMPUTE
    if torch.is_grad_enabled():
        if weight.requires_grad or (bias is not None and bias.requires_grad):
            all_bytes = hidden.shape[0] * weight.shape[0] * hidden.element_size()
            mode = chunked.KEEP if all_bytes <= budget else chunked.RECOMPUTE
        elif hidden.requires_grad:
            mode = chunked.FROZEN
    wanted = sum(1 << i for i, name in enumerate(STATS) if name in stats)
    numbers = (float(logit_scale), float(temperature), float(softcap or 0.0))
    logp, _, *values = _linear_logprob(hidden, weight, target, bias, *numbers, ignore_index, wanted, mode, budget)
    found = dict(zip(STATS, values, strict=False))
    return (logp, {name: found[name].detach() for name in stats}) if stats else logp


def _check(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, temperature: float, softcap: float | None,
    stats: Sequence[str],
) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden [N, D] and weight [V, D] do not match: {list(hidden.shape)}, {list(weight.shape)}")
    if target.shape != hidden.shape[:1]:
        raise ValueError(f"target must be [{hidden.shape[0]}], got {list(target.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}], got {list(bias.shape)}")
    if weight.shape[0] == 0:
        raise ValueError("weight has no rows: the vocabulary is empty")
    if hidden.dtype != weight.dtype or (bias is not None and bias.dtype != weight.dtype):
        raise ValueError("hidden, weight and bias must share one dtype")
    if not hidden.is_floating_point():
        raise ValueError(f"hidden must be floating point, got {hidden.dtype}")
    if target.is_floating_point() or target.dtype == torch.bool:
        raise ValueError(f"target must be an integer tensor, got {target.dtype}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be above 0 or None, got {softcap}")
    if unknown := [name for name in stats if name not in STATS]:
        raise ValueError(f"unknown stats {unknown}; known are {STATS}")


def _passes(x: Tensor) -> ModuleType:
    """The element-wise passes for x's device."""
    if not x.is_cuda:
        return passes
    from .._triton import logprob as triton_passes

    return triton_passes


def _live_target(target: Tensor, ignore_index: int, vocab: int) -> Tensor:
    """target as int64 with -1 where ignored. On the CPU raises ValueError if one is out of range."""
    ignored = target == ignore_index
    target = target.long().masked_fill(ignored, -1)
    if target.device.type == "cpu" and target.numel():
        beyond = (target >= vocab) | ((target < 0) & ~ignored)
        if beyond.any():
            raise ValueError(f"target {int(target[beyond][0])} is outside the vocabulary of {vocab}")
    return target


def _compact(live: Tensor) -> Tensor | None:
    """Indices of the live rows; None if all are live or if finding them would synchronize."""
    if live.device.type != "cpu" or bool(live.all()):
        return None
    return live.nonzero().squeeze(1)


def _spread(values: Tensor, rows: Tensor | None, count: int) -> Tensor:
    """`count` rows of zeros with values at `rows`; values itself if rows is None."""
    if rows is None:
        return values
    return values.new_zeros(count, *values.shape[1:]).index_copy_(0, rows, values)


# A custom op cannot return None: results that were not requested are empty, with numel 0.
@torch.library.custom_op("strop::linear_logprob", mutates_args=())
def _linear_logprob(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, logit_scale: float, temperature: float,
    softcap: float, ignore_index: int, wanted: int, mode: int, byte_budget: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logp, lse, the five STATS (bit i of `wanted` requests the i-th), kept products, bracket."""
    count, vocab = hidden.shape[0], weight.shape[0]
    live = _live_target(target, ignore_index, vocab)
    rows = _compact(live >= 0)
    kept = hidden.new_empty(count * vocab if mode == chunked.KEEP else 0)
    if rows is not None:
        kept[len(rows) * vocab :].zero_()
    stats = tuple(name for i, name in enumerate(STATS) if wanted >> i & 1)
    logp, lse, found, bracket = chunked.forward(
        hidden if rows is None else hidden[rows], weight, live if rows is None else live[rows], bias,
        LogitTransform(logit_scale, temperature, softcap), stats, byte_budget,
        kept=kept if mode == chunked.KEEP else None, bracket=mode == chunked.FROZEN, passes=_passes(hidden),
    )
    dead = live < 0

    def whole(values: Tensor | None) -> Tensor:
        if values is None:
            return lse.new_empty(0)
        return _spread(values, rows, count).masked_fill_(dead, 0.0)

    # lse appears twice, for the backward and as a statistic: outputs of a custom op must not alias.
    statistics = [
        whole(found[name].clone() if name == "lse" else found[name]) if name in found else whole(None) for name in STATS
    ]
    if bracket is None:
        bracket = hidden.new_empty(0)
    else:
        bracket = _spread(bracket, rows, count).masked_fill_(dead.unsqueeze(1), 0.0)
    return whole(logp), whole(lse), *statistics, kept, bracket


@_linear_logprob.register_fake
def _(hidden, weight, target, bias, logit_scale, temperature, softcap, ignore_index, wanted, mode, byte_budget):
    count, dtype = hidden.shape[0], passes.compute_dtype(hidden.dtype)
    row_results = [hidden.new_empty(count, dtype=dtype) for _ in range(2)]
    stats = [hidden.new_empty(count if wanted >> i & 1 else 0, dtype=dtype) for i in range(len(STATS))]
    kept = hidden.new_empty(count * weight.shape[0] if mode == chunked.KEEP else 0)
    bracket = hidden.new_empty(hidden.shape if mode == chunked.FROZEN else (0,))
    return *row_results, *stats, kept, bracket


@torch.library.custom_op("strop::linear_logprob_backward", mutates_args=())
def _linear_logprob_backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, logp: Tensor, lse: Tensor,
    kept: Tensor, logit_scale: float, temperature: float, softcap: float, ignore_index: int, needs: list[bool],
    byte_budget: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; empty if not needed."""
    count, vocab = hidden.shape[0], weight.shape[0]
    live = _live_target(target, ignore_index, vocab)
    scored = live >= 0
    live = live.masked_fill(grad == 0, -1)
    rows = _compact(live >= 0)
    kept_rows = None
    if rows is not None:
        # Forward kept the scored rows contiguously; select those with a gradient.
        kept_rows = (scored.cumsum(0) - 1)[rows] if kept.numel() else None
        kept = kept[: int(scored.sum()) * vocab]
        hidden, grad, live, logp, lse = (x[rows] for x in (hidden, grad, live, logp, lse))
    else:
        grad = grad.masked_fill(live < 0, 0.0)
    gradients = chunked.backward(
        grad, hidden, weight, live, bias, logp, lse, kept if kept.numel() else None, kept_rows,
        LogitTransform(logit_scale, temperature, softcap), tuple(needs), byte_budget, passes=_passes(hidden),
    )
    grad_hidden, *others = gradients
    grad_hidden = None if grad_hidden is None else _spread(grad_hidden, rows, count)
    return tuple(hidden.new_empty(0) if x is None else x for x in (grad_hidden, *others))


@_linear_logprob_backward.register_fake
def _(grad, hidden, weight, target, bias, logp, lse, kept, scale, temperature, softcap, ignore, needs, byte_budget):
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    return tuple(hidden.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True))


def _linear_logprob_setup(ctx, inputs, output) -> None:
    hidden, weight, target, bias, *numbers, _, mode, byte_budget = inputs
    logp, lse, *_, kept, bracket = output
    if mode == chunked.FROZEN:
        ctx.save_for_backward(bracket)
    else:
        ctx.save_for_backward(hidden, weight, target, bias, logp, lse, kept)
    ctx.mode, ctx.numbers, ctx.byte_budget = mode, numbers, byte_budget
    ctx.set_materialize_grads(False)


def _linear_logprob_autograd(ctx, grad: Tensor | None, *_):
    if grad is None:
        return (None,) * 11
    if ctx.mode == chunked.FROZEN:
        (bracket,) = ctx.saved_tensors
        return (bracket * grad.unsqueeze(1)).to(bracket.dtype), *[None] * 10
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    gradients = _linear_logprob_backward(grad, *ctx.saved_tensors, *ctx.numbers, needs, ctx.byte_budget)
    hidden, weight, bias = (x if need else None for x, need in zip(gradients, needs, strict=True))
    return hidden, weight, None, bias, *[None] * 7


_linear_logprob.register_autograd(_linear_logprob_autograd, setup_context=_linear_logprob_setup)


def gather_logprob(
    logits: Tensor, target: Tensor, *, ignore_index: int = -100, inplace_backward: bool = False
) -> Tensor:
    """log softmax(logits)[..., target] of materialized logits: one read forward, one read and one write backward.

    logits [..., V] bf16, fp16, fp32 or fp64; target [...] integer, or ignore_index. Returns [...] in fp32 (fp64 for
    fp64), 0 where ignored. inplace_backward overwrites the logits with their gradient; use it only if nothing else
    reads them afterwards. Raises ValueError on mismatched shapes and, on the CPU, on targets outside the vocabulary.
    """
    if target.shape != logits.shape[:-1]:
        raise ValueError(f"target must be {list(logits.shape[:-1])}, got {list(target.shape)}")
    flat, flat_target = logits.reshape(-1, logits.shape[-1]), target.reshape(-1)
    if inplace_backward:
        logp = _GatherInPlace.apply(flat, flat_target, ignore_index)
    else:
        logp, _ = _gather_logprob(flat, flat_target, ignore_index)
    return logp.view(target.shape)


@torch.library.custom_op("strop::gather_logprob", mutates_args=())
def _gather_logprob(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """logp [N] and sums [N, 2], see passes.gather_forward."""
    return _passes(logits).gather_forward(logits, _live_target(target, ignore_index, logits.shape[1]))


@_gather_logprob.register_fake
def _(logits, target, ignore_index):
    shapes = logits.shape[:1], (*logits.shape[:1], 2)
    return tuple(logits.new_empty(shape, dtype=passes.compute_dtype(logits.dtype)) for shape in shapes)


@torch.library.custom_op("strop::gather_logprob_backward", mutates_args=())
def _gather_logprob_backward(
    grad: Tensor, logits: Tensor, target: Tensor, logp: Tensor, sums: Tensor, ignore_index: int
) -> Tensor:
    out = torch.empty_like(logits)
    _gather_backward_into(out, grad, logits, target, logp, sums, ignore_index)
    return out


@_gather_logprob_backward.register_fake
def _(grad, logits, target, logp, sums, ignore_index):
    return torch.empty_like(logits)


def _gather_backward_into(
    out: Tensor, grad: Tensor, logits: Tensor, target: Tensor, logp: Tensor, sums: Tensor, ignore_index: int
) -> None:
    live = _live_target(target, ignore_index, logits.shape[1])
    _passes(logits).gather_backward(grad, logits, live, torch.expm1(logp), sums, out)


def _gather_setup(ctx, inputs, output) -> None:
    logits, target, ctx.ignore_index = inputs
    ctx.save_for_backward(logits, target, *output)
    ctx.set_materialize_grads(False)


def _gather_autograd(ctx, grad: Tensor | None, _):
    if grad is None:
        return None, None, None
    return _gather_logprob_backward(grad, *ctx.saved_tensors, ctx.ignore_index), None, None


_gather_logprob.register_autograd(_gather_autograd, setup_context=_gather_setup)


class _GatherInPlace(torch.autograd.Function):
    """gather_logprob whose backward overwrites the logits. Not a custom op, because those may not return an input."""

    @staticmethod
    def forward(ctx, logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
        logp, sums = _gather_logprob(logits, target, ignore_index)
        ctx.save_for_backward(logits, target, logp, sums)
        ctx.ignore_index = ignore_index
        return logp

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        logits, target, logp, sums = ctx.saved_tensors
        logits = logits.detach()
        _gather_backward_into(logits, grad, logits, target, logp, sums, ctx.ignore_index)
        return logits, None, None
