"""RMSNorm, SwiGLU and rotary embeddings, forward only, with the intermediate rounding of transformers' layers."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import launch

# Elements of a program's tile of short rows: norms of heads, rotated heads.
_TILE = 1024
_PRODUCT, _WARPS = 1024, 4


@triton.jit(do_not_specialize=["rows"])
def rms_norm_kernel(
    x_ptr, weight_ptr, out_ptr, rows, x_stride, eps, D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, D_PAD)
    inside = (row < rows)[:, None] & (column < D)[None, :]
    row = row.to(tl.int64)[:, None]
    x = tl.load(x_ptr + row * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 1) / D + eps)
    weight = tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    dtype = out_ptr.dtype.element_ty
    normed = (x * scale[:, None]).to(dtype).to(tl.float32)
    tl.store(out_ptr + row * D + column[None, :], (weight[None, :] * normed).to(dtype), mask=inside)


@triton.jit
def swiglu_kernel(gate_ptr, up_ptr, out_ptr, gate_stride, up_stride, columns, BLOCK: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    dtype = out_ptr.dtype.element_ty
    silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(out_ptr + row * columns + column, (silu * up).to(dtype), mask=inside)


@triton.jit
def rotary_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, q_stride, q_head_stride, k_stride, k_head_stride, cos_stride,
    sin_stride, q_heads, k_heads, q_blocks, D: tl.constexpr, D_PAD: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """A token's heads in blocks, those of q first. Outputs are [tokens, heads, D]."""
    token = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0)
    if block < q_blocks:
        x_ptr = q_ptr + token * q_stride
        out_ptr = q_out_ptr + token * q_heads * D
        head_stride = q_head_stride
        heads = q_heads
    else:
        x_ptr = k_ptr + token * k_stride
        out_ptr = k_out_ptr + token * k_heads * D
        head_stride = k_head_stride
        heads = k_heads
        block -= q_blocks
    head = block * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, D_PAD)
    other = tl.where(column < D // 2, column + D // 2, column - D // 2)
    sign = tl.where(column < D // 2, -1.0, 1.0)
    inside = (head < heads)[:, None] & (column < D)[None, :]
    x = tl.load(x_ptr + head[:, None] * head_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    turned = tl.load(x_ptr + head[:, None] * head_stride + other[None, :], mask=inside, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + token * cos_stride + column, mask=column < D, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + token * sin_stride + column, mask=column < D, other=0.0).to(tl.float32)
    dtype = q_out_ptr.dtype.element_ty
    along = (x * cos[None, :]).to(dtype).to(tl.float32)
    across = (turned * (sign * sin)[None, :]).to(dtype).to(tl.float32)
    tl.store(out_ptr + head[:, None] * D + column[None, :], (along + across).to(dtype), mask=inside)


def norm_shape(size: int) -> tuple[int, int, int]:
    """Padded size, rows of a program and warps for rows of `size`."""
    width = triton.next_power_of_2(size)
    return width, max(1, _TILE // width), 4 if width <= 2048 else 8 if width <= 8192 else 16


def rotary_shape(size: int) -> tuple[int, int]:
    """Padded head size and heads of a program."""
    width = triton.next_power_of_2(size)
    return width, max(1, _TILE // width)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """strop.kernels.layers.rms_norm of x [..., D]."""
    size = x.shape[-1]
    flat = x.reshape(-1, size)
    flat = flat if flat.stride(-1) == 1 else flat.contiguous()
    out = flat.new_empty(flat.shape)
    width, rows, warps = norm_shape(size)
    grid = (triton.cdiv(len(flat), rows),)
    launch(rms_norm_kernel, grid, flat, weight, out, len(flat), flat.stride(0), eps, D=size, D_PAD=width, ROWS=rows,
           num_warps=warps)
    return out.view(x.shape)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """strop.kernels.layers.swiglu of gate and up [..., F]; their rows may be apart."""
    columns = gate.shape[-1]
    rows = [x.reshape(-1, columns) for x in (gate, up)]
    rows = [x if x.stride(-1) == 1 else x.contiguous() for x in rows]
    out = gate.new_empty(rows[0].shape)
    grid = (triton.cdiv(columns, _PRODUCT), len(out))
    launch(swiglu_kernel, grid, *rows, out, *(x.stride(0) for x in rows), columns, BLOCK=_PRODUCT, num_warps=_WARPS)
    return out.view(gate.shape)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """strop.kernels.layers.rotary_pair: q [1, Hq, T, D], k [1, Hkv, T, D], cos and sin [1, T, D]."""
    q, k, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, cos, sin))
    _, q_heads, tokens, size = q.shape
    k_heads = k.shape[1]
    outs = [x.new_empty(1, tokens, x.shape[1], size) for x in (q, k)]
    width, heads = rotary_shape(size)
    q_blocks, k_blocks = triton.cdiv(q_heads, heads), triton.cdiv(k_heads, heads)
    strides = (q.stride(2), q.stride(1), k.stride(2), k.stride(1), cos.stride(1), sin.stride(1))
    launch(rotary_kernel, (q_blocks + k_blocks, tokens), q, k, cos, sin, *outs, *strides, q_heads, k_heads, q_blocks,
           D=size, D_PAD=width, HEADS=heads, num_warps=4)
    return outs[0].transpose(1, 2), outs[1].transpose(1, 2)
