"""The head's log-probabilities over vocabulary chunks: library GEMMs alternating with element-wise passes.

A GEMM writes the logits of one vocabulary chunk into a scratch buffer, an element-wise pass updates the online
log-sum-exp (forward) or computes the gradient in place (backward), and further GEMMs reduce it. Row statistics are fp32
(fp64 for fp64 inputs).

With x the logits, p = softmax(x) and target y, the gradient of a row's log-prob is d x_v = [v = y] - p_v. The upstream
gradient of a row is constant over the vocabulary, so it is applied to `hidden` before the product for the weight and
after the product for the hidden states, never to the [N, V] matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from .. import _cpu
from . import passes as torch_passes
from .passes import LogitTransform, RowState, new_state

RECOMPUTE, KEEP, FROZEN = range(3)

# On a CPU a scratch chunk should stay in the last-level cache; on a GPU larger chunks save launches.
_CHUNK_ELEMENTS = {"cpu": 4 << 20, "cuda": 64 << 20}
_MIN_CHUNK = 1024
# Keeping the logits saves one of four GEMMs, a fifth of a trained head's time on a CPU without AMX. With AMX, writing
# and reading them takes longer than the GEMM. On a GPU: at least this, or a share of the free memory.
_DEFAULT_BYTE_BUDGET = {"cpu, AMX": 64 << 20, "cpu": 256 << 20, "cuda": 512 << 20}
_FREE_SHARE = 8


def default_byte_budget(device: torch.device) -> int:
    if device.type != "cpu":
        return max(_DEFAULT_BYTE_BUDGET["cuda"], _free_memory(device) // _FREE_SHARE)
    return _DEFAULT_BYTE_BUDGET["cpu, AMX" if _cpu.HAS_MATRIX_UNIT else "cpu"]


def _free_memory(device: torch.device) -> int:
    """Bytes that an allocation could have on a GPU, unused ones of PyTorch's allocator included; 0 if unknown."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 0
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


# torch.compile then calls it at trace time.
_free_memory._dynamo_marked_constant = True


