"""Sampling without sorting the vocabulary: one pass over the logits in parts, then a program per row that draws.

For top_k and top_p the largest logits and the sums of every SUB tokens bound from below what can be kept. A second pass
collects the candidates, mostly few, and they are sorted. A row with more than CANDIDATES of them is drawn by bisection
on the logit instead: the mass above a threshold needs a pass over the row and no order. Equal logits rank by token id.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch

CHUNK, SCAN_WARPS, DRAW_WARPS = 2048, 4, 16
SUB, CANDIDATES, BOUND_WARPS = 128, 1024, 4
ROWS = 32  # of a program that advances them
_STEP = tl.constexpr(0x9E3779B97F4A7C15 - (1 << 64))
_MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9 - (1 << 64))
_MIX_2 = tl.constexpr(0x94D049BB133111EB - (1 << 64))
# Bits of an fp32 number that are 0 in every number of the dtype.
SHIFT = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}


@triton.jit(do_not_specialize=["stats_stride", "sub_stride"])
def scan_kernel(
    logits_ptr, stats_ptr, first_ptr, sub_ptr, vocab, logits_stride, chunks, stats_stride, sub_stride, temperature,
    CHUNK: tl.constexpr, SUB: tl.constexpr, TEMPERED: tl.constexpr, TRUNCATED: tl.constexpr,
):  # fmt: skip
    """A chunk's largest logit, the first token that has it, and sums of exp(logit - largest) at temperature 1 and at
    `temperature`. TRUNCATED: also of every SUB tokens the largest logit and the sum at `temperature`."""
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = token < vocab
    x = tl.load(logits_ptr + row * logits_stride + token, mask=inside, other=-float("inf")).to(tl.float32)
    highest = tl.max(x, 0)
    at = row * chunks + chunk
    tl.store(first_ptr + at, tl.min(tl.where(inside & (x == highest), token, vocab), 0))
    less = x - tl.where(highest == -float("inf"), 0.0, highest)
    tl.store(stats_ptr + at, highest)
    tl.store(stats_ptr + stats_stride + at, tl.sum(tl.exp(less), 0))
    weights = tl.exp(less)
    if TEMPERED:
        weights = tl.exp(less / temperature)
        tl.store(stats_ptr + 2 * stats_stride + at, tl.sum(weights, 0))
    if TRUNCATED:
        sub = at * (CHUNK // SUB) + tl.arange(0, CHUNK // SUB)
        tl.store(sub_ptr + sub, tl.max(tl.reshape(x, (CHUNK // SUB, SUB)), 1))
        tl.store(sub_ptr + sub_stride + sub, tl.sum(tl.reshape(weights, (CHUNK // SUB, SUB)), 1))


@triton.jit
def _shift_right(x, BITS: tl.constexpr):
    return (x >> BITS) & ((1 << (64 - BITS)) - 1)


@triton.jit
def _mix(x):
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


@triton.jit
def _uniform(key, position):
    """strop.kernels.sampling.uniform"""
    bits = _shift_right(_mix(_mix(key) + (position + 1) * _STEP), 11)
    return (bits.to(tl.float64) + 0.5) * 1.1102230246251565e-16


@triton.jit
def _rank(x, SHIFT: tl.constexpr):
    """An int32 that orders as the fp32 x does, consecutive for consecutive numbers of the logits' dtype."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def _above(row_ptr, vocab, threshold, highest, temperature, CHUNK: tl.constexpr, SHIFT: tl.constexpr):
    """Number and mass of the tokens that rank above the threshold."""
    count = tl.zeros([CHUNK], tl.int32)
    mass = tl.zeros([CHUNK], tl.float32)
    for first in range(0, vocab, CHUNK):
        token = first + tl.arange(0, CHUNK)
        inside = token < vocab
        x = tl.load(row_ptr + token, mask=inside, other=-float("inf")).to(tl.float32)
        above = inside & (_rank(x, SHIFT) > threshold.to(tl.int32))
        count += above.to(tl.int32)
        mass += tl.where(above, tl.exp((x - highest) / temperature), 0.0)
    return tl.sum(count, 0), tl.sum(mass.to(tl.float64), 0)


