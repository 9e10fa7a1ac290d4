"""One token of every row attends to its group's prompt and to its own completion, both in pages: two Triton kernels.

The first cuts keys into parts of SPLIT. A program computes the softmax of one part for one key head: a part of a prompt
for a tile of the group's rows, all query heads that share the key head included, so that the part is read once for
them; or a part of a row's completion, of which the first also adds the new token and stores its key and value. The
second kernel merges a row's parts in their order. So there are no atomics, and a row's result depends neither on the
other rows nor on how many programs a launch has room for.

Exponentials are base 2; in fp32, where the approximate instruction and one more rounding of the exponent would show, of
base e. Masked scores are -inf and the running maximum starts at a finite number, as in attention.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .attention_launch import _capability, padded
from .softcap import tanh

LOG2E = tl.constexpr(1.4426950408889634)
NOTHING = tl.constexpr(-1.0e30)


@triton.jit
def _power(x, FP32: tl.constexpr):
    """2^x, or for FP32 e^x to about 1 unit in the last place; x <= 0."""
    if FP32:
        whole = tl.floor(tl.maximum(x, -88.0) * LOG2E + 0.5)
        part = tl.maximum(x, -88.0) - whole * 0.693359375 + whole * 2.12194440e-4  # ln 2 in two pieces, the first exact
        sum = part * (1.0 / 5040) + 1.0 / 720
        sum = part * sum + 1.0 / 120
        sum = part * sum + 1.0 / 24
        sum = part * sum + 1.0 / 6
        sum = part * sum + 0.5
        sum = part * part * sum + part + 1.0
        power = ((whole.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
        return tl.where(x < -87.0, 0.0, sum * power)
    return tl.exp2(x)


@triton.jit
def _quarters(x):
    halves = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 4, 2, 2)))
    a, b = tl.split(halves[0])
    c, d = tl.split(halves[1])
    return a, b, c, d


@triton.jit
def _products(q, k, FP32: tl.constexpr, PRECISION: tl.constexpr):
    """q @ k.T. Of FP32 in four sums: one sum over a large head loses twice the digits that PyTorch's does."""
    if FP32 and q.shape[1] >= 64:
        q0, q1, q2, q3 = _quarters(q)
        k0, k1, k2, k3 = _quarters(k)
        first = tl.dot(q0, tl.trans(k0), input_precision=PRECISION) + tl.dot(
            q1, tl.trans(k1), input_precision=PRECISION)
        return first + (tl.dot(q2, tl.trans(k2), input_precision=PRECISION) + tl.dot(
            q3, tl.trans(k3), input_precision=PRECISION))
    return tl.dot(q, tl.trans(k), input_precision=PRECISION)


