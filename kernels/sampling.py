"""Token sampling as a pure function of (logits row, key, position)."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


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
    truncation. Raises ValueError on options out of range.
    """
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"temperature and top_k must be >= 0 and top_p in (0, 1], got {temperature}, {top_k} and {top_p}"
        )
    likeliest = logits.amax(-1, keepdim=True).float()
    weights = _exp_blocks(logits, likeliest, 1.0)
    block_cumulative = _cumulative(weights.sum(-1))
    lse = likeliest.squeeze(-1) + block_cumulative[:, -1].log().float()
    if temperature == 0:
        token = _argmax(logits)
    elif 0 < top_k < logits.shape[-1]:
        token = _draw_ranked(*logits.topk(top_k, dim=-1), None, uniform(key, position), temperature, top_p)
    else:
        if temperature != 1:
            weights = _exp_blocks(logits, likeliest, temperature)
            block_cumulative = _cumulative(weights.sum(-1))
        if top_p == 1:
            token = _draw_blocked(weights, block_cumulative, uniform(key, position))
        else:
            token = _draw_nucleus(logits, block_cumulative[:, -1:], uniform(key, position), temperature, top_p)
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


def _exp_blocks(logits: Tensor, likeliest: Tensor, temperature: float) -> Tensor:
    """[B, V / _BLOCK rounded up, _BLOCK] fp32 exp((logits - likeliest) / temperature), 0 past the vocabulary."""
    rows, vocab = logits.shape
    blocks = logits.new_empty(rows, -(-vocab // _BLOCK) * _BLOCK, dtype=torch.float32)
    blocks[:, vocab:] = -torch.inf
    weights = blocks[:, :vocab]
    weights.copy_(logits).sub_(likeliest)
    if temperature != 1:
        weights.div_(temperature)
    return blocks.exp_().unflatten(-1, (-1, _BLOCK))


def _cumulative(weights: Tensor) -> Tensor:
    return weights.cumsum(-1, dtype=torch.float64)


def _invert(cumulative: Tensor, mass: Tensor) -> Tensor:
    """[B, 1] index of the first entry above mass [B, 1]; mass at or above the last entry is clamped just below it.

    An entry of weight 0 has an empty interval and is never returned.
    """
    mass = torch.minimum(mass, torch.nextafter(cumulative[:, -1:], torch.zeros_like(mass)))
    return torch.searchsorted(cumulative, mass, right=True).clamp_(max=cumulative.shape[-1] - 1)


def _draw_blocked(weights: Tensor, block_cumulative: Tensor, u: Tensor) -> Tensor:
    """[B] tokens by inverse CDF in token order: the block first, then the token in it."""
    mass = u.unsqueeze(-1) * block_cumulative[:, -1:]
    block = _invert(block_cumulative, mass)
    before = torch.where(block > 0, block_cumulative.gather(-1, (block - 1).clamp_(min=0)), 0.0)
    block_mass = block_cumulative.gather(-1, block) - before
    inside = _cumulative(weights[torch.arange(len(weights), device=weights.device), block.squeeze(-1)])
    # The block's fp32 sum and its fp64 cumulative sum differ by rounding, so scale by the fraction, not the mass.
    column = _invert(inside, (mass - before) / block_mass * inside[:, -1:])
    return (block * _BLOCK + column).squeeze(-1)


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
