"""Element-wise passes over logits in PyTorch operations, in blocks that fit a core's cache.

kernels/_triton/logprob.py has the same functions as Triton kernels. A row with a negative target is dead: its results
are undefined, and the passes write zeros for it wherever a matrix product reads them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _cpu

# Elements of the compute dtype that fit a core's private cache.
_BLOCK_ELEMENTS = 1 << 18


@dataclass(frozen=True)
class LogitTransform:
    """Logits from a matrix product: softcap * tanh(logit_scale * product / softcap) / temperature.

    softcap 0 means none. The product is computed with product_scale, which leaves only tanh to the passes.
    """

    logit_scale: float = 1.0
    temperature: float = 1.0
    softcap: float = 0.0

    @property
    def product_scale(self) -> float:
        return self.logit_scale / (self.softcap or self.temperature)

    @property
    def slope(self) -> float:
        """d logit / d product of the unscaled product, without the derivative of tanh."""
        return self.logit_scale / self.temperature

    @property
    def cap(self) -> float:
        """The largest logit under a softcap; 0 without one."""
        return self.softcap / self.temperature


@dataclass(frozen=True)
class RowState:
    """Running sums over the vocabulary, each [N] in the compute dtype. With m the highest logit so far and
    e = exp(x - m): total = sum e, weighted = sum e (x - m), squares = sum e^2, plain = sum x.

    decay is the factor by which the last chunk scaled the older sums. Sums that were not requested are empty.
    """

    target: Tensor
    highest: Tensor
    total: Tensor
    decay: Tensor
    target_logit: Tensor
    weighted: Tensor
    plain: Tensor
    squares: Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def new_state(hidden: Tensor, target: Tensor, weighted: bool, plain: bool, squares: bool) -> RowState:
    rows, dtype = hidden.shape[0], compute_dtype(hidden.dtype)

    def sums(wanted: bool = True) -> Tensor:
        return hidden.new_zeros(rows if wanted else 0, dtype=dtype)

    return RowState(
        target=target,
        # The lowest finite number, not -inf: with a valid bias of -inf, -inf - -inf would be NaN.
        highest=hidden.new_full((rows,), torch.finfo(dtype).min, dtype=dtype),
        total=sums(),
        decay=sums(),
        # Stays NaN if the target is outside the vocabulary.
        target_logit=hidden.new_full((rows,), torch.nan, dtype=dtype),
        weighted=sums(weighted),
        plain=sums(plain),
        squares=sums(squares),
    )


def _blocks(rows: int, width: int) -> Iterator[slice]:
    step = max(1, _BLOCK_ELEMENTS // width)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _scratch(like: Tensor, width: int) -> Tensor:
    return like.new_empty(max(_BLOCK_ELEMENTS, width), dtype=compute_dtype(like.dtype))


def _hits(target: Tensor, start: int, columns: int) -> tuple[Tensor, Tensor]:
    """(rows, columns within the chunk) of the targets in the chunk."""
    rows = ((target >= start) & (target < start + columns)).nonzero().squeeze(1)
    return rows, target[rows] - start


def _logits(product: Tensor, cap: float) -> Tensor:
    """Logits from the scaled product, in place."""
    return product.tanh_().mul_(cap) if cap else product


def _scan_logits(logits: Tensor, highest: Tensor, total: Tensor, decay: Tensor, weights: Tensor | None = None) -> None:
    """scan_chunk's and gather_forward's inner loop in csrc/cpu.cpp."""
    weights = logits.new_empty(0, 0) if weights is None else weights
    torch.ops.strop.cpu_scan_logits(_cpu.dense_rows(logits), highest, total, decay, weights)


def _softmax_of(logits: Tensor, lse: Tensor, scale: Tensor, out: Tensor) -> None:
    """scale * exp(logits - lse) into out, in csrc/cpu.cpp; for gradient_chunk and gather_backward, which subtracts the
    highest logit."""
    dense = out if out.stride(1) == 1 or out.shape[1] == 1 else out.new_empty(out.shape)
    torch.ops.strop.cpu_softmax_of(_cpu.dense_rows(logits), lse.contiguous(), scale, dense)
    if dense is not out:
        out.copy_(dense)


def scan_chunk(product: Tensor, start: int, state: RowState, cap: float, weights: Tensor | None = None) -> None:
    """Add a chunk's scaled product [N, C], vocabulary columns from `start`, to the running sums.

    weights [N, C], which may be product itself, receives exp(x - m), times the derivative of tanh under a softcap.
    """
    rows, columns = product.shape
    dtype = state.total.dtype
    hit_rows, hit_columns = _hits(state.target, start, columns)
    state.target_logit[hit_rows] = _logits(product[hit_rows, hit_columns].to(dtype), cap)
    if not cap and not (state.weighted.numel() or state.plain.numel() or state.squares.numel()) and _cpu.takes(product):
        _scan_logits(product, state.highest, state.total, state.decay, weights)
        return
    moved, part = torch.empty_like(state.total), torch.empty_like(state.total)
    scratch = _scratch(product, columns)
    for block in _blocks(rows, columns):
        x = scratch[: (block.stop - block.start) * columns].view(-1, columns)
        _logits(x.copy_(product[block]), cap)
        if state.plain.numel():
            state.plain[block] += x.sum(1)
        highest = torch.maximum(state.highest[block], x.amax(1))
        torch.sub(state.highest[block], highest, out=moved[block])
        state.highest[block] = highest
        x.sub_(highest.unsqueeze(1))
        e = x.exp() if state.weighted.numel() else x.exp_()
        torch.sum(e, 1, out=part[block])
        if state.weighted.numel():
            # 0 * -inf is NaN; 0 times the lowest finite number is 0.
            state.weighted[block] += moved[block] * state.total[block]
            state.weighted[block] *= moved[block].exp()
            state.weighted[block] += x.clamp_(min=torch.finfo(dtype).min).mul_(e).sum(1)
        if state.squares.numel():
            state.squares[block] *= (2 * moved[block]).exp_()
            state.squares[block] += torch.linalg.vecdot(e, e)
        if weights is not None:
            if cap:
                e.mul_(product[block].to(dtype).tanh_().square_().neg_().add_(1.0))
            weights[block] = e
    torch.exp(moved, out=state.decay)
    state.total.mul_(state.decay).add_(part)


def gradient_chunk(
    product: Tensor, start: int, target: Tensor, at_target: Tensor, lse: Tensor, cap: float, out: Tensor
) -> None:
    """Write (p - [v = target]) times the derivative of tanh to out [N, C], which may be product itself.

    at_target [N] is p - 1 at the target, computed as expm1(logp), because p - 1 cancels for p near 1.
    """
    rows, columns = product.shape
    hit_rows, hit_columns = _hits(target, start, columns)
    d_target = at_target[hit_rows]
    if cap:
        d_target = d_target * (1 - product[hit_rows, hit_columns].to(lse.dtype).tanh().square())
    if not cap and _cpu.takes(product, out):
        _softmax_of(product, lse, torch.ones_like(lse), out)
        out[hit_rows, hit_columns] = d_target.to(out.dtype)
        return
    scratch = _scratch(product, columns)
    for block in _blocks(rows, columns):
        x = scratch[: (block.stop - block.start) * columns].view(-1, columns)
        x.copy_(product[block])
        slopes = None
        if cap:
            x.tanh_()
            slopes = x.square().neg_().add_(1.0)
            x.mul_(cap)
        x.sub_(lse[block].unsqueeze(1)).exp_()
        if slopes is not None:
            x.mul_(slopes)
        out[block] = x
    out[hit_rows, hit_columns] = d_target.to(out.dtype)


def gather_forward(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(logp [N], sums [N, 2]) in the compute dtype from logits [N, V] and target [N]; logp 0 in dead rows.

    sums: the highest logit and the sum of exp(logits - highest). Their log-sum-exp in one number would be rounded,
    which is a relative error of the row's whole gradient.
    """
    rows, vocab = logits.shape
    highest = logits.new_full((rows,), -torch.inf, dtype=compute_dtype(logits.dtype))
    total = torch.zeros_like(highest)
    if _cpu.takes(logits):
        _scan_logits(logits, highest, total, torch.empty_like(total))
    else:
        scratch = _scratch(logits, vocab)
        for block in _blocks(rows, vocab):
            x = scratch[: (block.stop - block.start) * vocab].view(-1, vocab)
            x.copy_(logits[block])
            torch.amax(x, 1, out=highest[block])
            torch.sum(x.sub_(highest[block].unsqueeze(1)).exp_(), 1, out=total[block])
    target_logit = logits.gather(1, target.clamp_min(0).unsqueeze(1)).squeeze(1).to(highest.dtype)
    logp = (target_logit - highest).sub_(total.log())
    return logp.masked_fill_(target < 0, 0.0), torch.stack((highest, total), 1)


