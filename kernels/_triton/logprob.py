"""The element-wise passes of kernels/head/passes.py as Triton kernels: one program per row, one read per element.

Row offsets are int64, because rows * columns exceeds 2^31 for real batches. Each chunk's sums merge with the running
ones by the online log-sum-exp of Milakov and Gimelshein 2018 (arXiv 1805.02867, algorithm 3).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..head import cuda
from ..head.passes import RowState
from . import launch
from .softcap import tanh

# Elements per block: the largest power of two whose fp32 copies fit in registers at 8 warps.
_BLOCK = 4096
_WARPS = 8


def _launch_shape(columns: int) -> dict[str, int]:
    block = min(_BLOCK, triton.next_power_of_2(columns))
    return {"BLOCK": block, "num_warps": max(1, min(_WARPS, block // 256))}


@triton.jit
def scan_kernel(
    product_ptr, weights_ptr, target_ptr, highest_ptr, total_ptr, decay_ptr, target_logit_ptr, weighted_ptr,
    plain_ptr, squares_ptr, product_stride, weights_stride, start, columns, cap, CAP: tl.constexpr,
    WEIGHTS: tl.constexpr, WEIGHTED: tl.constexpr, PLAIN: tl.constexpr, SQUARES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    product_ptr += row * product_stride
    weights_ptr += row * weights_stride
    target = tl.load(target_ptr + row)
    lanes = tl.arange(0, BLOCK)
    if target < 0:
        if WEIGHTS:
            for first in range(0, columns, BLOCK):
                column = first + lanes
                tl.store(weights_ptr + column, tl.zeros([BLOCK], tl.float32), mask=column < columns)
        return
    hit = target - start
    old_highest = tl.load(highest_ptr + row)
    highest = old_highest
    total = 0.0
    weighted = 0.0
    plain = 0.0
    squares = 0.0
    for first in range(0, columns, BLOCK):
        column = first + lanes
        inside = column < columns
        x = tl.load(product_ptr + column, mask=inside, other=-float("inf")).to(tl.float32)
        if CAP:
            x = tl.where(inside, tanh(x) * cap, -float("inf"))
        target_logit = tl.sum(tl.where(column == hit, x, 0.0), 0)
        if (hit >= first) & (hit < first + BLOCK) & (hit < columns):
            tl.store(target_logit_ptr + row, target_logit)
        if PLAIN:
            plain += tl.sum(tl.where(inside, x, 0.0), 0)
        new_highest = tl.maximum(highest, tl.max(x, 0))
        moved = highest - new_highest
        highest = new_highest
        decay = tl.exp(moved)
        if WEIGHTED:
            weighted = decay * (weighted + moved * total)
        d = x - highest
        e = tl.exp(d)
        if WEIGHTED:
            # 0 * -inf is NaN; 0 times the lowest finite number is 0.
            weighted += tl.sum(e * tl.maximum(d, -3.0e38), 0)
        if SQUARES:
            squares = squares * decay * decay + tl.sum(e * e, 0)
        total = total * decay + tl.sum(e, 0)
    moved = old_highest - highest
    decay = tl.exp(moved)
    old_total = tl.load(total_ptr + row)
    if WEIGHTED:
        old_weighted = tl.load(weighted_ptr + row)
        tl.store(weighted_ptr + row, weighted + decay * (old_weighted + moved * old_total))
    if SQUARES:
        tl.store(squares_ptr + row, squares + tl.load(squares_ptr + row) * decay * decay)
    if PLAIN:
        tl.store(plain_ptr + row, plain + tl.load(plain_ptr + row))
    tl.store(total_ptr + row, total + old_total * decay)
    tl.store(highest_ptr + row, highest)
    tl.store(decay_ptr + row, decay)
    if WEIGHTS:
        for first in range(0, columns, BLOCK):
            column = first + lanes
            inside = column < columns
            x = tl.load(product_ptr + column, mask=inside, other=0.0).to(tl.float32)
            if CAP:
                t = tanh(x)
                e = tl.exp(t * cap - highest) * (1.0 - t * t)
            else:
                e = tl.exp(x - highest)
            tl.store(weights_ptr + column, e, mask=inside)


@triton.jit
def gradient_kernel(
    product_ptr, out_ptr, target_ptr, at_target_ptr, lse_ptr, product_stride, out_stride, start, columns, cap,
    CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    product_ptr += row * product_stride
    out_ptr += row * out_stride
    target = tl.load(target_ptr + row)
    lse = tl.load(lse_ptr + row)
    at_target = tl.load(at_target_ptr + row)
    lanes = tl.arange(0, BLOCK)
    for first in range(0, columns, BLOCK):
        column = first + lanes
        inside = column < columns
        if target < 0:
            tl.store(out_ptr + column, tl.zeros([BLOCK], tl.float32), mask=inside)
        else:
            x = tl.load(product_ptr + column, mask=inside, other=0.0).to(tl.float32)
            if CAP:
                t = tanh(x)
                d = tl.where(column + start == target, at_target, tl.exp(t * cap - lse)) * (1.0 - t * t)
            else:
                d = tl.where(column + start == target, at_target, tl.exp(x - lse))
            tl.store(out_ptr + column, d, mask=inside)


@triton.jit
def gather_forward_kernel(logits_ptr, target_ptr, logp_ptr, sums_ptr, logits_stride, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    target = tl.load(target_ptr + row)
    lanes = tl.arange(0, BLOCK)
    # The lowest finite number, not -inf: with valid logits of -inf, -inf - -inf would be NaN.
    highest = -3.4028234663852886e38
    total = 0.0
    for first in range(0, columns, BLOCK):
        column = first + lanes
        x = tl.load(logits_ptr + column, mask=column < columns, other=-float("inf")).to(tl.float32)
        new_highest = tl.maximum(highest, tl.max(x, 0))
        total = total * tl.exp(highest - new_highest) + tl.sum(tl.exp(x - new_highest), 0)
        highest = new_highest
    log_total = tl.log(total)
    tl.store(sums_ptr + 2 * row, highest)
    tl.store(sums_ptr + 2 * row + 1, total)
    if target < 0:
        tl.store(logp_ptr + row, 0.0)
    elif target < columns:
        tl.store(logp_ptr + row, tl.load(logits_ptr + target).to(tl.float32) - highest - log_total)
    else:
        tl.store(logp_ptr + row, float("nan"))


@triton.jit
def gather_backward_kernel(
    grad_ptr, logits_ptr, out_ptr, target_ptr, at_target_ptr, sums_ptr, logits_stride, out_stride, columns,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    out_ptr += row * out_stride
    target = tl.load(target_ptr + row)
    grad = tl.load(grad_ptr + row).to(tl.float32)
    highest = tl.load(sums_ptr + 2 * row)
    scale = -grad / tl.load(sums_ptr + 2 * row + 1)
    at_target = -grad * tl.load(at_target_ptr + row)
    dead = (target < 0) | (grad == 0.0)
    lanes = tl.arange(0, BLOCK)
    for first in range(0, columns, BLOCK):
        column = first + lanes
        inside = column < columns
        if dead:
            tl.store(out_ptr + column, tl.zeros([BLOCK], tl.float32), mask=inside)
        else:
            x = tl.load(logits_ptr + column, mask=inside, other=0.0).to(tl.float32)
            d = tl.where(column == target, at_target, scale * tl.exp(x - highest))
            tl.store(out_ptr + column, d, mask=inside)


def scan_chunk(product: Tensor, start: int, state: RowState, cap: float, weights: Tensor | None = None) -> None:
    """passes.scan_chunk; the columns of product [N, C] are contiguous."""
    rows, columns = product.shape
    out = product if weights is None else weights
    sums = (state.highest, state.total, state.decay, state.target_logit, state.weighted, state.plain, state.squares)
    flags = {"WEIGHTED": state.weighted.numel() > 0, "PLAIN": state.plain.numel() > 0}
    flags |= {"SQUARES": state.squares.numel() > 0, "CAP": cap != 0, "WEIGHTS": weights is not None}
    numbers = (product.stride(0), out.stride(0), start, columns, cap)
    launch(scan_kernel, (rows,), product, out, state.target, *sums, *numbers, **flags, **_launch_shape(columns))


def gradient_chunk(
    product: Tensor, start: int, target: Tensor, at_target: Tensor, lse: Tensor, cap: float, out: Tensor
) -> None:
    """passes.gradient_chunk; the columns of product and out [N, C] are contiguous."""
    rows, columns = product.shape
    numbers = (product.stride(0), out.stride(0), start, columns, cap)
    tensors = (product, out, target, at_target, lse)
    launch(gradient_kernel, (rows,), *tensors, *numbers, CAP=cap != 0, **_launch_shape(columns))


def gather_forward(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """passes.gather_forward."""
    if cuda.takes("gather_forward", logits):
        return cuda.gather_forward(logits, target)
    logits = logits.contiguous()
    rows, columns = logits.shape
    logp, sums = (logits.new_empty(shape, dtype=torch.float32) for shape in ((rows,), (rows, 2)))
    tensors = (logits, target, logp, sums)
    launch(gather_forward_kernel, (rows,), *tensors, logits.stride(0), columns, **_launch_shape(columns))
    return logp, sums


def gather_backward(grad: Tensor, logits: Tensor, target: Tensor, at_target: Tensor, sums: Tensor, out: Tensor) -> None:
    """passes.gather_backward."""
    rows, columns = logits.shape
    if rows and columns > 1 and (logits.stride(1) != 1 or out.stride(1) != 1):
        dense = torch.empty_like(logits, memory_format=torch.contiguous_format)
        gather_backward(grad, logits.contiguous(), target, at_target, sums, dense)
        out.copy_(dense)
        return
    if cuda.takes("gather_backward", logits):
        cuda.gather_backward(grad, logits, target, at_target, sums, out)
        return
    tensors = (grad.contiguous(), logits, out, target, at_target, sums)
    numbers = (logits.stride(0), out.stride(0), columns)
    launch(gather_backward_kernel, (rows,), *tensors, *numbers, **_launch_shape(columns))