@triton.jit
def _value(rank, SHIFT: tl.constexpr):
    """The logit of a rank: _rank's inverse."""
    bits = rank << SHIFT
    if SHIFT > 0:
        bits = tl.where(bits < 0, bits | ((1 << SHIFT) - 1), bits)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["sub_stride", "top_k"])
def bound_kernel(
    stats_ptr, sub_ptr, bound_ptr, count_ptr, chunks, sub_stride, temperature, top_k, top_p, PER_CHUNK: tl.constexpr,
    SUB: tl.constexpr, SUBS: tl.constexpr, SHIFT: tl.constexpr, TOP_K: tl.constexpr,
):  # fmt: skip
    """The rank from which on a row's tokens are candidates: at least top_k of them, or for top_p alone so many that
    the others cannot hold more than it leaves out."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, SUBS)
    inside = lane < chunks * PER_CHUNK
    at = row * chunks * PER_CHUNK + lane
    largest = tl.load(sub_ptr + at, mask=inside, other=-float("inf"))
    highest = tl.max(largest, 0)
    ranks = _rank(largest, SHIFT)
    mass = tl.zeros([SUBS], tl.float64)
    left_out = tl.full([], 0.0, tl.float64)
    if not TOP_K:
        of_chunk = tl.load(stats_ptr + row * chunks + lane // PER_CHUNK, mask=inside, other=-float("inf"))
        mass = tl.load(sub_ptr + sub_stride + at, mask=inside, other=0.0).to(tl.float64)
        mass = mass * tl.exp((of_chunk - highest) / temperature).to(tl.float64)
        left_out = tl.sum(mass, 0) * ((1.0 - top_p) * 0.999)
    low = _rank(-float("inf") + highest * 0.0, SHIFT).to(tl.int64)
    high = _rank(highest, SHIFT).to(tl.int64) + 1
    while high - low > 1:
        middle = low + (high - low) // 2
        within = inside & (ranks >= middle.to(tl.int32))
        number = tl.sum(within.to(tl.int32), 0)
        if TOP_K:
            enough = number >= top_k
        else:
            weight = tl.exp((_value(middle.to(tl.int32), SHIFT) - highest) / temperature).to(tl.float64)
            enough = tl.sum(tl.where(within, 0.0, mass), 0) + weight * SUB * number <= left_out
        if enough:
            low = middle
        else:
            high = middle
    tl.store(bound_ptr + row, low.to(tl.int32))
    tl.store(count_ptr + row, 0)


@triton.jit(do_not_specialize=["chunks"])
def collect_kernel(
    logits_ptr, stats_ptr, bound_ptr, count_ptr, candidate_ptr, vocab, logits_stride, chunks, CHUNK: tl.constexpr,
    CANDIDATES: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Append a chunk's candidates, in any order: the rank above, below it the token, so that small tokens are large."""
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    bound = tl.load(bound_ptr + row)
    if _rank(tl.load(stats_ptr + row * chunks + chunk), SHIFT) < bound:
        return
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = token < vocab
    x = tl.load(logits_ptr + row * logits_stride + token, mask=inside, other=-float("inf")).to(tl.float32)
    rank = _rank(x, SHIFT)
    taken = inside & (rank >= bound)
    number = tl.sum(taken.to(tl.int32), 0)
    place = tl.atomic_add(count_ptr + row, number) + tl.cumsum(taken.to(tl.int32), 0) - 1
    candidate = (rank.to(tl.int64) << 32) | (0x7FFFFFFF - token)
    tl.store(candidate_ptr + row * CANDIDATES + place, candidate, mask=taken & (place < CANDIDATES))


@triton.jit
def _draw_candidate(
    candidate_ptr, number, u, total, highest, temperature, top_k, top_p, CANDIDATES: tl.constexpr, SHIFT: tl.constexpr,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, CANDIDATES)
    candidate = tl.load(candidate_ptr + lane, mask=lane < number, other=-(1 << 63))
    candidate = tl.sort(candidate, descending=True)
    kept = lane < number
    if TOP_K:
        kept = kept & (lane < top_k)
    value = _value((candidate >> 32).to(tl.int32), SHIFT)
    weights = tl.where(kept, tl.exp((value - highest) / temperature), 0.0).to(tl.float64)
    cumulative = tl.cumsum(weights, 0)
    if TOP_K:
        total = tl.max(cumulative, 0)
    if TOP_P:
        threshold = total * top_p
        kept = kept & ((cumulative < threshold) | (lane == tl.sum((cumulative < threshold).to(tl.int32), 0)))
        total = tl.max(tl.where(kept, cumulative, 0.0), 0)
    target = tl.minimum(u * total, total - total * 2.220446049250313e-16)
    chosen = tl.sum((kept & (cumulative <= target)).to(tl.int32), 0)
    token = 0x7FFFFFFF - (candidate & 0x7FFFFFFF).to(tl.int32)
    return tl.max(tl.where(lane == chosen, token, 0), 0)