def gather_backward(grad: Tensor, logits: Tensor, target: Tensor, at_target: Tensor, sums: Tensor, out: Tensor) -> None:
    """Write the gradient of (grad * logp).sum() for logits to out, which may be logits itself; 0 in dead rows."""
    rows, vocab = logits.shape
    (highest, total), scale = sums.unbind(1), grad.to(sums.dtype).neg().masked_fill_(target < 0, 0.0)
    column, at_target, scale = target.clamp_min(0).unsqueeze(1), (at_target * scale).unsqueeze(1), scale / total
    if _cpu.takes(logits, out):
        _softmax_of(logits, highest, scale, out)
        out.scatter_(1, column, at_target.to(out.dtype))
        out.index_fill_(0, (target < 0).nonzero().squeeze(1), 0.0)
        return
    scratch = _scratch(logits, vocab)
    for block in _blocks(rows, vocab):
        x = scratch[: (block.stop - block.start) * vocab].view(-1, vocab)
        x.copy_(logits[block]).sub_(highest[block].unsqueeze(1)).exp_().mul_(scale[block].unsqueeze(1))
        x.scatter_(1, column[block], at_target[block])
        out[block] = x
    # 0 * NaN is NaN: values in an ignored row must not reach its gradient.
    out.masked_fill_((target < 0).unsqueeze(1), 0.0)
