"""Token sampling as a pure function of (logits row, key, position). On a GPU two Triton kernels that sort nothing."""

from __future__ import annotations

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _cpu
from ._triton import HAS_TRITON


def draw_key(seed: int, prompt_id: str, sample_index: int) -> int:
    """A sample's key: a signed 64-bit BLAKE2b hash of the seed, the prompt id and the sample index."""
    text = f"{seed}\x1f{prompt_id}\x1f{sample_index}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def _int64(value: int) -> int:
    """The signed integer with the same 64 bits; torch has no uint64 arithmetic."""
    return value - (1 << 64) if value >= 1 << 63 else value


_STEP = _int64(0x9E3779B97F4A7C15)
_MIX_1 = _int64(0xBF58476D1CE4E5B9)
_MIX_2 = _int64(0x94D049BB133111EB)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64; >> is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def uniform(key: Tensor, position: Tensor) -> Tensor:
    """One fp64 number in (0, 1) per (key, position), both int64: output number `position` of SplitMix64 (Steele et al.
    2014, figure 16) seeded with the mixed key."""
    state = _mix(key) + (position + 1) * _STEP
    return (_shift_right(_mix(state), 11).double() + 0.5) * 2.0**-53


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def sample_tokens(
    logits: Tensor, key: Tensor, position: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverting the cumulative distribution at uniform(key, position).

    logits [B, V] of any float dtype; key, position [B] int64. temperature 0 takes the most likely token. top_k 0 keeps
    all tokens; top_p keeps the most likely tokens whose probability, after temperature and top_k, adds up to at least
    top_p (Holtzman et al. 2020, section 3.1). A row's draw depends only on its logits, key and position.

    Returns (token [B] int64, logp [B] fp32); logp is under the model's distribution at temperature 1, without
    truncation. Among equal logits at the edge of top_k any may be kept. Raises ValueError on options out of range.
    """
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"temperature and top_k must be >= 0 and top_p in (0, 1], got {temperature}, {top_k} and {top_p}"
        )
    on_gpu = HAS_TRITON and (logits.is_cuda or logits.is_meta)
    if on_gpu and logits.dtype in (torch.bfloat16, torch.float16, torch.float32):
        return _sample(logits, key, position, temperature, top_k, top_p)
    likeliest, lse, sums = _softmax_sums(logits, temperature or 1.0)
    if temperature == 0:
        token = _argmax(logits)
    elif 0 < top_k < logits.shape[-1]:
        token = _draw_ranked(*logits.topk(top_k, dim=-1), None, uniform(key, position), temperature, top_p)
    elif top_p == 1:
        token = _draw_blocked(logits, likeliest, _cumulative(sums), uniform(key, position), temperature)
    else:
        total = sums.sum(-1, keepdim=True, dtype=torch.float64)
        token = _draw_nucleus(logits, total, uniform(key, position), temperature, top_p)
    logp = logits.gather(-1, token.unsqueeze(-1)).squeeze(-1).float() - lse
    return token, logp


# The inverse CDF searches sums of this many weights first, so no cumulative sum over the vocabulary is needed.
_BLOCK = 256
# On a CPU, argmax over a row takes ten times as long as max. Most vocabulary sizes are multiples of this block.
_ARGMAX_BLOCK = 128
# Almost every row's nucleus lies within this many tokens; the other rows are sorted.
_NUCLEUS_GUESS = 256


def _argmax(logits: Tensor) -> Tensor:
    """[B] logits.argmax(-1): the block with the maximum, then the argmax within it."""
    if logits.is_cuda or logits.shape[-1] % _ARGMAX_BLOCK:
        return logits.argmax(-1)
    blocks = logits.unflatten(-1, (-1, _ARGMAX_BLOCK))
    block = blocks.amax(-1).argmax(-1)
    return block * _ARGMAX_BLOCK + blocks[torch.arange(len(logits)), block].argmax(-1)


def _softmax_sums(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row the highest logit [B], lse [B], and sums [B, V / _BLOCK rounded up] of exp((logit - highest) /
    temperature) over blocks of _BLOCK tokens, all fp32."""
    if not _cpu.takes(logits):
        return _softmax_sums_reference(logits, temperature)
    highest, lse = (logits.new_empty(len(logits), dtype=torch.float32) for _ in range(2))
    sums = highest.new_empty(len(logits), -(-logits.shape[-1] // _BLOCK))
    torch.ops.strop.cpu_softmax_sums(_cpu.dense_rows(logits), temperature, highest, lse, sums)
    return highest, lse, sums


def _softmax_sums_reference(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    highest, missing = logits.amax(-1).float(), -logits.shape[-1] % _BLOCK
    below = F.pad(logits.float() - highest.unsqueeze(-1), (0, missing), value=-torch.inf).unflatten(-1, (-1, _BLOCK))
    sums = below.exp().sum(-1)
    lse = highest + sums.sum(-1, dtype=torch.float64).log().float()
    return highest, lse, sums if temperature == 1 else below.div_(temperature).exp_().sum(-1)


def _cumulative(weights: Tensor) -> Tensor:
    return weights.cumsum(-1, dtype=torch.float64)


def _invert(cumulative: Tensor, mass: Tensor) -> Tensor:
    """[B, 1] index of the first entry above mass [B, 1]; mass at or above the last entry is clamped just below it.

    An entry of weight 0 has an empty interval and is never returned.
    """
    mass = torch.minimum(mass, torch.nextafter(cumulative[:, -1:], torch.zeros_like(mass)))
    return torch.searchsorted(cumulative, mass, right=True).clamp_(max=cumulative.shape[-1] - 1)


def _draw_blocked(
    logits: Tensor, likeliest: Tensor, block_cumulative: Tensor, u: Tensor, temperature: float
) -> Tensor:
    """[B] tokens by inverse CDF in token order: the block first, then the token in it."""
    mass = u.unsqueeze(-1) * block_cumulative[:, -1:]
    block = _invert(block_cumulative, mass)
    before = torch.where(block > 0, block_cumulative.gather(-1, (block - 1).clamp_(min=0)), 0.0)
    block_mass = block_cumulative.gather(-1, block) - before
    column = block * _BLOCK + torch.arange(_BLOCK, device=logits.device)
    held = logits.gather(-1, column.clamp(max=logits.shape[-1] - 1)).float()
    held.masked_fill_(column >= logits.shape[-1], -torch.inf)
    inside = _cumulative(held.sub_(likeliest.unsqueeze(-1)).div_(temperature).exp_())
    # The block's fp32 sum and its fp64 cumulative sum differ by rounding, so scale by the fraction, not the mass.
    return (block * _BLOCK + _invert(inside, (mass - before) / block_mass * inside[:, -1:])).squeeze(-1)


def _draw_ranked(
    kept: Tensor, order: Tensor, total: Tensor | None, u: Tensor, temperature: float, top_p: float
) -> Tensor:
    """[B] tokens by inverse CDF over the kept logits [B, K], in descending order, with token ids `order`.

    total [B, 1] is the total weight that top_p is a fraction of; None for that of the kept tokens.
    """
    cumulative = _cumulative(((kept.float() - kept[:, :1].float()) / temperature).exp_())
    mass = cumulative[:, -1:]
    if top_p < 1:
        threshold = (mass if total is None else total) * top_p
        last = torch.searchsorted(cumulative, threshold).clamp_(max=kept.shape[-1] - 1)
        mass = cumulative.gather(-1, last)
    return order.gather(-1, _invert(cumulative, u.unsqueeze(-1) * mass)).squeeze(-1)


def _draw_nucleus(logits: Tensor, total: Tensor, u: Tensor, temperature: float, top_p: float) -> Tensor:
    """[B] tokens from the smallest set of most likely tokens that holds top_p of the total weight [B, 1]."""
    if logits.is_cuda or logits.shape[-1] <= _NUCLEUS_GUESS:
        return _draw_ranked(*logits.sort(dim=-1, descending=True, stable=True), total, u, temperature, top_p)
    kept, order = logits.topk(_NUCLEUS_GUESS, dim=-1)
    token = _draw_ranked(kept, order, total, u, temperature, top_p)
    held = ((kept.float() - kept[:, :1].float()) / temperature).exp_().sum(-1, keepdim=True, dtype=torch.float64)
    wide = (held < total * top_p).squeeze(-1).nonzero().squeeze(-1)
    if len(wide):
        ranked = logits[wide].sort(dim=-1, descending=True, stable=True)
        token[wide] = _draw_ranked(*ranked, total[wide], u[wide], temperature, top_p)
    return token


def advance_rows(
    state: Tensor, length: Tensor, out: Tensor, token: Tensor, logp: Tensor, stops: Tensor, max_new_tokens: int,
    row: Tensor | None = None, position: Tensor | None = None, key: Tensor | None = None,
) -> None:
    """Record the tokens just drawn for the rows of a decoding batch, without the host.

    state [4, R] int64: of each row its last token, that token's position, the number of tokens drawn, the key of its
    draws. length [R] int32: the number of tokens drawn before the last; -1 once the row has ended, with a token of
    stops [any] int64 or with max_new_tokens. token [n] int64, logp [n] fp32: for the first n rows; a row that has ended
    stays as it is. out [2, R] fp32: the token, exact, or -1 for a row that had ended, and its log-prob.
    With row, position and key [n] int64, the tokens are the first of the rows `row`, and out has them in that order.
    """
    _advance(state, length, out, token, logp, stops, max_new_tokens, row, position, key)


def _advance_on_cpu(state, length, out, token, logp, stops, max_new_tokens, row, position, key) -> None:
    live = torch.ones_like(token, dtype=torch.bool)
    if row is None:
        row = torch.arange(len(token), device=token.device)
        live, position, drawn = length[: len(row)] >= 0, state[1, : len(row)] + 1, state[2, : len(row)] + 1
        key = state[3, : len(row)]
    else:
        drawn = torch.ones_like(token)
    ended = torch.isin(token, stops) | (drawn >= max_new_tokens)
    state[:, row] = torch.where(live, torch.stack((token, position, drawn, key)), state[:, row])
    length[row] = torch.where(live, torch.where(ended, -1, drawn - 1).int(), length[row])
    out[:, : len(token)] = torch.stack((torch.where(live, token, -1).float(), logp))


def _advance_on_gpu(*arguments) -> None:
    from ._triton import sampling

    sampling.advance_rows(*arguments)


def _sample_on_gpu(*arguments):
    from ._triton import sampling

    return sampling.sample_tokens(*arguments)


_library = torch.library.Library("strop", "FRAGMENT")
_library.define(
    "sample_tokens(Tensor logits, Tensor key, Tensor position, float temperature, int top_k, float top_p) "
    "-> (Tensor, Tensor)"
)
_library.impl("sample_tokens", _sample_on_gpu, "CUDA")
torch.library.register_fake(
    "strop::sample_tokens",
    lambda logits, key, *_: (key.new_empty(len(key)), key.new_empty(len(key), dtype=torch.float32)), lib=_library,
)
_library.define(
    "advance_rows(Tensor(a!) state, Tensor(b!) length, Tensor(c!) out, Tensor token, Tensor logp, Tensor stops, "
    "int max_new_tokens, Tensor? row, Tensor? position, Tensor? key) -> ()"
)
_library.impl("advance_rows", _advance_on_cpu, "CPU")
_library.impl("advance_rows", _advance_on_gpu, "CUDA")
torch.library.register_fake("strop::advance_rows", lambda *_: None, lib=_library)
_sample, _advance = torch.ops.strop.sample_tokens.default, torch.ops.strop.advance_rows.default
