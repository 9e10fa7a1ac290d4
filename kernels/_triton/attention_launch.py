"""Launches of the attention kernels, and their block sizes."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..layout import TILE
from . import launch
from .attention import forward_kernel, grad_kv_kernel, grad_q_kernel


class Blocks(NamedTuple):
    """Block sizes of a launch: query rows and keys, both divisors of TILE; warps; stages of the software pipeline.

    edge: rows of a masked block of what the kernel walks over, keys or, for their gradients, query rows; 0 for as many
    as unmasked blocks have. tma: unmasked blocks are loaded by TMA, which sm_90 and later have.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    edge: int = 0
    tma: bool = False


# Numbers of a row that grad_q_kernel hands to grad_kv_kernel for loads by TMA.
STATS = 4
# By head size: up to 64, 128 and 256. All compile without a spill. Those of SM90 up to 128 are the fastest over all
# shapes of benchmarks.gpu.tiles on an H100; the others are the largest that do not spill, not tuned on hardware yet.
Row = tuple[Blocks, ...]
# Tensor cores of Hopper and of Blackwell, 227 KiB of shared memory.
SM90: dict[str, Row] = {
    "forward": (Blocks(128, 64, 4, 3), Blocks(64, 64, 4, 3), Blocks(128, 32, 8, 3)),
    "grad_q": (Blocks(64, 64, 4, 3), Blocks(64, 32, 4, 3), Blocks(128, 32, 8, 2)),
    "grad_kv": (Blocks(64, 64, 4, 3), Blocks(32, 128, 8, 3)),
    # At 256 both gradients leave too few registers for wgmma, so each has a launch of its own, with the scores again.
    "grad_k": (Blocks(16, 128, 8, 2),),
    "grad_v": (Blocks(32, 128, 8, 2),),
}
SM100: dict[str, Row] = {
    "forward": (Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 3), Blocks(128, 32, 8, 3)),
    "grad_q": (Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 2), Blocks(128, 32, 8, 2)),
    "grad_kv": (Blocks(64, 128, 8, 2), Blocks(64, 128, 8, 2), Blocks(32, 64, 8, 2)),
}
# Ampere and all other Nvidia GPUs: within the 99 KiB of the smallest of them.
SM80: dict[str, Row] = {
    "forward": (Blocks(128, 64, 8, 3), Blocks(64, 32, 4, 3), Blocks(64, 32, 8, 2)),
    "grad_q": (Blocks(128, 64, 8, 3), Blocks(128, 32, 8, 2), Blocks(64, 16, 8, 2)),
    "grad_kv": (Blocks(32, 128, 8, 3), Blocks(32, 64, 8, 3), Blocks(32, 32, 8, 2)),
}
# AMD: within 64 KiB.
HIP: dict[str, Row] = dict.fromkeys(("forward", "grad_q", "grad_kv"), (Blocks(32, 32, 4, 2),) * 3)
# fp32: exact products do not run on tensor cores.
FP32: dict[str, Row] = {
    "forward": (Blocks(32, 32, 4, 2), Blocks(16, 32, 8, 2), Blocks(16, 32, 8, 2)),
    "grad_q": (Blocks(32, 32, 8, 2), Blocks(16, 16, 8, 2), Blocks(16, 16, 8, 2)),
    "grad_kv": (Blocks(32, 32, 8, 2), Blocks(16, 32, 8, 2), Blocks(16, 32, 8, 2)),
}
BY_CAPABILITY = {9: SM90, 10: SM100, None: HIP}


@cache
def padded(head_size: int) -> int:
    """The next power of two, at least 16 as tl.dot requires."""
    return max(16, triton.next_power_of_2(head_size))


def blocks(kernel: str, width: int, element_bytes: int, capability: int | None) -> Blocks:
    """For a head size padded to `width`; capability is the major one, None is AMD."""
    row = _table(element_bytes, capability)[kernel]
    return row[min(0 if width <= 64 else 1 if width <= 128 else 2, len(row) - 1)]


def grad_kv_launches(width: int, element_bytes: int, capability: int | None) -> tuple[str, ...]:
    """The launches that compute the gradients of keys and values, by their names in the tables."""
    apart = width > 128 and "grad_k" in _table(element_bytes, capability)
    return ("grad_k", "grad_v") if apart else ("grad_kv",)


def parts(kernel: str) -> dict[str, bool]:
    """The constants of grad_kv_kernel that say which gradients a launch computes."""
    return {"GRAD_K": kernel != "grad_v", "GRAD_V": kernel != "grad_k"}


def _table(element_bytes: int, capability: int | None) -> dict[str, Row]:
    return FP32 if element_bytes == 4 else BY_CAPABILITY.get(capability, SM80)


@cache
def _capability(device: torch.device) -> int | None:
    if torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 8


def _like(x: Tensor) -> Tensor:
    """An empty tensor shaped as x, rows first in memory."""
    _, heads, tokens, size = x.shape
    return x.new_empty_strided((1, heads, tokens, size), (tokens * heads * size, size, heads * size, 1))