@triton.jit
def _draw_by_bisection(
    row_ptr, vocab, u, total, highest, temperature, top_k, top_p, CHUNK: tl.constexpr, SHIFT: tl.constexpr,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr,
):  # fmt: skip
    low = _rank(-float("inf") + highest * 0.0, SHIFT).to(tl.int64) - 1
    top = _rank(highest, SHIFT).to(tl.int64)
    if TOP_K:
        high = top
        kept = 0
        mass = tl.full([], 0.0, tl.float64)
        while high - low > 1:
            middle = low + (high - low) // 2
            found, found_mass = _above(row_ptr, vocab, middle, highest, temperature, CHUNK, SHIFT)
            if found < top_k:
                high = middle
                kept = found
                mass = found_mass
            else:
                low = middle
        weight = tl.exp((_value(high.to(tl.int32), SHIFT) - highest) / temperature).to(tl.float64)
        total = mass + weight * (top_k - kept)
        low = high - 1
    if TOP_P:
        if not TOP_K:
            # All tokens of less than this weight together hold less than what top_p leaves out.
            least = tl.log((1.0 - top_p) * total.to(tl.float32) / vocab) - 0.01
            bound = highest + temperature * least - 1e-6 * tl.abs(highest)
            low = tl.maximum(low, _rank(bound, SHIFT).to(tl.int64) - 1)
        threshold = total * top_p
        high = top
        mass = tl.full([], 0.0, tl.float64)
        while high - low > 1:
            middle = low + (high - low) // 2
            _, found_mass = _above(row_ptr, vocab, middle, highest, temperature, CHUNK, SHIFT)
            if found_mass < threshold:
                high = middle
                mass = found_mass
            else:
                low = middle
        weight = tl.exp((_value(high.to(tl.int32), SHIFT) - highest) / temperature).to(tl.float64)
        number = tl.maximum(tl.ceil((threshold - mass) / weight), 1.0)
        low = high - 1
        # Rounded, the number may exceed that of the equal logits.
        _, all_equal = _above(row_ptr, vocab, low, highest, temperature, CHUNK, SHIFT)
        total = tl.where(weight > 0, tl.minimum(mass + weight * number, all_equal), mass)
    target = tl.minimum(u * total, total - total * 2.220446049250313e-16)
    high = top
    mass = tl.full([], 0.0, tl.float64)
    while high - low > 1:
        middle = low + (high - low) // 2
        _, found_mass = _above(row_ptr, vocab, middle, highest, temperature, CHUNK, SHIFT)
        if found_mass <= target:
            high = middle
            mass = found_mass
        else:
            low = middle
    weight = tl.exp((_value(high.to(tl.int32), SHIFT) - highest) / temperature).to(tl.float64)
    wanted = tl.where(weight > 0, tl.floor((target - mass) / weight), 0.0).to(tl.int32)
    token = 0
    before = 0
    for first in range(0, vocab, CHUNK):
        lanes = first + tl.arange(0, CHUNK)
        x = tl.load(row_ptr + lanes, mask=lanes < vocab, other=-float("inf")).to(tl.float32)
        equal = (lanes < vocab) & (_rank(x, SHIFT) == high.to(tl.int32))
        count = tl.sum(equal.to(tl.int32), 0)
        if (count > 0) & (before <= wanted):
            place = before + tl.cumsum(equal.to(tl.int32), 0) - 1
            token = tl.max(tl.where(equal & (place <= wanted), lanes, 0), 0)
        before += count
    return token


