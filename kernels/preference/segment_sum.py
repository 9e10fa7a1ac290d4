"""Sums of the tokens of each completion, as one custom op with the same bits on every run."""

from __future__ import annotations

import torch
from torch import Tensor

from .._triton import HAS_TRITON


@torch.library.custom_op("strop::segment_sum", mutates_args=())
def segment_sum(values: Tensor, offsets: Tensor) -> Tensor:
    """[S] sums of values [M] between ascending offsets [S + 1] int64, the first 0 and the last M.

    Differentiable in values. Deterministic on the CPU and on a GPU, where index_add is not; never synchronizes.
    """
    if values.is_cuda and HAS_TRITON:
        from .._triton import segment_sum as kernels

        return kernels.segment_sum(values, offsets)
    return torch.segment_reduce(values, "sum", offsets=offsets, unsafe=True, initial=0)


@segment_sum.register_fake
def _(values, offsets):
    return values.new_empty(offsets.shape[0] - 1)


@torch.library.custom_op("strop::segment_sum_backward", mutates_args=())
def segment_sum_backward(grad: Tensor, offsets: Tensor, tokens: int) -> Tensor:
    """[tokens] the gradient of values from that of the sums [S]."""
    if grad.is_cuda and HAS_TRITON:
        from .._triton import segment_sum as kernels

        return kernels.segment_spread(grad, offsets, tokens)
    return grad.index_select(0, segment_of_token(offsets, tokens))


@segment_sum_backward.register_fake
def _(grad, offsets, tokens):
    return grad.new_empty(tokens)


def _setup(ctx, inputs, output) -> None:
    values, offsets = inputs
    ctx.save_for_backward(offsets)
    ctx.tokens = values.shape[0]


def _autograd(ctx, grad: Tensor) -> tuple[Tensor, None]:
    return segment_sum_backward(grad, *ctx.saved_tensors, ctx.tokens), None


segment_sum.register_autograd(_autograd, setup_context=_setup)


def segment_of_token(offsets: Tensor, tokens: int) -> Tensor:
    """[M] int64 completion of each token."""
    return torch.searchsorted(offsets, torch.arange(tokens, device=offsets.device), right=True) - 1


def sequence_sums(values: Tensor, segments: Tensor, num_segments: int) -> Tensor:
    """[num_segments] sums of values [M] by their ascending segment ids [M], as PackedGroups.target_segment.

    Differentiable in values, without a host synchronization. Raises ValueError on other shapes."""
    if segments.shape != values.shape:
        raise ValueError("segments needs num_segments and one id for each token log-prob")
    edges = torch.arange(num_segments + 1, dtype=segments.dtype, device=segments.device)
    return segment_sum(values, torch.searchsorted(segments, edges))
