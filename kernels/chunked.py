"""The head's log-probabilities over vocabulary chunks, in PyTorch operations: the CPU path of linear_logprob.

A library matrix product writes the logits of one vocabulary chunk into a scratch buffer, element-wise passes over
cache-sized row blocks update the online log-sum-exp (forward) or make the gradient (backward), library matrix
products finish. Compute type of everything per row is fp32 (fp64 for fp64 inputs).

With x = temperature^-1 * cap(logit_scale * (hidden @ weight.T + bias)) and p = softmax(x), the gradient of a row's
log-prob is d x_v = [v = y] - p_v. The upstream gradient g of a row is constant over the vocabulary, so it is applied
to `hidden` before the product for the weight and after the product for the hidden states, never to the [N, V] matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

STATS = ("lse", "entropy", "mean_logit", "top1", "log_sum_p2")

DEFAULT_BYTE_BUDGET = 64 << 20
# A scratch chunk of this many elements stays in the last-level cache, a block of a chunk in a core's own.
_CHUNK_ELEMENTS = 4 << 20
_BLOCK_ELEMENTS = 1 << 18
_MIN_CHUNK = 1024


@dataclass(frozen=True)
class Head:
    """What turns a matrix product into logits: see the module's docstring. softcap 0 means none."""

    logit_scale: float = 1.0
    temperature: float = 1.0
    softcap: float = 0.0

    @property
    def product_scale(self) -> float:
        """What the matrix product itself is scaled by; with a soft-cap it yields tanh's argument."""
        return self.logit_scale / (self.softcap or self.temperature)

    @property
    def cap(self) -> float:
        """The largest logit a soft-capped head can give, after temperature."""
        return self.softcap / self.temperature

    def finish(self, product: Tensor) -> Tensor:
        """In place: the scaled product to the logits."""
        return product.tanh_().mul_(self.cap) if self.softcap else product


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def chunk_width(rows: int, vocab: int, itemsize: int, byte_budget: int) -> int:
    """Vocabulary columns per chunk: cache-sized for few rows, wide enough for the matrix products for many."""
    wanted = max(_MIN_CHUNK, _CHUNK_ELEMENTS // max(rows, 1))
    allowed = byte_budget // max(rows * itemsize, 1)
    width = max(1, min(wanted, allowed, vocab))
    return width if width == vocab else max(width // 64 * 64, min(64, vocab))


def _chunks(vocab: int, width: int) -> Iterator[slice]:
    return (slice(start, min(start + width, vocab)) for start in range(0, vocab, width))


def _blocks(rows: int, width: int) -> Iterator[slice]:
    step = max(1, _BLOCK_ELEMENTS // width)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _product(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, out: Tensor) -> Tensor:
    """scale * (hidden @ weight.T + bias), into out."""
    if bias is not None:
        return torch.addmm(bias, hidden, weight.t(), beta=scale, alpha=scale, out=out)
    if scale == 1.0:
        return torch.mm(hidden, weight.t(), out=out)
    return torch.addmm(out, hidden, weight.t(), beta=0.0, alpha=scale, out=out)


class _TargetsByChunk:
    """Which rows' targets lie in a chunk, from one sort: per chunk a slice instead of a search over all rows."""

    def __init__(self, target: Tensor, vocab: int, width: int):
        values, self.rows = target.sort(stable=True)
        edges = torch.arange(0, vocab + width, width, dtype=target.dtype)
        self.values, self.edges, self.width = values, torch.searchsorted(values, edges).tolist(), width

    def __getitem__(self, chunk: slice) -> tuple[Tensor, Tensor]:
        """(rows, columns within the chunk)"""
        i = chunk.start // self.width
        part = slice(self.edges[i], self.edges[i + 1])
        return self.rows[part], self.values[part] - chunk.start


def forward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    head: Head,
    stats: tuple[str, ...],
    byte_budget: int,
    keep: bool = False,
    bracket: bool = False,
) -> tuple[Tensor, Tensor, dict[str, Tensor], list[Tensor], Tensor | None]:
    """logp, lse, requested stats, kept chunks of the matrix product (if keep), and (if bracket) d logp / d hidden.

    hidden [N, D], weight [V, D], target [N] int64 within [0, V), bias [V]. Row results are [N] in the compute dtype,
    the bracket is [N, D] in hidden's dtype.
    """
    rows, vocab, dtype = hidden.shape[0], weight.shape[0], compute_dtype(hidden.dtype)
    width = chunk_width(rows, vocab, hidden.element_size(), byte_budget)
    targets = _TargetsByChunk(target, vocab, width)
    highest = hidden.new_full((rows, 1), -torch.inf, dtype=dtype)
    total, target_logit = hidden.new_zeros(rows, 1, dtype=dtype), hidden.new_zeros(rows, dtype=dtype)
    part = torch.empty_like(total)
    weighted, plain, squares = (
        torch.zeros_like(total) if name in stats else None for name in ("entropy", "mean_logit", "log_sum_p2")
    )
    pull = hidden.new_zeros(hidden.shape, dtype=dtype) if bracket else None
    scratch = hidden.new_empty(rows * width)
    block_scratch = hidden.new_empty(max(_BLOCK_ELEMENTS, width), dtype=dtype)
    kept = []
    for chunk in _chunks(vocab, width):
        columns = chunk.stop - chunk.start
        product = hidden.new_empty(rows, columns) if keep else scratch[: rows * columns].view(rows, columns)
        _product(hidden, weight[chunk], None if bias is None else bias[chunk], head.product_scale, product)
        if keep:
            kept.append(product)
        hit_rows, hit_columns = targets[chunk]
        target_logit[hit_rows] = head.finish(product[hit_rows, hit_columns].to(dtype))
        new_highest = torch.maximum(highest, head.finish(product.amax(1, keepdim=True).to(dtype)))
        # Until a row has met a finite logit its shift is 0: -inf - -inf would make NaN of a legitimate bias.
        shift = new_highest.masked_fill(new_highest == -torch.inf, 0.0)
        moved = (highest - shift).clamp_(min=torch.finfo(dtype).min)
        decay = moved.exp()
        weights = torch.empty_like(product) if bracket and keep else product
        for block in _blocks(rows, columns):
            size = (block.stop - block.start) * columns
            x = block_scratch[:size].view(-1, columns)
            head.finish(x.copy_(product[block]))
            if plain is not None:
                plain[block] += x.sum(1, keepdim=True)
            x.sub_(shift[block])
            e = x.exp() if weighted is not None else x.exp_()
            torch.sum(e, 1, keepdim=True, out=part[block])
            if weighted is not None:
                x.clamp_(min=torch.finfo(dtype).min).mul_(e)
                old = decay[block] * (weighted[block] + moved[block] * total[block])
                weighted[block] = old + x.sum(1, keepdim=True)
            if squares is not None:
                squares[block] = squares[block] * decay[block].square() + torch.linalg.vecdot(e, e).unsqueeze(1)
            if bracket:
                if head.softcap:
                    logits = head.finish(product[block].to(dtype))
                    e.mul_(logits.div_(head.cap).square_().neg_().add_(1.0))
                weights[block] = e
        total.mul_(decay).add_(part)
        highest = new_highest
        if bracket:
            pull.mul_(decay).add_(torch.mm(weights, weight[chunk]))
    log_total = total.log()
    logp = (target_logit.unsqueeze(1) - highest) - log_total
    lse = (highest + log_total).squeeze(1)
    found = {}
    if "lse" in stats:
        found["lse"] = lse
    if weighted is not None:
        found["entropy"] = (log_total - weighted / total).squeeze(1)
    if plain is not None:
        found["mean_logit"] = plain.squeeze(1) / vocab
    if "top1" in stats:
        found["top1"] = (target_logit == highest.squeeze(1)).to(dtype)
    if squares is not None:
        found["log_sum_p2"] = (squares.log() - 2 * log_total).squeeze(1)
    if not bracket:
        return logp.squeeze(1), lse, found, kept, None
    own = weight[target].to(dtype)
    if head.softcap:
        own.mul_(1 - (target_logit / head.cap).square().unsqueeze(1))
    slope = head.logit_scale / head.temperature
    return logp.squeeze(1), lse, found, kept, own.sub_(pull.div_(total)).mul_(slope).to(hidden.dtype)


def backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    logp: Tensor,
    lse: Tensor,
    kept: list[Tensor],
    head: Head,
    needs: tuple[bool, bool, bool],
    byte_budget: int,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of (grad * logp).sum() for hidden, weight and bias, each None unless needed.

    grad [N], logp and lse as forward returned them; kept is forward's list of chunks, or empty to compute them again.
    """
    rows, vocab, dtype = hidden.shape[0], weight.shape[0], compute_dtype(hidden.dtype)
    need_hidden, need_weight, need_bias = needs
    width = kept[0].shape[1] if kept else chunk_width(rows, vocab, hidden.element_size(), byte_budget)
    targets = _TargetsByChunk(target, vocab, width)
    slope = head.logit_scale / head.temperature
    # The largest gradient goes into the product's scale, so that fp16 hidden states times a mean's 1/N do not vanish.
    largest = float(grad.abs().amax()) if rows else 0.0
    norm = largest if 0.0 < largest < float("inf") else 1.0
    grad_column = grad.to(dtype).unsqueeze(1)
    scaled_hidden = (hidden * (grad_column / norm)).to(hidden.dtype) if need_weight else None
    grad_hidden = hidden.new_zeros(hidden.shape, dtype=dtype) if need_hidden else None
    grad_weight = torch.empty_like(weight) if need_weight else None
    grad_bias = weight.new_empty(vocab, dtype=dtype) if need_bias else None
    at_target = torch.expm1(logp)
    scratch = hidden.new_empty(rows * width)
    block_scratch = hidden.new_empty(max(_BLOCK_ELEMENTS, width), dtype=dtype)
    for i, chunk in enumerate(_chunks(vocab, width)):
        columns = chunk.stop - chunk.start
        d = scratch[: rows * columns].view(rows, columns)
        if kept:
            product = kept[i]
        else:
            product = _product(hidden, weight[chunk], None if bias is None else bias[chunk], head.product_scale, d)
        hit_rows, hit_columns = targets[chunk]
        d_target = at_target[hit_rows]
        if head.softcap:
            d_target = d_target * (1 - product[hit_rows, hit_columns].to(dtype).tanh().square())
        for block in _blocks(rows, columns):
            size = (block.stop - block.start) * columns
            x = block_scratch[:size].view(-1, columns)
            x.copy_(product[block])
            slopes = None
            if head.softcap:
                x.tanh_()
                slopes = x.square().neg_().add_(1.0)
                x.mul_(head.cap)
            x.sub_(lse[block].unsqueeze(1)).exp_()
            if slopes is not None:
                x.mul_(slopes)
            d[block] = x
        d[hit_rows, hit_columns] = d_target.to(d.dtype)
        if need_hidden:
            grad_hidden.add_(torch.mm(d, weight[chunk]))
        if need_weight:
            _product(d.t(), scaled_hidden.t(), None, -slope * norm, grad_weight[chunk])
        if need_bias:
            torch.mv(d.t().to(dtype), -slope * grad_column.squeeze(1), out=grad_bias[chunk])
    return (
        grad_hidden.mul_(-slope * grad_column).to(hidden.dtype) if need_hidden else None,
        grad_weight,
        grad_bias.to(weight.dtype) if need_bias else None,
    )


def gather_forward(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(logp, lse), each [N] in the compute dtype, from logits [N, V] and target [N]."""
    rows, vocab = logits.shape
    dtype = compute_dtype(logits.dtype)
    highest, total = logits.new_empty(rows, 1, dtype=dtype), logits.new_empty(rows, 1, dtype=dtype)
    scratch = logits.new_empty(max(_BLOCK_ELEMENTS, vocab), dtype=dtype)
    for block in _blocks(rows, vocab):
        x = scratch[: (block.stop - block.start) * vocab].view(-1, vocab)
        x.copy_(logits[block])
        torch.amax(x, 1, keepdim=True, out=highest[block])
        torch.sum(x.sub_(highest[block]).exp_(), 1, keepdim=True, out=total[block])
    log_total = total.log_()
    logp = logits.gather(1, target.unsqueeze(1)).to(dtype).sub_(highest).sub_(log_total)
    return logp.squeeze(1), (highest + log_total).squeeze(1)


def gather_backward(grad: Tensor, logits: Tensor, target: Tensor, lse: Tensor, out: Tensor) -> Tensor:
    """The gradient of (grad * logp).sum() for logits, written to out, which may be logits itself."""
    rows, vocab = logits.shape
    scratch = logits.new_empty(max(_BLOCK_ELEMENTS, vocab), dtype=lse.dtype)
    column = target.unsqueeze(1)
    for block in _blocks(rows, vocab):
        x = scratch[: (block.stop - block.start) * vocab].view(-1, vocab)
        x.copy_(logits[block]).sub_(lse[block].unsqueeze(1)).exp_()
        one = x.new_ones(()).expand(x.shape[0], 1)
        x.scatter_(1, column[block], x.gather(1, column[block]).sub_(one)).mul_(-grad[block].unsqueeze(1))
        out[block] = x
    return out