@triton.jit(do_not_specialize=["stats_stride", "top_k"])
def draw_kernel(
    logits_ptr, stats_ptr, first_ptr, count_ptr, candidate_ptr, key_ptr, position_ptr, token_ptr, logp_ptr, vocab,
    logits_stride, chunks, stats_stride, temperature, top_k, top_p, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    CANDIDATES: tl.constexpr, SHIFT: tl.constexpr, GREEDY: tl.constexpr, TEMPERED: tl.constexpr, TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, CHUNKS)
    inside = lane < chunks
    at = row * chunks + lane
    row_ptr = logits_ptr + row * logits_stride
    chunk_highest = tl.load(stats_ptr + at, mask=inside, other=-float("inf"))
    highest = tl.max(chunk_highest, 0)
    less = chunk_highest - highest
    masses = tl.load(stats_ptr + stats_stride + at, mask=inside, other=0.0).to(tl.float64) * tl.exp(less).to(tl.float64)
    lse = highest + tl.log(tl.sum(masses, 0).to(tl.float32))
    if GREEDY:
        first = tl.load(first_ptr + at, mask=inside, other=0)
        token = tl.min(tl.where(inside & (chunk_highest == highest), first, vocab), 0)
    else:
        if TEMPERED:
            masses = tl.load(stats_ptr + 2 * stats_stride + at, mask=inside, other=0.0).to(tl.float64)
            masses = masses * tl.exp(less / temperature).to(tl.float64)
        u = _uniform(tl.load(key_ptr + row), tl.load(position_ptr + row))
        cumulative = tl.cumsum(masses, 0)
        total = tl.max(cumulative, 0)
        if TOP_K or TOP_P:
            number = tl.load(count_ptr + row)
            if number <= CANDIDATES:
                token = _draw_candidate(
                    candidate_ptr + row * CANDIDATES, number, u, total, highest, temperature, top_k, top_p, CANDIDATES,
                    SHIFT, TOP_K, TOP_P,
                )  # fmt: skip
            else:
                token = _draw_by_bisection(
                    row_ptr, vocab, u, total, highest, temperature, top_k, top_p, CHUNK, SHIFT, TOP_K, TOP_P
                )
        else:
            target = tl.minimum(u * total, total - total * 2.220446049250313e-16)
            chunk = tl.minimum(tl.sum((inside & (cumulative <= target)).to(tl.int32), 0), chunks - 1)
            before = tl.max(tl.where(lane < chunk, cumulative, 0.0), 0)
            within = (target - before) / tl.sum(tl.where(lane == chunk, masses, 0.0), 0)
            lanes = chunk * CHUNK + tl.arange(0, CHUNK)
            x = tl.load(row_ptr + lanes, mask=lanes < vocab, other=-float("inf")).to(tl.float32)
            # The chunk's mass and this sum differ by rounding: take the fraction, not the mass.
            sums = tl.cumsum(tl.exp((x - highest) / temperature).to(tl.float64), 0)
            end = tl.max(sums, 0)
            target = tl.minimum(within * end, end - end * 2.220446049250313e-16)
            token = tl.minimum(chunk * CHUNK + tl.sum((sums <= target).to(tl.int32), 0), vocab - 1)
    tl.store(token_ptr + row, token.to(tl.int64))
    tl.store(logp_ptr + row, tl.load(row_ptr + token).to(tl.float32) - lse)


@triton.jit(do_not_specialize=["draws", "state_stride", "out_stride", "stops", "max_new_tokens"])
def advance_kernel(
    state_ptr, length_ptr, out_ptr, token_ptr, logp_ptr, row_ptr, position_ptr, key_ptr, stops_ptr, draws, state_stride,
    out_stride, stops, max_new_tokens, FRESH: tl.constexpr, ROWS: tl.constexpr, STOPS: tl.constexpr,
):  # fmt: skip
    draw = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = draw < draws
    token = tl.load(token_ptr + draw, mask=inside, other=0)
    stop = tl.load(stops_ptr + tl.arange(0, STOPS), mask=tl.arange(0, STOPS) < stops, other=-1)
    ended = tl.max((token[:, None] == stop[None, :]).to(tl.int32), 1) > 0
    if FRESH:
        row = tl.load(row_ptr + draw, mask=inside, other=0)
        position = tl.load(position_ptr + draw, mask=inside, other=0)
        drawn = tl.full([ROWS], 1, tl.int64)
        tl.store(state_ptr + 3 * state_stride + row, tl.load(key_ptr + draw, mask=inside, other=0), mask=inside)
        live = inside
    else:
        row = draw.to(tl.int64)
        live = inside & (tl.load(length_ptr + row, mask=inside, other=-1) >= 0)
        position = tl.load(state_ptr + state_stride + row, mask=live, other=0) + 1
        drawn = tl.load(state_ptr + 2 * state_stride + row, mask=live, other=0) + 1
    ended = ended | (drawn >= max_new_tokens)
    tl.store(state_ptr + row, token, mask=live)
    tl.store(state_ptr + state_stride + row, position, mask=live)
    tl.store(state_ptr + 2 * state_stride + row, drawn, mask=live)
    tl.store(length_ptr + row, tl.where(ended, -1, drawn - 1).to(tl.int32), mask=live)
    tl.store(out_ptr + draw, tl.where(live, token, -1).to(tl.float32), mask=inside)
    tl.store(out_ptr + out_stride + draw, tl.load(logp_ptr + draw, mask=inside, other=0.0), mask=inside)


