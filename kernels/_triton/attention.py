"""Attention over PackedGroups as three Triton kernels: forward, gradient of q, gradients of k and v.

FlashAttention-2 (arXiv 2307.08691, algorithms 1 and 2) with the two backward loops as separate kernels, so that none
needs atomics. The rows of a group are contiguous, prompt first, and row i sees row j iff j <= i < readers_end[j]. So a
tile of query rows reads two ranges of keys: its group's prompt up to the tile's start, all visible, and from the start
of its first row's completion to the tile's end, masked. A tile of keys is read by the rows from its start to the last
of its readers_end, masked within the tile and beyond the first readers_end, unmasked in between.

Unmasked blocks are loaded through pointers or, where the launch passes tensor descriptors, by TMA, which leaves the
registers that hold addresses to larger blocks. Masked blocks, of EDGE rows, and what a program loads once go through
pointers: nothing of another group is read, and a smaller EDGE makes room for the mask.

Programs start in the order of the tiles' last two columns, the longest first, and all heads of a tile side by side: a
tile of a long prompt's keys is read by many times more rows than one of a completion's.

Exponentials are base 2. Masked scores are -inf and the running maximum starts at a finite number, so a row that sees no
key of a block does not produce NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .softcap import tanh

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Columns of PackedGroups.tiles, and those with the order of programs.
TILE_COLUMNS = tl.constexpr(6)
BY_KEYS = tl.constexpr(4)
BY_READERS = tl.constexpr(5)


@triton.jit
def _rows(pointer, first, stride, end, ROWS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, WHOLE: tl.constexpr):
    """Rows first, first + 1, ... of a [rows, D] matrix; zeros past D and, unless all rows exist (WHOLE), past `end`."""
    lane = tl.arange(0, ROWS)
    column = tl.arange(0, D_PAD)
    # row * stride may exceed 2^31; lane * stride does not.
    pointers = pointer + first.to(tl.int64) * stride + lane[:, None] * stride + column[None, :]
    if WHOLE and D == D_PAD:
        return tl.load(pointers)
    if WHOLE:
        return tl.load(pointers, mask=(column < D)[None, :], other=0.0)
    inside = (first + lane < end)[:, None]
    return tl.load(pointers, mask=inside & (column < D)[None, :], other=0.0)


@triton.jit
def _whole_rows(
    described, pointer, head, first, stride, ROWS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr
):  # fmt: skip
    """_rows of which all exist: at `pointer`, or of a head of the tensor that a descriptor is of."""
    if described is None:
        rows = _rows(pointer, first, stride, first, ROWS, D, D_PAD, True)
    else:
        rows = tl.reshape(described.load([head, first, 0]), [ROWS, D_PAD])
    return rows


@triton.jit
def _store_rows(pointer, value, first, stride, end, ROWS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr):
    lane = tl.arange(0, ROWS)
    column = tl.arange(0, D_PAD)
    pointers = pointer + first.to(tl.int64) * stride + lane[:, None] * stride + column[None, :]
    mask = (first + lane < end)[:, None] & (column < D)[None, :]
    tl.store(pointers, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _tile(
    tiles_ptr, program, ORDER: tl.constexpr, BLOCK: tl.constexpr, TILE_ROWS: tl.constexpr, AGAIN: tl.constexpr = False
):
    """start, end, group start and prompt end of a program's block of rows; empty if the tile is shorter. ORDER: the
    column that says which tile it is of. AGAIN: do not take them from where they were loaded before."""
    split: tl.constexpr = TILE_ROWS // BLOCK
    tiles_ptr += tl.load(tiles_ptr + program // split * TILE_COLUMNS + ORDER, volatile=AGAIN) * TILE_COLUMNS
    start = tl.load(tiles_ptr) + program % split * BLOCK
    end = tl.minimum(tl.load(tiles_ptr + 1), start + BLOCK)
    return start, end, tl.load(tiles_ptr + 2), tl.load(tiles_ptr + 3)


@triton.jit
def _key_ranges(
    position_ptr, start, end, group_start, prompt_end, window, WINDOW: tl.constexpr, ROWS: tl.constexpr,
    STEP: tl.constexpr,
):
    """The two ranges of keys that rows start to end read, of the prompt and of their own completion: the first range's
    start and end, the second's start, the number of unmasked blocks of each."""
    position = tl.load(position_ptr + start).to(tl.int32)
    # A completion's positions continue its prompt's; while they increase by one, no other completion begins.
    own = tl.where(start < prompt_end, start, start - position + (prompt_end - group_start))
    climbs = tl.load(position_ptr + end - 1).to(tl.int32) - position == end - 1 - start
    shared = group_start
    shared_end = tl.minimum(prompt_end, start)
    if WINDOW:
        row = start + tl.arange(0, ROWS)
        nearest = tl.min(tl.load(position_ptr + row, mask=row < end, other=1 << 30).to(tl.int32), 0)
        shared = tl.minimum(group_start + tl.maximum(nearest - window + 1, 0), shared_end)
        if own == shared_end:
            own = shared
            shared_end = shared
        else:
            own = tl.maximum(own, start - window + 1)
        shared_whole = 0
        own_whole = 0
    else:
        if (own == shared_end) & climbs:
            own = shared
            shared_end = shared
        shared_whole = (shared_end - shared) // STEP
        if own == shared_end:
            own = shared + shared_whole * STEP
            shared_end = own
        own_whole = tl.where(climbs, (start - own) // STEP, 0)
    return shared, shared_end, own, shared_whole, own_whole


@triton.jit
def _floors(row, position_ptr, end, group_start, prompt_end, window, WINDOW: tl.constexpr):
    """Per row, the row index that a visible key exceeds: for prompt keys, and for other keys."""
    position = tl.load(position_ptr + row, mask=row < end, other=0).to(tl.int32)
    own_floor = row - position + (prompt_end - group_start) - 1
    prompt_floor = tl.full(row.shape, -1, tl.int32)
    if WINDOW:
        own_floor = tl.maximum(own_floor, row - window)
        prompt_floor = group_start + position - window
    return prompt_floor, own_floor


@triton.jit
def _forward_block(
    q, total, highest, out, k, v, row, prompt_floor, own_floor, prompt_end, first, end, scale, cap, CAP: tl.constexpr,
    KEYS: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Accumulate one block of keys, from `first` on, into a block of query rows."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if CAP:
        scores = tanh(scores * (scale / cap))
        factor = cap * LOG2E
    else:
        factor = scale * LOG2E
    if MASKED:
        column = (first + tl.arange(0, KEYS))[None, :]
        floor = tl.where(column < prompt_end, prompt_floor[:, None], own_floor[:, None])
        seen = (column > floor) & (column <= row[:, None]) & (column < end)
        scores = tl.where(seen, scores, -float("inf"))
    new_highest = tl.maximum(highest, tl.max(scores, 1) * factor)
    weights = tl.exp2(scores * factor - new_highest[:, None])
    decay = tl.exp2(highest - new_highest)
    total = total * decay + tl.sum(weights, 1)
    out = tl.dot(weights.to(v.dtype), v, out * decay[:, None], input_precision=PRECISION)
    return total, new_highest, out


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, tiles_ptr, position_ptr, q_stride, k_stride, v_stride, out_stride,
    q_head_stride, k_head_stride, v_head_stride, out_head_stride, tokens, heads_per_key, scale, cap, window, k_tma,
    v_tma, D: tl.constexpr, D_PAD: tl.constexpr, CAP: tl.constexpr, WINDOW: tl.constexpr, QUERIES: tl.constexpr,
    KEYS: tl.constexpr, EDGE: tl.constexpr, TILE_ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    start, end, group_start, prompt_end = _tile(tiles_ptr, tl.program_id(1), BY_KEYS, QUERIES, TILE_ROWS)
    if start >= end:
        return
    head = tl.program_id(0).to(tl.int64)
    key_head = tl.program_id(0) // heads_per_key
    q_ptr += head * q_head_stride
    k_ptr += key_head.to(tl.int64) * k_head_stride
    v_ptr += key_head.to(tl.int64) * v_head_stride
    shared, shared_end, own, shared_whole, own_whole = _key_ranges(
        position_ptr, start, end, group_start, prompt_end, window, WINDOW, QUERIES, KEYS
    )
    row = start + tl.arange(0, QUERIES)
    prompt_floor, own_floor = _floors(row, position_ptr, end, group_start, prompt_end, window, WINDOW)
    q = _rows(q_ptr, start, q_stride, end, QUERIES, D, D_PAD, False)
    highest = tl.full([QUERIES], -1.0e30, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    out = tl.zeros([QUERIES, D_PAD], tl.float32)
    for block in range(0, shared_whole + own_whole):
        first = tl.where(block < shared_whole, shared + block * KEYS, own + (block - shared_whole) * KEYS)
        k = _whole_rows(k_tma, k_ptr, key_head, first, k_stride, KEYS, D, D_PAD)
        v = _whole_rows(v_tma, v_ptr, key_head, first, v_stride, KEYS, D, D_PAD)
        total, highest, out = _forward_block(
            q, total, highest, out, k, v, row, prompt_floor, own_floor, prompt_end, first, end, scale, cap, CAP, KEYS,
            PRECISION, False,
        )  # fmt: skip
    shared += shared_whole * KEYS
    own += own_whole * KEYS
    rest = tl.cdiv(shared_end - shared, EDGE)
    for block in range(0, rest + tl.cdiv(end - own, EDGE)):
        in_prompt = block < rest
        first = tl.where(in_prompt, shared + block * EDGE, own + (block - rest) * EDGE)
        last = tl.where(in_prompt, shared_end, end)
        k = _rows(k_ptr, first, k_stride, last, EDGE, D, D_PAD, False)
        v = _rows(v_ptr, first, v_stride, last, EDGE, D, D_PAD, False)
        total, highest, out = _forward_block(
            q, total, highest, out, k, v, row, prompt_floor, own_floor, prompt_end, first, last, scale, cap, CAP, EDGE,
            PRECISION, True,
        )  # fmt: skip
    out = out / total[:, None]
    _store_rows(out_ptr + head * out_head_stride, out, start, out_stride, end, QUERIES, D, D_PAD)
    tl.store(lse_ptr + head * tokens + row, (highest + tl.log2(total)) * LN2, mask=row < end)


@triton.jit
def _weights(scores, lse, scale, cap, CAP: tl.constexpr):
    """Attention weights, and the derivative of the softcap, without the scale."""
    if CAP:
        bounded = tanh(scores * (scale / cap))
        weights = tl.exp2(bounded * (cap * LOG2E) - lse)
        slope = 1.0 - bounded * bounded
    else:
        weights = tl.exp2(scores * (scale * LOG2E) - lse)
        slope = 1.0
    return weights, slope


@triton.jit
def _grad_q_block(
    q, grad_out, grad_q, lse, delta, k, v, row, prompt_floor, own_floor, prompt_end, first, end, scale, cap,
    CAP: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    weights, slope = _weights(scores, lse[:, None], scale, cap, CAP)
    if MASKED:
        column = (first + tl.arange(0, KEYS))[None, :]
        floor = tl.where(column < prompt_end, prompt_floor[:, None], own_floor[:, None])
        seen = (column > floor) & (column <= row[:, None]) & (column < end)
        weights = tl.where(seen, weights, 0.0)
    grad_weights = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)
    grad_scores = weights * (grad_weights - delta[:, None]) * slope
    return tl.dot(grad_scores.to(k.dtype), k, grad_q, input_precision=PRECISION)


@triton.jit
def grad_q_kernel(
    grad_out_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, delta_ptr, stats_ptr, grad_q_ptr, tiles_ptr, position_ptr,
    grad_out_stride, q_stride, k_stride, v_stride, out_stride, grad_q_stride, grad_out_head_stride, q_head_stride,
    k_head_stride, v_head_stride, out_head_stride, grad_q_head_stride, tokens, heads_per_key, scale, cap, window,
    k_tma, v_tma, D: tl.constexpr, D_PAD: tl.constexpr, CAP: tl.constexpr, WINDOW: tl.constexpr, QUERIES: tl.constexpr,
    KEYS: tl.constexpr, EDGE: tl.constexpr, TILE_ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Also writes delta, the row sums of grad_out * out, which grad_kv_kernel reads, and for its loads by TMA `stats`,
    [heads, tokens, 4] fp32: the log-sum-exp in base 2, delta and two of padding, since TMA moves 16 bytes."""
    start, end, group_start, prompt_end = _tile(tiles_ptr, tl.program_id(1), BY_KEYS, QUERIES, TILE_ROWS)
    if start >= end:
        return
    head = tl.program_id(0).to(tl.int64)
    key_head = tl.program_id(0) // heads_per_key
    q_ptr += head * q_head_stride
    k_ptr += key_head.to(tl.int64) * k_head_stride
    v_ptr += key_head.to(tl.int64) * v_head_stride
    shared, shared_end, own, shared_whole, own_whole = _key_ranges(
        position_ptr, start, end, group_start, prompt_end, window, WINDOW, QUERIES, KEYS
    )
    row = start + tl.arange(0, QUERIES)
    prompt_floor, own_floor = _floors(row, position_ptr, end, group_start, prompt_end, window, WINDOW)
    grad_out = _rows(grad_out_ptr + head * grad_out_head_stride, start, grad_out_stride, end, QUERIES, D, D_PAD, False)
    out = _rows(out_ptr + head * out_head_stride, start, out_stride, end, QUERIES, D, D_PAD, False)
    delta = tl.sum(grad_out.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + head * tokens + row, delta, mask=row < end)
    lse = tl.load(lse_ptr + head * tokens + row, mask=row < end, other=0.0) * LOG2E
    if stats_ptr is not None:
        stats_ptr += (head * tokens + start) * 4 + tl.arange(0, QUERIES) * 4
        tl.store(stats_ptr, lse, mask=row < end)
        tl.store(stats_ptr + 1, delta, mask=row < end)
    q = _rows(q_ptr, start, q_stride, end, QUERIES, D, D_PAD, False)
    grad_q = tl.zeros([QUERIES, D_PAD], tl.float32)
    for block in range(0, shared_whole + own_whole):
        first = tl.where(block < shared_whole, shared + block * KEYS, own + (block - shared_whole) * KEYS)
        k = _whole_rows(k_tma, k_ptr, key_head, first, k_stride, KEYS, D, D_PAD)
        v = _whole_rows(v_tma, v_ptr, key_head, first, v_stride, KEYS, D, D_PAD)
        grad_q = _grad_q_block(
            q, grad_out, grad_q, lse, delta, k, v, row, prompt_floor, own_floor, prompt_end, first, end, scale, cap,
            CAP, KEYS, PRECISION, False,
        )  # fmt: skip
    shared += shared_whole * KEYS
    own += own_whole * KEYS
    rest = tl.cdiv(shared_end - shared, EDGE)
    for block in range(0, rest + tl.cdiv(end - own, EDGE)):
        in_prompt = block < rest
        first = tl.where(in_prompt, shared + block * EDGE, own + (block - rest) * EDGE)
        last = tl.where(in_prompt, shared_end, end)
        k = _rows(k_ptr, first, k_stride, last, EDGE, D, D_PAD, False)
        v = _rows(v_ptr, first, v_stride, last, EDGE, D, D_PAD, False)
        grad_q = _grad_q_block(
            q, grad_out, grad_q, lse, delta, k, v, row, prompt_floor, own_floor, prompt_end, first, last, scale, cap,
            CAP, EDGE, PRECISION, True,
        )  # fmt: skip
    _store_rows(grad_q_ptr + head * grad_q_head_stride, grad_q * scale, start, grad_q_stride, end, QUERIES, D, D_PAD)


@triton.jit
def _grad_kv_block(
    k, v, grad_k, grad_v, grad_out, q, stats_tma, head, lse_ptr, delta_ptr, position_ptr, column, column_position,
    readers_end, first, end, scale, cap, window, CAP: tl.constexpr, WINDOW: tl.constexpr, QUERIES: tl.constexpr,
    PRECISION: tl.constexpr, GRAD_K: tl.constexpr, GRAD_V: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Accumulate one block of query rows, from `first` on, into a block of keys. Keys are on the first axis."""
    row = first + tl.arange(0, QUERIES)
    if stats_tma is None:
        lse = tl.load(lse_ptr + row, mask=row < end, other=0.0) * LOG2E
        delta = tl.load(delta_ptr + row, mask=row < end, other=0.0)
    else:
        evens, odds = tl.split(tl.reshape(stats_tma.load([head, first, 0]), [QUERIES, 2, 2]))
        lse, _ = tl.split(evens)
        delta, _ = tl.split(odds)
    scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    weights, slope = _weights(scores, lse[None, :], scale, cap, CAP)
    if MASKED:
        seen = (row[None, :] >= column[:, None]) & (row[None, :] < tl.minimum(readers_end, end)[:, None])
        if WINDOW:
            row_position = tl.load(position_ptr + row, mask=row < end, other=0).to(tl.int32)
            seen = seen & (row_position[None, :] - column_position[:, None] < window)
        weights = tl.where(seen, weights, 0.0)
    if GRAD_V:
        grad_v = tl.dot(weights.to(grad_out.dtype), grad_out, grad_v, input_precision=PRECISION)
    if GRAD_K:
        grad_weights = tl.dot(v, tl.trans(grad_out), input_precision=PRECISION)
        grad_scores = weights * (grad_weights - delta[None, :]) * slope
        grad_k = tl.dot(grad_scores.to(q.dtype), q, grad_k, input_precision=PRECISION)
    return grad_k, grad_v


@triton.jit
def grad_kv_kernel(
    grad_out_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, grad_k_ptr, grad_v_ptr, tiles_ptr, readers_end_ptr,
    position_ptr, grad_out_stride, q_stride, k_stride, v_stride, grad_k_stride, grad_v_stride, grad_out_head_stride,
    q_head_stride, k_head_stride, v_head_stride, grad_k_head_stride, grad_v_head_stride, tokens, heads_per_key,
    scale, cap, window, grad_out_tma, q_tma, stats_tma, D: tl.constexpr, D_PAD: tl.constexpr, CAP: tl.constexpr,
    WINDOW: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, EDGE: tl.constexpr, TILE_ROWS: tl.constexpr,
    PRECISION: tl.constexpr, GRAD_K: tl.constexpr, GRAD_V: tl.constexpr,
):  # fmt: skip
    """The gradients of keys and values, or one of them: both together may not fit the registers."""
    start, end, _, prompt_end = _tile(tiles_ptr, tl.program_id(1), BY_READERS, KEYS, TILE_ROWS)
    if start >= end:
        return
    key_head = tl.program_id(0).to(tl.int64)
    column = start + tl.arange(0, KEYS)
    readers_end = tl.load(readers_end_ptr + column, mask=column < end, other=0)
    column_position = column
    last_reader = tl.max(readers_end, 0)
    whole_end = end
    if WINDOW:
        column_position = tl.load(position_ptr + column, mask=column < end, other=0).to(tl.int32)
        reach = end - 1 + window
        if (start >= prompt_end) | (reach <= prompt_end):
            # No other completion, or for keys within the prompt no completion at all, is in the window.
            last_reader = tl.minimum(last_reader, reach)
    elif end - start == KEYS:
        first_readers_end = tl.min(readers_end, 0)
        whole_end += tl.maximum(first_readers_end - end, 0) // QUERIES * QUERIES
    whole_blocks = (whole_end - end) // QUERIES
    own_blocks = tl.cdiv(end - start, EDGE)
    masked_blocks = own_blocks + tl.cdiv(last_reader - whole_end, EDGE)
    k = _rows(k_ptr + key_head * k_head_stride, start, k_stride, end, KEYS, D, D_PAD, False)
    v = _rows(v_ptr + key_head * v_head_stride, start, v_stride, end, KEYS, D, D_PAD, False)
    grad_k = tl.zeros([KEYS, D_PAD], tl.float32)
    grad_v = tl.zeros([KEYS, D_PAD], tl.float32)
    # Masked blocks come first: what they need is no longer in registers where the unmasked ones run. Heads and blocks
    # are counted up, not divided: a division in the loop takes as many instructions as its exponentials.
    head = tl.program_id(0) * heads_per_key
    block = 0
    for _ in range(0, heads_per_key * masked_blocks):
        far = head.to(tl.int64)
        is_own = block < own_blocks
        first = tl.where(is_own, start + block * EDGE, whole_end + (block - own_blocks) * EDGE)
        last = tl.where(is_own, end, last_reader)
        q = _rows(q_ptr + far * q_head_stride, first, q_stride, last, EDGE, D, D_PAD, False)
        grad_out = _rows(
            grad_out_ptr + far * grad_out_head_stride, first, grad_out_stride, last, EDGE, D, D_PAD, False
        )
        grad_k, grad_v = _grad_kv_block(
            k, v, grad_k, grad_v, grad_out, q, None, head, lse_ptr + far * tokens, delta_ptr + far * tokens,
            position_ptr, column, column_position, readers_end, first, last, scale, cap, window, CAP, WINDOW, EDGE,
            PRECISION, GRAD_K, GRAD_V, True,
        )  # fmt: skip
        block += 1
        head = tl.where(block < masked_blocks, head, head + 1)
        block = tl.where(block < masked_blocks, block, 0)
    head = tl.program_id(0) * heads_per_key
    first = end
    for _ in range(0, heads_per_key * whole_blocks):
        far = head.to(tl.int64)
        q = _whole_rows(q_tma, q_ptr + far * q_head_stride, head, first, q_stride, QUERIES, D, D_PAD)
        grad_out = _whole_rows(
            grad_out_tma, grad_out_ptr + far * grad_out_head_stride, head, first, grad_out_stride, QUERIES, D, D_PAD
        )
        grad_k, grad_v = _grad_kv_block(
            k, v, grad_k, grad_v, grad_out, q, stats_tma, head, lse_ptr + far * tokens, delta_ptr + far * tokens,
            position_ptr, column, column_position, readers_end, first, whole_end, scale, cap, window, CAP, WINDOW,
            QUERIES, PRECISION, GRAD_K, GRAD_V, False,
        )  # fmt: skip
        first += QUERIES
        head = tl.where(first < whole_end, head, head + 1)
        first = tl.where(first < whole_end, first, end)
    # Loaded again, so that the loops above have the registers for themselves.
    start, end, _, _ = _tile(tiles_ptr, tl.program_id(1), BY_READERS, KEYS, TILE_ROWS, True)
    key_head = tl.program_id(0).to(tl.int64)
    if GRAD_K:
        grad_k_ptr += key_head * grad_k_head_stride
        _store_rows(grad_k_ptr, grad_k * scale, start, grad_k_stride, end, KEYS, D, D_PAD)
    if GRAD_V:
        _store_rows(grad_v_ptr + key_head * grad_v_head_stride, grad_v, start, grad_v_stride, end, KEYS, D, D_PAD)
