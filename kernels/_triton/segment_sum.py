"""Sums of runs of a vector, and their gradient: one program per run, no atomics, the same bits on every run."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import launch

BLOCK, WARPS = 1024, 4


@triton.jit
def sum_kernel(values_ptr, offsets_ptr, out_ptr, BLOCK: tl.constexpr):
    run = tl.program_id(0)
    start = tl.load(offsets_ptr + run)
    end = tl.load(offsets_ptr + run + 1)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], out_ptr.dtype.element_ty)
    for first in range(start, end, BLOCK):
        total += tl.load(values_ptr + first + lanes, mask=first + lanes < end, other=0.0)
    tl.store(out_ptr + run, tl.sum(total, 0))


@triton.jit
def spread_kernel(grad_ptr, offsets_ptr, out_ptr, BLOCK: tl.constexpr):
    run = tl.program_id(0)
    start = tl.load(offsets_ptr + run)
    end = tl.load(offsets_ptr + run + 1)
    grad = tl.zeros([BLOCK], out_ptr.dtype.element_ty) + tl.load(grad_ptr + run)
    for first in range(start, end, BLOCK):
        token = first + tl.arange(0, BLOCK)
        tl.store(out_ptr + token, grad, mask=token < end)


def segment_sum(values: Tensor, offsets: Tensor) -> Tensor:
    """[S] sums of values [M] fp32 or fp64 between offsets [S + 1] int64, in values' dtype."""
    out = values.new_empty(offsets.shape[0] - 1)
    launch(sum_kernel, out.shape, values.contiguous(), offsets, out, BLOCK=BLOCK, num_warps=WARPS)
    return out


def segment_spread(grad: Tensor, offsets: Tensor, tokens: int) -> Tensor:
    """[M = tokens] the gradient of segment_sum's values from that of its sums: grad [S] copied to each run."""
    out = grad.new_zeros(tokens)
    launch(spread_kernel, grad.shape, grad.contiguous(), offsets, out, BLOCK=BLOCK, num_warps=WARPS)
    return out
