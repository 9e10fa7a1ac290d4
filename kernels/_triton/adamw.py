"""AdamW in one pass over memory, on every form of its state, for one tensor or for many.

Bytes a parameter with a bf16 gradient and weight: 30, with an fp32 gradient 32; with split masters 2 less, with bf16
moments 8 less, with 8-bit moments 12 less.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..optimizer import formats
from ..optimizer.formats import State
from . import launch
from .tables import ALIGN, Table, pointer

BLOCK, WARPS = 2048, 4
ROWS = BLOCK // formats.BLOCK  # blocks of 8-bit codes of a program
FLOAT32, BFLOAT16, INT8 = range(3)  # forms of the moments
# the constants of adamw_many_kernel that are the same for all tensors of a Group
FORM = ("IS_BF16", "WEIGHT", "SPLIT", "MOMENTS", "ROWS", "BLOCK", "num_warps", "DIVISIBLE")


def _flat(table: list[tuple[float, float]]) -> tuple[float, ...]:
    return tuple(number for pair in table for number in pair)


_SIGNED, _UNSIGNED = (tl.constexpr(_flat(formats.decades(n))) for n in (formats.SIGNED, formats.UNSIGNED))
_SMALLEST = tl.constexpr(formats.SMALLEST)


@triton.jit
def _noise(key, index):
    """formats.noise."""
    x = index.to(tl.uint32) * 0x9E3779B1 + key.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0x735A2D97
    return x ^ (x >> 15)


@triton.jit
def _round_to_bf16(x, draw):
    """formats.round_stochastically, as int16."""
    return ((x.to(tl.int32, bitcast=True) + draw.to(tl.int32)) >> 16).to(tl.int16)


@triton.jit
def _from_bf16(bits):
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _encode(x, scale, TABLE: tl.constexpr, COUNT: tl.constexpr):
    """formats.quantize of magnitudes up to `scale`, as fp32 whole numbers; of x exactly between two codes either."""
    share = x * tl.where(scale > _SMALLEST, 1 / tl.maximum(scale, _SMALLEST), 0.0)
    slope, start = tl.full(x.shape, TABLE[0], tl.float32), tl.full(x.shape, TABLE[1], tl.float32)
    for d in tl.static_range(1, COUNT + 1):
        above = share > 10.0 ** (d - 1 - COUNT)
        slope = tl.where(above, TABLE[2 * d], slope)
        start = tl.where(above, TABLE[2 * d + 1], start)
    return tl.floor(share * slope + (start + 0.5))


@triton.jit
def _decode(code, TABLE: tl.constexpr, COUNT: tl.constexpr):
    """formats.values of codes, fp32 whole numbers from 0 on."""
    unit, start = tl.full(code.shape, 1 / TABLE[0], tl.float32), tl.full(code.shape, TABLE[1], tl.float32)
    for d in tl.static_range(1, COUNT + 1):
        above = code >= 2**d
        unit = tl.where(above, 1 / TABLE[2 * d], unit)
        start = tl.where(above, TABLE[2 * d + 1], start)
    return (code - start) * unit


@triton.jit
def _step(
    program, master_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, weight_ptr, factor, scale_ptr, scale_sq_ptr, count,
    width, keep, step_size, rest1, beta2, rest2, root2, eps, key, first, WEIGHT: tl.constexpr, SPLIT: tl.constexpr,
    MOMENTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program number `program` of a tensor. bf16 moments, and the weight of a split master, come as int16. With 8-bit
    moments a program has ROWS blocks of BLOCK elements that do not cross rows of `width`, and count is the number of
    blocks; else BLOCK elements."""
    if MOMENTS == 2:
        blocks = (width + BLOCK - 1) // BLOCK
        block = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        column = (block % blocks * BLOCK)[:, None] + tl.arange(0, BLOCK)[None, :]
        at = (block // blocks * width)[:, None] + column
        inside = (block < count)[:, None] & (column < width)
    else:
        at = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < count
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32) * factor
    exp_avg = tl.load(exp_avg_ptr + at, mask=inside, other=0)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + at, mask=inside, other=0)
    if MOMENTS == 1:
        exp_avg, exp_avg_sq = _from_bf16(exp_avg), _from_bf16(exp_avg_sq)
    if MOMENTS == 2:
        codes = exp_avg.to(tl.float32)
        scale = tl.load(scale_ptr + block, mask=block < count, other=0.0)[:, None]
        scale_sq = tl.load(scale_sq_ptr + block, mask=block < count, other=0.0)[:, None]
        exp_avg = _decode(tl.abs(codes), _SIGNED, 6) * tl.where(codes < 0, -scale, scale)
        exp_avg_sq = _decode(exp_avg_sq.to(tl.float32), _UNSIGNED, 7) * scale_sq
    master = tl.load(master_ptr + at, mask=inside, other=0)
    if SPLIT:
        high = tl.load(weight_ptr + at, mask=inside, other=0).to(tl.int32) << 16
        master = (high + master.to(tl.int32)).to(tl.float32, bitcast=True)
    exp_avg += (grad - exp_avg) * rest1
    exp_avg_sq = exp_avg_sq * beta2 + grad * grad * rest2
    master = master * keep - step_size * exp_avg / (tl.sqrt_rn(exp_avg_sq) / root2 + eps)
    if MOMENTS == 0:
        tl.store(exp_avg_ptr + at, exp_avg, mask=inside)
        tl.store(exp_avg_sq_ptr + at, exp_avg_sq, mask=inside)
    if MOMENTS == 1:
        draw = _noise(key, at + first)
        tl.store(exp_avg_ptr + at, _round_to_bf16(exp_avg, draw & 0xFFFF), mask=inside)
        tl.store(exp_avg_sq_ptr + at, _round_to_bf16(exp_avg_sq, draw >> 16), mask=inside)
    if MOMENTS == 2:
        # what is outside the row decays to 0 from 0
        scale = tl.max(tl.abs(exp_avg), axis=1)
        scale_sq = tl.max(exp_avg_sq, axis=1)
        codes = _encode(tl.abs(exp_avg), scale[:, None], _SIGNED, 6)
        codes_sq = tl.maximum(_encode(exp_avg_sq, scale_sq[:, None], _UNSIGNED, 7), 1.0)
        tl.store(exp_avg_ptr + at, tl.where(exp_avg < 0, -codes, codes).to(tl.int8), mask=inside)
        tl.store(exp_avg_sq_ptr + at, codes_sq.to(tl.uint8), mask=inside)
        tl.store(scale_ptr + block, scale, mask=block < count)
        tl.store(scale_sq_ptr + block, scale_sq, mask=block < count)
    if SPLIT:
        bits = master.to(tl.int32, bitcast=True)
        tl.store(weight_ptr + at, ((bits + 0x8000) >> 16).to(tl.int16), mask=inside)
        tl.store(master_ptr + at, bits.to(tl.int16), mask=inside)
    else:
        tl.store(master_ptr + at, master, mask=inside)
    if WEIGHT:
        tl.store(weight_ptr + at, master.to(weight_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["key", "first"])
def adamw_kernel(
    master_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, weight_ptr, factor_ptr, scale_ptr, scale_sq_ptr, count, width,
    keep, step_size, rest1, beta2, rest2, root2, eps, key, first, WEIGHT: tl.constexpr, SPLIT: tl.constexpr,
    MOMENTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    _step(tl.program_id(0), master_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, weight_ptr, tl.load(factor_ptr),
          scale_ptr, scale_sq_ptr, count, width, keep, step_size, rest1, beta2, rest2, root2, eps, key, first, WEIGHT,
          SPLIT, MOMENTS, ROWS, BLOCK)  # fmt: skip


@triton.jit(do_not_specialize=["seed"])
def adamw_many_kernel(
    entries_ptr, owner_ptr, factor_ptr, keep, step_size, rest1, beta2, rest2, root2, eps, seed, IS_BF16: tl.constexpr,
    WEIGHT: tl.constexpr, SPLIT: tl.constexpr, MOMENTS: tl.constexpr, DIVISIBLE: tl.constexpr, ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """adamw_kernel on the tensors of a Group's table. IS_BF16: the gradients are. DIVISIBLE: count, or with 8-bit
    moments width, is a multiple of 16. The key is formats.key_of(step, number), seed that of the step."""
    program = tl.program_id(0)
    entry_ptr = entries_ptr + tl.load(owner_ptr + program).to(tl.int64) * 12
    master = tl.load(entry_ptr)
    grad = tl.load(entry_ptr + 1)
    exp_avg = tl.load(entry_ptr + 2)
    exp_avg_sq = tl.load(entry_ptr + 3)
    weight = tl.load(entry_ptr + 4)
    count = tl.load(entry_ptr + 8)
    width = tl.load(entry_ptr + 9)
    if DIVISIBLE and MOMENTS == 2:
        width = tl.multiple_of(width, 16)
    elif DIVISIBLE:
        count = tl.multiple_of(count, 16)
    key = _noise(tl.full([], 0, tl.uint32), seed.to(tl.uint32) ^ tl.load(entry_ptr + 11).to(tl.uint32)) >> 1
    _step(
        program - tl.load(entry_ptr + 7), pointer(master, tl.int16 if SPLIT else tl.float32, ALIGNED),
        pointer(grad, tl.bfloat16 if IS_BF16 else tl.float32, ALIGNED),
        pointer(exp_avg, tl.float32 if MOMENTS == 0 else tl.int16 if MOMENTS == 1 else tl.int8, ALIGNED),
        pointer(exp_avg_sq, tl.float32 if MOMENTS == 0 else tl.int16 if MOMENTS == 1 else tl.uint8, ALIGNED),
        pointer(weight, tl.int16 if SPLIT else tl.bfloat16, ALIGNED), tl.load(factor_ptr),
        pointer(tl.load(entry_ptr + 5), tl.float32, ALIGNED), pointer(tl.load(entry_ptr + 6), tl.float32, ALIGNED),
        count, width, keep, step_size, rest1, beta2, rest2, root2, eps, key, tl.load(entry_ptr + 10), WEIGHT, SPLIT,
        MOMENTS, ROWS, BLOCK,
    )  # fmt: skip


def numbers_of(lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int) -> tuple[float, ...]:
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    return 1 - lr * weight_decay, lr / correction1, 1 - beta1, beta2, 1 - beta2, math.sqrt(correction2), eps


def _form(master: Tensor, exp_avg: Tensor, weight: Tensor | None, scales: tuple[Tensor, Tensor] | None) -> dict:
    """The constants of a kernel for these tensors."""
    split = master.dtype == torch.int16
    moments = INT8 if scales is not None else BFLOAT16 if exp_avg.dtype == torch.bfloat16 else FLOAT32
    return {"WEIGHT": weight is not None and not split, "SPLIT": split, "MOMENTS": moments, "ROWS": ROWS,
            "BLOCK": formats.BLOCK if scales is not None else BLOCK, "num_warps": WARPS}


def _sizes(master: Tensor, scales: tuple[Tensor, Tensor] | None) -> tuple[int, int, int]:
    """(programs, count, width) of a tensor."""
    if scales is None:
        return triton.cdiv(master.numel(), BLOCK), master.numel(), 1
    return triton.cdiv(scales[0].numel(), ROWS), scales[0].numel(), master[0].numel()


def adamw_(
    master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, weight: Tensor | None, factor: Tensor,
    scales: tuple[Tensor, Tensor] | None, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
    step: int, key: int, first: int,
) -> None:
    """strop.kernels.optimizer.adamw_ on contiguous tensors of one size; factor stays on the device."""
    form, (programs, *sizes) = _form(master, exp_avg, weight, scales), _sizes(master, scales)
    if form["MOMENTS"] == BFLOAT16:
        exp_avg, exp_avg_sq = exp_avg.view(torch.int16), exp_avg_sq.view(torch.int16)
    third = master if weight is None else weight.view(torch.int16) if form["SPLIT"] else weight
    tensors = (master, grad, exp_avg, exp_avg_sq, third, factor, *(scales or (factor, factor)))
    numbers = numbers_of(lr, beta1, beta2, eps, weight_decay, step)
    launch(adamw_kernel, (programs,), *tensors, *sizes, *numbers, key, first, **form)


class Group:
    """Tensors that one launch updates. members: their places among all; form: the values of FORM."""

    def __init__(self, states: Sequence[State], members: Sequence[int], form: Sequence[int]):
        self.members, self.form, mine = members, [int(x) for x in form], [states[i] for i in members]
        scales = [state.scales or (None, None) for state in mine]
        columns = ([s.master for s in mine], [s.exp_avg for s in mine], [s.exp_avg_sq for s in mine],
                   [s.weight for s in mine], [pair[0] for pair in scales], [pair[1] for pair in scales])
        self.master, *self.rest = ([s.master if x is None else x for s, x in zip(mine, column, strict=True)]
                                   for column in columns)
        sizes = [_sizes(s.master, s.scales) for s in mine]
        numbers = [(count, width, s.first, s.number) for s, (_, count, width) in zip(mine, sizes, strict=True)]
        self.table = Table([programs for programs, *_ in sizes], numbers, self.master[0].device)

    def step(self, grads: Sequence[Tensor], factor: Tensor, numbers: list[float], seed: int) -> None:
        mine = [grads[i].contiguous() for i in self.members]
        self.table.point_to(self.master, mine, *self.rest)
        torch.ops.strop.adamw_many(self.table.entries, self.table.owner, factor, numbers, seed,
                                   self.form, self.table.aligned)


def groups_of(states: Sequence[State], dtypes: Sequence[torch.dtype]) -> list[Group]:
    """The launches that update all tensors with gradients of these dtypes."""
    found: dict[tuple, list[int]] = {}
    for i, (state, dtype) in enumerate(zip(states, dtypes, strict=True)):
        if state.master.numel():
            _, count, width = _sizes(state.master, state.scales)
            form = _form(state.master, state.exp_avg, state.weight, state.scales)
            form["IS_BF16"] = dtype == torch.bfloat16
            form["DIVISIBLE"] = (count if state.scales is None else width) % ALIGN == 0
            found.setdefault(tuple(form[name] for name in FORM), []).append(i)
    return [Group(states, members, form) for form, members in found.items()]


def adamw_many(entries: Tensor, owner: Tensor, factor: Tensor, numbers: list[float], seed: int, form: list[int],
               aligned: bool) -> None:
    """Launches a Group. seed: formats.mix of the step."""
    constants = dict(zip(FORM, form, strict=True))
    seed -= (seed >> 31) << 32  # a signed number of the same 32 bits: others would have another type, and be compiled
    launch(adamw_many_kernel, owner.shape, entries, owner, factor, *numbers, seed, ALIGNED=aligned, **constants)