def chunk_width(rows: int, vocab: int, itemsize: int, byte_budget: int, device: torch.device) -> int:
    """Vocabulary columns per chunk: small enough for the cache, at least _MIN_CHUNK for efficient GEMMs."""
    elements = _CHUNK_ELEMENTS["cpu" if device.type == "cpu" else "cuda"]
    wanted = max(_MIN_CHUNK, elements // max(rows, 1))
    allowed = byte_budget // max(rows * itemsize, 1)
    width = max(1, min(wanted, allowed, vocab))
    return width if width == vocab else max(width // 64 * 64, min(64, vocab))


def _chunks(vocab: int, width: int) -> Iterator[slice]:
    return (slice(start, min(start + width, vocab)) for start in range(0, vocab, width))


def _product(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, out: Tensor) -> Tensor:
    """scale * (hidden @ weight.T + bias), into out."""
    if bias is not None:
        return torch.addmm(bias, hidden, weight.t(), beta=scale, alpha=scale, out=out)
    if scale == 1.0:
        return torch.mm(hidden, weight.t(), out=out)
    return torch.addmm(out, hidden, weight.t(), beta=0.0, alpha=scale, out=out)


def _accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b with an fp32 total."""
    if total.is_cuda and total.dtype != a.dtype:
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)
    else:
        # The CPU has no GEMM from low precision to fp32: each chunk's product is rounded, their sum is not.
        for rows in _row_blocks(total):
            total[rows] += torch.mm(a[rows], b)


def _transposed_is_faster(x: Tensor) -> bool:
    """Whether [D, N] @ [N, C] is faster than [C, N] @ [N, D]: it takes half the time with AMX, a tenth more without."""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and _cpu.HAS_MATRIX_UNIT


def _row_blocks(x: Tensor) -> Iterator[slice]:
    """Blocks of rows of about a megabyte on the CPU, to keep temporaries small; one block of all rows on a GPU."""
    step = max(256, (1 << 19) // x.shape[1]) if x.device.type == "cpu" else max(x.shape[0], 1)
    return (slice(start, start + step) for start in range(0, x.shape[0], step))


def forward(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, head: LogitTransform, stats: tuple[str, ...],
    byte_budget: int, kept: Tensor | None = None, bracket: bool = False, passes: ModuleType = torch_passes,
) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor | None]:
    """Returns logp, lse, the requested stats and, with bracket, d logp / d hidden.

    hidden [N, D], weight [V, D], target [N] int64, negative in dead rows, bias [V]. kept, if given, has N * V elements
    and receives the scaled products, chunk after chunk. Row results are [N] in the compute dtype, undefined in dead
    rows; the bracket is [N, D] in hidden's dtype.
    """
    rows, vocab = hidden.shape[0], weight.shape[0]
    width = chunk_width(rows, vocab, hidden.element_size(), byte_budget, hidden.device)
    state = new_state(hidden, target, "entropy" in stats, "mean_logit" in stats, "log_sum_p2" in stats)
    pull = hidden.new_zeros(hidden.shape, dtype=state.total.dtype) if bracket else None
    scratch = hidden.new_empty(rows * width) if kept is None else None
    for chunk in _chunks(vocab, width):
        product = _chunk_view(scratch, rows, chunk, 0) if kept is None else _chunk_view(kept, rows, chunk, chunk.start)
        _product(hidden, weight[chunk], None if bias is None else bias[chunk], head.product_scale, product)
        passes.scan_chunk(product, chunk.start, state, head.cap, product if bracket else None)
        if bracket:
            _accumulate(pull.mul_(state.decay.unsqueeze(1)), product, weight[chunk])
    logp, lse, found = _finish(state, stats, vocab)
    if not bracket:
        return logp, lse, found, None
    own = weight[target.clamp_min(0)].to(pull.dtype)
    if head.cap:
        own.mul_(1 - (state.target_logit / head.cap).square().unsqueeze(1))
    direction = own.sub_(pull.div_(state.total.unsqueeze(1))).mul_(head.slope)
    return logp, lse, found, direction.to(hidden.dtype)


def _chunk_view(buffer: Tensor, rows: int, chunk: slice, first_column: int) -> Tensor:
    """[rows, chunk] view of a flat buffer of consecutive chunks."""
    columns = chunk.stop - chunk.start
    return buffer[rows * first_column : rows * (first_column + columns)].view(rows, columns)


def _finish(state: RowState, stats: tuple[str, ...], vocab: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    log_total = state.total.log()
    lse = state.highest + log_total
    found = {"lse": lse} if "lse" in stats else {}
    if "entropy" in stats:
        found["entropy"] = log_total - state.weighted / state.total
    if "mean_logit" in stats:
        found["mean_logit"] = state.plain / vocab
    if "top1" in stats:
        found["top1"] = (state.target_logit == state.highest).to(lse.dtype)
    if "log_sum_p2" in stats:
        found["log_sum_p2"] = state.squares.log() - 2 * log_total
    return (state.target_logit - state.highest) - log_total, lse, found


def backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, logp: Tensor, lse: Tensor,
    kept: Tensor | None, kept_rows: Tensor | None, head: LogitTransform, needs: tuple[bool, bool, bool],
    byte_budget: int, passes: ModuleType = torch_passes,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of (grad * logp).sum() for hidden, weight and bias, each None unless needed.

    grad [N], zero in dead rows; logp and lse from forward. kept as forward filled it, or None to recompute the
    products; kept_rows selects N of its rows, None for all.
    """
    rows, vocab, dtype = hidden.shape[0], weight.shape[0], lse.dtype
    need_hidden, need_weight, need_bias = needs
    all_rows = rows if kept is None else kept.numel() // vocab
    width = chunk_width(all_rows, vocab, hidden.element_size(), byte_budget, hidden.device)
    grad_column = grad.to(dtype).unsqueeze(1)
    norm = None
    if hidden.dtype == torch.float16:
        # fp16 hidden states times a mean's 1/N would underflow: divide by the largest gradient, multiply at the end.
        norm = grad_column.abs().amax().clamp_min(torch.finfo(dtype).tiny) if rows else None
    factor = (grad_column if norm is None else grad_column / norm) * -head.slope
    scaled_hidden = (hidden * factor).to(hidden.dtype) if need_weight else None
    transposed = need_weight and _transposed_is_faster(hidden)
    if transposed:
        scaled_hidden = scaled_hidden.t().contiguous()
    factor_row = factor.to(hidden.dtype).t()
    grad_hidden = hidden.new_zeros(hidden.shape, dtype=dtype) if need_hidden else None
    grad_weight = torch.empty_like(weight) if need_weight else None
    grad_bias = weight.new_empty(1, vocab) if need_bias else None
    at_target = torch.expm1(logp)
    scratch = hidden.new_empty(rows * width)
    for chunk in _chunks(vocab, width):
        d = _chunk_view(scratch, rows, chunk, 0)
        if kept is None:
            product = _product(hidden, weight[chunk], None if bias is None else bias[chunk], head.product_scale, d)
        else:
            product = _chunk_view(kept, all_rows, chunk, chunk.start)
            product = product if kept_rows is None else product[kept_rows]
        passes.gradient_chunk(product, chunk.start, target, at_target, lse, head.cap, d)
        if need_hidden:
            _accumulate(grad_hidden, d, weight[chunk])
        if need_weight:
            if transposed:
                grad_weight[chunk] = torch.mm(scaled_hidden, d).t()
            else:
                torch.mm(d.t(), scaled_hidden, out=grad_weight[chunk])
        if need_bias:
            grad_bias[:, chunk] = torch.mm(factor_row, d)
    if norm is not None:
        for gradient in (grad_weight, grad_bias):
            if gradient is not None:
                gradient.mul_(norm)
    del scratch, d, scaled_hidden  # free before the last allocation
    return (
        grad_hidden.mul_(-head.slope * grad_column).to(hidden.dtype) if need_hidden else None,
        grad_weight,
        grad_bias.squeeze(0) if need_bias else None,
    )