def _described(x: Tensor, rows: int, width: int) -> TensorDescriptor | None:
    """x [1, heads, T, D] in blocks of rows of one head, padded to `width`; None if TMA cannot have its address or
    strides."""
    if any(n % 16 for n in (x.data_ptr(), *(stride * x.element_size() for stride in x.stride()[1:3]))):
        return None
    return TensorDescriptor(x, list(x.shape[1:]), list(x.stride()[1:]), [1, rows, width])


def _walked(shape: Blocks, kernel: str) -> int:
    """Rows of a block of what the kernel walks over."""
    return shape.keys if kernel in ("forward", "grad_q") else shape.queries


def edge(shape: Blocks, kernel: str) -> int:
    """Rows of a masked block."""
    return shape.edge or _walked(shape, kernel)


def _blocks(kernel: str, q: Tensor) -> Blocks:
    return blocks(kernel, padded(q.shape[-1]), q.element_size(), _capability(q.device))


def _options(kernel: str, q: Tensor, window: int, cap: float, walked: dict[str, Tensor | None]) -> dict:
    """walked: the tensors of which the kernel loads one block after another, by name."""
    shape, width = _blocks(kernel, q), padded(q.shape[-1])
    tma = {name: _described(x, _walked(shape, kernel), STATS if name == "stats" else width)
           for name, x in walked.items() if shape.tma}
    # TF32 has 10 bits of mantissa: use it only if PyTorch's own matmuls may.
    precise = q.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"
    return {
        "D": q.shape[-1], "D_PAD": width, "CAP": cap > 0, "WINDOW": window > 0, "QUERIES": shape.queries,
        "KEYS": shape.keys, "EDGE": edge(shape, kernel), "TILE_ROWS": TILE, "PRECISION": "ieee" if precise else "tf32",
        "num_warps": shape.warps, "num_stages": shape.stages,
        **{f"{name}_tma": tma.get(name) for name in walked},
    }


def _side_by_side(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(tensors: tuple[Tensor, ...]) -> tuple[int, ...]:
    """Row strides, then head strides."""
    strides = [x.stride() for x in tensors]
    return *(stride[2] for stride in strides), *(stride[1] for stride in strides)


def forward(
    q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, readers_end: Tensor, positions: Tensor, scale: float, window: int,
    cap: float,
) -> tuple[Tensor, Tensor]:
    """q [1, H, T, D]; k, v [1, Hkv, T, D]; bf16, fp16 or fp32; tiles, readers_end and positions of PackedGroups.

    window and cap are 0 for none. Returns out, shaped as q, and the log-sum-exp of each row's scores, [1, H, T] fp32.
    """
    out, (q, k, v) = _like(q), (_side_by_side(x) for x in (q, k, v))
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    options = _options("forward", q, window, cap, {"k": k, "v": v})
    grid = (q.shape[1], tiles.shape[0] * (TILE // options["QUERIES"]))
    tensors, numbers = (q, k, v, out), (q.shape[2], q.shape[1] // k.shape[1], scale, cap, window)
    launch(forward_kernel, grid, *tensors, lse, tiles, positions, *_strides(tensors), *numbers, **options)
    return out, lse


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tiles: Tensor, readers_end: Tensor,
    positions: Tensor, scale: float, window: int, cap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from forward's inputs and outputs. Deterministic."""
    grad_q, grad_k, grad_v = _like(q), _like(k), _like(v)
    grad_out, q, k, v = (_side_by_side(x) for x in (grad_out, q, k, v))
    delta = torch.empty_like(lse)
    inputs, numbers = (grad_out, q, k, v), (q.shape[2], q.shape[1] // k.shape[1], scale, cap, window)

    names = grad_kv_launches(padded(q.shape[-1]), q.element_size(), _capability(q.device))
    stats = lse.new_empty(*lse.shape, STATS) if any(_blocks(name, q).tma for name in names) else None

    options = _options("grad_q", q, window, cap, {"k": k, "v": v})
    grid = (q.shape[1], tiles.shape[0] * (TILE // options["QUERIES"]))
    tensors, strides = (*inputs, out, lse, delta, stats, grad_q, tiles, positions), _strides((*inputs, out, grad_q))
    launch(grad_q_kernel, grid, *tensors, *strides, *numbers, **options)

    tensors = (*inputs, lse, delta, grad_k, grad_v, tiles, readers_end, positions)
    strides = _strides((*inputs, grad_k, grad_v))
    for name in names:
        options = _options(name, q, window, cap, {"grad_out": grad_out, "q": q, "stats": stats}) | parts(name)
        grid = (k.shape[1], tiles.shape[0] * (TILE // options["KEYS"]))
        launch(grad_kv_kernel, grid, *tensors, *strides, *numbers, **options)
    return grad_q, grad_k, grad_v
