"""Cheaper forms of an optimizer's state, in plain PyTorch: masters in two halves, bf16 moments, 8-bit moments."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

# AdamW's state of a parameter: its moments, and of 8-bit ones the scales
STATE = ("exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale")
BLOCK = 256  # elements of a row that share a scale
NARROWEST = 32  # width of rows below which moments stay fp32: their scales would take half as much as the codes
SIGNED, UNSIGNED = 6, 7  # decades of 8-bit codes below the first one: of exp_avg and of exp_avg_sq
SMALLEST = 1e-37  # scale below which a block counts as zero: its inverse would overflow


@dataclass(frozen=True)
class State:
    """A parameter as `adamw_` takes it, but for what changes from step to step. number: its place among all parameters,
    which seeds the random numbers that round bf16 moments."""

    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    weight: Tensor | None = None
    scales: tuple[Tensor, Tensor] | None = None
    first: int = 0
    number: int = 0


# -- masters in two halves --------------------------------------------------------------------------------------------


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """(weight, low) of an fp32 tensor: the nearest bf16 numbers, and the low halves of the bits, int16.

    `join` gives back every bit: read as signed, the low half is the distance to the weight. For that, a number halfway
    between two bf16 numbers becomes the one further from zero. Rounded to even, 2^16 + 1 numbers would have the same
    weight, one more than 16 bits can tell apart.
    """
    bits = master.view(torch.int32)
    return ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16), bits.to(torch.int16)


def join(weight: Tensor, low: Tensor) -> Tensor:
    """The fp32 tensor that `split` made (weight, low) of."""
    return ((weight.view(torch.int16).to(torch.int32) << 16) + low.to(torch.int32)).view(torch.float32)


# -- bf16, rounded stochastically -------------------------------------------------------------------------------------


def mix(x: int, number: int) -> int:
    """The next state of a random number generator that takes in `number`, from 0 to 2^32 - 1."""
    x = (x ^ number) * 0x9E3779B1 & 0xFFFFFFFF
    x = (x ^ x >> 16) * 0x21F0AAAD & 0xFFFFFFFF
    x = (x ^ x >> 15) * 0x735A2D97 & 0xFFFFFFFF
    return x ^ x >> 15


def key_of(*numbers: int) -> int:
    """A key for `noise`, from 0 to 2^31 - 1, that looks random."""
    return functools.reduce(mix, numbers, 0) >> 1


def noise(key: int, first: int, count: int, device: torch.device) -> Tensor:
    """Random 32-bit numbers, int64 [count], a function of `key` and the elements' indices first, first + 1, ... alone:
    a resumed run and one on other ranks draw the same."""
    x = (torch.arange(first, first + count, device=device) * 0x9E3779B1 + key) & 0xFFFFFFFF
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 15)


def round_stochastically(x: Tensor, draw: Tensor) -> Tensor:
    """x, fp32, rounded to one of the two bf16 numbers around it, the nearer one with the higher probability, so that
    its mean is x. draw: int64 of the same shape, uniform in [0, 2^16)."""
    return ((x.view(torch.int32) + draw.to(torch.int32)) >> 16).to(torch.int16).view(torch.bfloat16)


# -- 8 bits by blocks -------------------------------------------------------------------------------------------------


def decades(count: int) -> list[tuple[float, float]]:
    """(slope, start) of every decade of the 8-bit codes, from the smallest: a number x in (10^(d-1-count),
    10^(d-count)] of decade d has the code x * slope + start, rounded.

    Dynamic tree quantization, arXiv 2110.02861 section 2.1: decade d has 2^d codes, equally spaced up to the next power
    of ten. The largest code is 1 exactly, so that numbers that were once quantized stay the same.
    """
    found = [(10.0**count, 0.0)]
    for d in range(1, count + 1):
        per_unit = 2**d / 0.9
        found.append((per_unit * 10.0 ** (count - d), 2**d - 1 - 0.1 * per_unit))
    return found


@functools.cache
def values(count: int) -> Tensor:
    """fp32 [2^(count + 1)]: the number in [0, 1] of every code."""
    table = decades(count)
    exact = [(code - table[d][1]) / table[d][0] for code in range(2 << count) for d in (max(code, 1).bit_length() - 1,)]
    return torch.tensor(exact, dtype=torch.float64).float()


@functools.cache
def _between(count: int) -> Tensor:
    exact = values(count).double()
    return ((exact[1:] + exact[:-1]) / 2).float()


def scales_shape(shape: torch.Size) -> torch.Size:
    """[rows, blocks of a row]. Blocks do not cross rows, so that any cut of the first dimension has the same ones."""
    return torch.Size((shape[0], -(-shape[1:].numel() // BLOCK)))


def _blocks(x: Tensor) -> Tensor:
    """x as [rows, blocks, BLOCK], filled up with zeros."""
    rows = x.reshape(x.shape[0], -1)
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))


def quantize(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """(codes, scales) of fp32 [rows, ...]: int8 codes of numbers, or uint8 codes of numbers from 0 on, and the largest
    magnitude of each block, fp32 `scales_shape`.

    Of numbers from 0 on none has the code 0: AdamW divides by the root of the second moment, and a small one that
    became 0 would make a huge step.
    """
    blocks = _blocks(x)
    scales = blocks.abs().amax(-1)
    inverse = torch.where(scales > SMALLEST, 1 / scales, 0.0)
    codes = torch.bucketize((blocks.abs() * inverse[..., None]), _between(SIGNED if signed else UNSIGNED).to(x.device))
    codes = codes * blocks.sign() if signed else codes.clamp(min=1)
    codes = codes.flatten(1)[:, :x[0].numel()].view(x.shape)
    return codes.to(torch.int8 if signed else torch.uint8), scales


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """The fp32 numbers of `quantize`'s codes and scales."""
    table = values(SIGNED if codes.dtype == torch.int8 else UNSIGNED).to(codes.device)
    blocks = _blocks(codes)
    found = table[blocks.int().abs()] * scales[..., None]
    if codes.dtype == torch.int8:
        found = found * blocks.sign()
    return found.flatten(1)[:, :codes[0].numel()].view(codes.shape)


def is_wide(shape: torch.Size) -> bool:
    """Whether moments of this shape may be other than fp32: vectors and narrow matrices are small, and stay."""
    return len(shape) > 1 and shape[1:].numel() >= NARROWEST


def new_moments(like: Tensor, kind: str) -> dict[str, Tensor]:
    """Zero moments of a parameter, by the names in STATE. kind: float32, bfloat16 or int8."""
    shape, device = like.shape, like.device
    if kind == "float32" or not is_wide(shape):
        return {name: torch.zeros(shape, device=device) for name in STATE[:2]}
    if kind == "bfloat16":
        return {name: torch.zeros(shape, device=device, dtype=torch.bfloat16) for name in STATE[:2]}
    codes = {name: torch.zeros(shape, device=device, dtype=dtype)
             for name, dtype in zip(STATE[:2], (torch.int8, torch.uint8), strict=True)}
    return codes | {name: torch.zeros(scales_shape(shape), device=device) for name in STATE[2:]}