@triton.jit
def _attend(
    q, highest, total, out, k_ptr, v_ptr, table_ptr, first, end, floor, page_stride, scale, cap, D: tl.constexpr,
    D_PAD: tl.constexpr, PAGE: tl.constexpr, KEYS: tl.constexpr, CAP: tl.constexpr, WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Accumulate keys first to first + KEYS of a page table, those below `end` and above the row's `floor`."""
    key = first + tl.arange(0, KEYS)
    column = tl.arange(0, D_PAD)
    page = tl.load(table_ptr + key // PAGE, mask=key < end, other=0).to(tl.int64)
    offsets = (page * page_stride + key % PAGE * D)[:, None] + column[None, :]
    inside = (key < end)[:, None] & (column < D)[None, :]
    k = tl.load(k_ptr + offsets, mask=inside, other=0.0)
    FP32: tl.constexpr = q.dtype == tl.float32
    scores = _products(q, k, FP32, PRECISION)
    if CAP:
        scores = tanh(scores * (scale / cap))
        factor = cap
    else:
        factor = scale
    if not FP32:
        factor = factor * LOG2E
    seen = (key < end)[None, :]
    if WINDOW:
        seen = seen & (key[None, :] > floor[:, None])
    scores = tl.where(seen, scores, -float("inf"))
    new_highest = tl.maximum(highest, tl.max(scores, 1) * factor)
    weights = _power(scores * factor - new_highest[:, None], FP32)
    decay = _power(highest - new_highest, FP32)
    v = tl.load(v_ptr + offsets, mask=inside, other=0.0)
    if FP32:
        out = out * decay[:, None] + tl.dot(weights, v, input_precision=PRECISION)
    else:
        out = tl.dot(weights.to(v.dtype), v, out * decay[:, None], input_precision=PRECISION)
    return total * decay + tl.sum(weights, 1), new_highest, out


@triton.jit
def _store_part(
    part_ptr, stats_ptr, index, inside, highest, total, out, stats_stride, D: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """index: of each row's part among all [rows, heads, parts]."""
    column = tl.arange(0, D_PAD)
    index = index.to(tl.int64)
    mask = inside[:, None] & (column < D)[None, :]
    tl.store(part_ptr + index[:, None] * D + column[None, :], out, mask=mask)
    tl.store(stats_ptr + index, highest, mask=inside)
    tl.store(stats_ptr + stats_stride + index, total, mask=inside)


# Numbers that change from step to step: a specialization for 1 and for multiples of 16 would compile again.
@triton.jit(do_not_specialize=["tiles", "prompt_width", "own_width", "prompt_splits", "own_splits", "stats_stride"])
def parts_kernel(
    q_ptr, k_ptr, v_ptr, k_pages_ptr, v_pages_ptr, prompt_pages_ptr, own_pages_ptr, prompt_length_ptr, group_ptr,
    length_ptr, tiles_ptr, part_ptr, stats_ptr, q_stride, q_head_stride, k_stride, k_head_stride, v_stride,
    v_head_stride, page_stride, prompt_width, own_width, tiles, prompt_splits, own_splits, stats_stride, scale, cap,
    window, REP: tl.constexpr, MEMBERS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, PAGE: tl.constexpr,
    SPLIT: tl.constexpr, QUERIES: tl.constexpr, OWN_QUERIES: tl.constexpr, KEYS: tl.constexpr, CAP: tl.constexpr,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    head = tl.program_id(1)
    heads = tl.num_programs(1) * REP
    splits = prompt_splits + own_splits
    column = tl.arange(0, D_PAD)
    k_pages_ptr += head * (PAGE * D)
    v_pages_ptr += head * (PAGE * D)
    if program < tiles * prompt_splits:
        tile = program // prompt_splits
        split = program % prompt_splits
        first_row = tl.load(tiles_ptr + tile * MEMBERS)
        if first_row < 0:
            return
        group = tl.load(group_ptr + first_row)
        start = split * SPLIT
        end = tl.minimum(tl.load(prompt_length_ptr + group), start + SPLIT)
        if start >= end:
            return
        lane = tl.arange(0, QUERIES)
        row = tl.load(tiles_ptr + tile * MEMBERS + lane // REP, mask=lane < MEMBERS * REP, other=-1)
        length = tl.load(length_ptr + row, mask=row >= 0, other=-1)
        inside = length >= 0  # also false for rows that ended since the tiles were made
        query_head = head * REP + lane % REP
        pointers = q_ptr + row.to(tl.int64) * q_stride + query_head * q_head_stride
        mask = inside[:, None] & (column < D)[None, :]
        q = tl.load(pointers[:, None] + column[None, :], mask=mask, other=0.0)
        index = (row * heads + query_head) * splits + split
        floor = lane * 0
        if WINDOW:
            floor = tl.load(prompt_length_ptr + group) + length - window
            start = tl.maximum(start, tl.min(tl.where(inside, floor, end), 0) + 1)
        highest = tl.full([QUERIES], NOTHING, tl.float32)
        total = tl.zeros([QUERIES], tl.float32)
        out = tl.zeros([QUERIES, D_PAD], tl.float32)
        table_ptr = prompt_pages_ptr + group.to(tl.int64) * prompt_width
        for first in range(start, end, KEYS):
            total, highest, out = _attend(
                q, highest, total, out, k_pages_ptr, v_pages_ptr, table_ptr, first, end, floor, page_stride, scale,
                cap, D, D_PAD, PAGE, KEYS, CAP, WINDOW, PRECISION,
            )  # fmt: skip
        _store_part(part_ptr, stats_ptr, index, inside, highest, total, out, stats_stride, D, D_PAD)
        return
    row = (program - tiles * prompt_splits) // own_splits
    split = (program - tiles * prompt_splits) % own_splits
    length = tl.load(length_ptr + row)
    start = split * SPLIT
    end = tl.minimum(length, start + SPLIT)
    if (length < 0) | ((start >= end) & (split > 0)):
        return
    lane = tl.arange(0, OWN_QUERIES)
    inside = lane < REP
    query_head = head * REP + lane
    pointers = q_ptr + row.to(tl.int64) * q_stride + query_head * q_head_stride
    mask = inside[:, None] & (column < D)[None, :]
    q = tl.load(pointers[:, None] + column[None, :], mask=mask, other=0.0)
    index = (row * heads + query_head) * splits + prompt_splits + split
    table_ptr = own_pages_ptr + row.to(tl.int64) * own_width
    highest = tl.full([OWN_QUERIES], NOTHING, tl.float32)
    total = tl.zeros([OWN_QUERIES], tl.float32)
    out = tl.zeros([OWN_QUERIES, D_PAD], tl.float32)
    if split == 0:
        # The new token comes from its operands: what this launch stores it does not read.
        k = tl.load(k_ptr + row.to(tl.int64) * k_stride + head * k_head_stride + column, mask=column < D, other=0.0)
        v = tl.load(v_ptr + row.to(tl.int64) * v_stride + head * v_head_stride + column, mask=column < D, other=0.0)
        page = tl.load(table_ptr + length // PAGE).to(tl.int64)
        place = page * page_stride + length % PAGE * D
        tl.store(k_pages_ptr + place + column, k, mask=column < D)
        tl.store(v_pages_ptr + place + column, v, mask=column < D)
        score = tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], 1)
        score = tanh(score * (scale / cap)) * cap if CAP else score * scale
        highest = score if q.dtype == tl.float32 else score * LOG2E
        total += 1.0
        out += v.to(tl.float32)[None, :]
    floor = lane * 0
    if WINDOW:
        floor += length - window
        start = tl.maximum(start, length - window + 1)
    for first in range(start, end, KEYS):
        total, highest, out = _attend(
            q, highest, total, out, k_pages_ptr, v_pages_ptr, table_ptr, first, end, floor, page_stride, scale,
            cap, D, D_PAD, PAGE, KEYS, CAP, WINDOW, PRECISION,
        )  # fmt: skip
    _store_part(part_ptr, stats_ptr, index, inside, highest, total, out, stats_stride, D, D_PAD)


@triton.jit(do_not_specialize=["prompt_splits", "own_splits", "stats_stride"])
def merge_kernel(
    part_ptr, stats_ptr, out_ptr, prompt_length_ptr, group_ptr, length_ptr, prompt_splits, own_splits, stats_stride,
    D: tl.constexpr, D_PAD: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """A row that is no longer decoded, of length -1, gets zeros."""
    FP32: tl.constexpr = out_ptr.dtype.element_ty == tl.float32
    row = tl.program_id(0)
    index = row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    column = tl.arange(0, D_PAD)
    length = tl.load(length_ptr + row)
    highest = NOTHING
    total = 0.0
    out = tl.zeros([D_PAD], tl.float32)
    if length >= 0:
        of_prompt = tl.cdiv(tl.load(prompt_length_ptr + tl.load(group_ptr + row)), SPLIT)
        for part in range(0, of_prompt + tl.maximum(tl.cdiv(length, SPLIT), 1)):
            split = tl.where(part < of_prompt, part, prompt_splits + part - of_prompt)
            at = index * (prompt_splits + own_splits) + split
            part_highest = tl.load(stats_ptr + at)
            new_highest = tl.maximum(highest, part_highest)
            decay = _power(highest - new_highest, FP32)
            share = _power(part_highest - new_highest, FP32)
            total = total * decay + tl.load(stats_ptr + stats_stride + at) * share
            values = tl.load(part_ptr + at * D + column, mask=column < D, other=0.0)
            out = out * decay + values * share
            highest = new_highest
        out = out / total
    tl.store(out_ptr + index * D + column, out.to(out_ptr.dtype.element_ty), mask=column < D)


class Blocks(NamedTuple):
    """Keys that a program reads at a time, warps, and stages of the software pipeline."""

    keys: int
    warps: int
    stages: int


# By head size: up to 64, 128 and 256. Reading keys takes the time, so tiles are small and many programs run at once.
# Only the first is tuned on hardware, an H100.
NVIDIA = (Blocks(64, 4, 2), Blocks(64, 4, 3), Blocks(32, 4, 2))
HIP = (Blocks(32, 4, 2), Blocks(32, 4, 2), Blocks(16, 4, 2))
FP32 = (Blocks(32, 4, 2), Blocks(32, 4, 2), Blocks(16, 8, 2))


def blocks(width: int, rows: int, element_bytes: int, capability: int | None) -> Blocks:
    """For a head size padded to `width` and `rows` query rows; capability is the major one, None is AMD."""
    table = FP32 if element_bytes == 4 else HIP if capability is None else NVIDIA
    chosen = table[(width > 64) + (width > 128)]
    return chosen._replace(warps=8) if rows > 32 and width > 64 else chosen  # else registers spill


def queries(members: int, rep: int) -> int:
    """Query rows of a program that attends for `members` rows of a group with `rep` query heads each."""
    return max(16, triton.next_power_of_2(members * rep))


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, prompt_pages: Tensor, own_pages: Tensor,
    prompt_length: Tensor, group: Tensor, length: Tensor, tiles: Tensor, prompt_splits: int, own_splits: int,
    split: int, scale: float, cap: float, window: int,
) -> Tensor:
    """strop.kernels.attention.paged.decode_attention; window and cap are 0 for none."""
    rows, heads, size = q.shape
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out = q.new_empty(rows, heads, size)
    part = torch.empty(rows, heads, prompt_splits + own_splits, size, dtype=torch.float32, device=q.device)
    stats = torch.empty(2, rows, heads, prompt_splits + own_splits, dtype=torch.float32, device=q.device)
    width, rep, members = padded(size), heads // k.shape[1], tiles.shape[1]
    shape = blocks(width, queries(members, rep), q.element_size(), _capability(q.device))
    constants = {
        "REP": rep, "MEMBERS": members, "D": size, "D_PAD": width, "PAGE": k_pages.shape[2], "SPLIT": split,
        "QUERIES": queries(members, rep), "OWN_QUERIES": queries(1, rep), "KEYS": shape.keys, "CAP": cap > 0,
        "WINDOW": window > 0, "PRECISION": "ieee", "num_warps": shape.warps, "num_stages": shape.stages,
    }
    strides = [x.stride(i) for x in (q, k, v) for i in (0, 1)]
    numbers = (*strides, k_pages.stride(0), prompt_pages.stride(0), own_pages.stride(0), len(tiles), prompt_splits,
               own_splits, stats.stride(0), scale, cap, window)
    grid = (len(tiles) * prompt_splits + rows * own_splits, k.shape[1])
    launch(parts_kernel, grid, q, k, v, k_pages, v_pages, prompt_pages, own_pages, prompt_length, group, length, tiles,
           part, stats, *numbers, **constants)
    launch(merge_kernel, (rows, heads), part, stats, out, prompt_length, group, length, prompt_splits, own_splits,
           stats.stride(0), D=size, D_PAD=width, SPLIT=split, num_warps=1)
    return out