def sample_tokens(
    logits: Tensor, key: Tensor, position: Tensor, temperature: float, top_k: int, top_p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """strop.kernels.sample_tokens on logits of a dtype in SHIFT."""
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    rows, vocab = logits.shape
    chunks = triton.cdiv(vocab, CHUNK)
    stats = torch.empty(3, rows, chunks, dtype=torch.float32, device=logits.device)
    first = torch.empty(rows, chunks, dtype=torch.int32, device=logits.device)
    token, logp = key.new_empty(rows), stats.new_empty(rows)
    greedy, tempered = temperature == 0, temperature not in (0, 1)
    heat, shift = temperature if tempered else 1.0, SHIFT[logits.dtype]
    by_k, by_p = not greedy and 0 < top_k < vocab, not greedy and top_p < 1
    truncated, per_chunk = by_k or by_p, CHUNK // SUB
    sub, count, candidate = stats, first, key  # not read
    if truncated:
        sub = stats.new_empty(2, rows, chunks * per_chunk)
        bound, count = first.new_empty(2, rows)
        candidate = key.new_empty(rows, CANDIDATES)
    launch(scan_kernel, (chunks, rows), logits, stats, first, sub, vocab, logits.stride(0), chunks, stats.stride(0),
           sub.stride(0), heat, CHUNK=CHUNK, SUB=SUB, TEMPERED=tempered, TRUNCATED=truncated, num_warps=SCAN_WARPS)
    if truncated:
        launch(bound_kernel, (rows,), stats, sub, bound, count, chunks, sub.stride(0), heat, top_k, top_p,
               PER_CHUNK=per_chunk, SUB=SUB, SUBS=triton.next_power_of_2(chunks * per_chunk), SHIFT=shift, TOP_K=by_k,
               num_warps=BOUND_WARPS)
        launch(collect_kernel, (chunks, rows), logits, stats, bound, count, candidate, vocab, logits.stride(0), chunks,
               CHUNK=CHUNK, CANDIDATES=CANDIDATES, SHIFT=shift, num_warps=SCAN_WARPS)
    launch(draw_kernel, (rows,), logits, stats, first, count, candidate, key.contiguous(), position.contiguous(), token,
           logp, vocab, logits.stride(0), chunks, stats.stride(0), heat, top_k, top_p, CHUNK=CHUNK,
           CHUNKS=triton.next_power_of_2(chunks), CANDIDATES=CANDIDATES, SHIFT=shift, GREEDY=greedy, TEMPERED=tempered,
           TOP_K=by_k, TOP_P=by_p, num_warps=DRAW_WARPS)
    return token, logp


def advance_rows(
    state: Tensor, length: Tensor, out: Tensor, token: Tensor, logp: Tensor, stops: Tensor, max_new_tokens: int,
    row: Tensor | None, position: Tensor | None, key: Tensor | None,
) -> None:  # fmt: skip
    """strop.kernels.sampling.advance_rows; the tensors are contiguous."""
    fresh = (token,) * 3 if row is None else (row, position, key)
    launch(advance_kernel, (triton.cdiv(len(token), ROWS),), state, length, out, token, logp, *fresh, stops, len(token),
           state.stride(0), out.stride(0), len(stops), max_new_tokens, FRESH=row is not None, ROWS=ROWS,
           STOPS=triton.next_power_of_2(max(1, len(stops))), num_warps=1)
