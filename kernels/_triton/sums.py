"""fp32 sums of many bf16 gradients, in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .tables import Table, pointer

BLOCK, WARPS = 2048, 4


@triton.jit
def _add(total_ptr, grad_ptr, at, inside, has_grad, OVERWRITE: tl.constexpr):
    grad = tl.load(grad_ptr + at, mask=inside & has_grad, other=0.0).to(tl.float32)
    if OVERWRITE:
        tl.store(total_ptr + at, grad, mask=inside)
    elif has_grad:
        tl.store(total_ptr + at, tl.load(total_ptr + at, mask=inside, other=0.0) + grad, mask=inside)


@triton.jit
def add_kernel(entries_ptr, owner_ptr, OVERWRITE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """An entry's fields are the addresses of sum and gradient, 0 for none, the first program and the number of
    elements."""
    program = tl.program_id(0)
    entry_ptr = entries_ptr + tl.load(owner_ptr + program).to(tl.int64) * 4
    address = tl.load(entry_ptr + 1)
    total_ptr = pointer(tl.load(entry_ptr), tl.float32, ALIGNED)
    grad_ptr = pointer(address, tl.bfloat16, ALIGNED)
    count = tl.load(entry_ptr + 3)
    start = (program - tl.load(entry_ptr + 2)) * BLOCK
    at = start + tl.arange(0, BLOCK)
    if start + BLOCK <= count:  # with a mask of this kind loads would be narrow
        _add(total_ptr, grad_ptr, at, tl.full([BLOCK], 1, tl.int1), address != 0, OVERWRITE)
    else:
        _add(total_ptr, grad_ptr, at, at < count, address != 0, OVERWRITE)


def table_of(sums: Sequence[Tensor]) -> Table:
    programs = [triton.cdiv(x.numel(), BLOCK) for x in sums]
    return Table(programs, [(x.numel(),) for x in sums], sums[0].device)


def add(table: Table, sums: Sequence[Tensor], grads: Sequence[Tensor | None], overwrite: bool) -> None:
    """strop.kernels.optimizer.Sums.add of bf16 gradients."""
    grads = [grad if grad is None else grad.contiguous() for grad in grads]
    table.point_to(sums, grads)
    launch(add_kernel, table.owner.shape, table.entries, table.owner, OVERWRITE=overwrite, ALIGNED=table.aligned,
           BLOCK=BLOCK, num_warps=WARPS)
