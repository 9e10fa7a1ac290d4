"""Plain PyTorch truth of every op: written for reading, in the inputs' dtype or fp64, and never for speed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import PackedGroups


def attention_mask(query_position: Tensor, key_position: Tensor, sliding_window: int | None = None) -> Tensor:
    """[Q, K] bool, True where a query may see a key of the same sequence: causal, within the window of positions."""
    distance = query_position[:, None] - key_position[None, :]
    visible = distance >= 0
    return visible if sliding_window is None else visible & (distance < sliding_window)


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: PackedGroups,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """strop.kernels.prefix_attention with the whole [T, T] mask and scores written out."""
    row_group = torch.empty(groups.num_tokens, dtype=torch.int64)
    row_completion = torch.full((groups.num_tokens,), -1)
    for g, (start, end) in enumerate(groups.prompt_bounds):
        row_group[start:end] = g
    for c, (start, end) in enumerate(groups.completion_bounds):
        row_group[start:end] = groups.completion_group[c]
        row_completion[start:end] = c
    same_group = row_group[:, None] == row_group[None, :]
    own = (row_completion[None, :] == -1) | (row_completion[:, None] == row_completion[None, :])
    position = groups.position_ids
    visible = same_group.to(q.device) & own.to(q.device) & attention_mask(position, position, sliding_window)
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v


def attention_over_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    completion_k: Tensor,
    completion_v: Tensor,
    chunks: Tensor,
    group: Tensor,
    seen: Tensor,
    length: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """strop.kernels.attention_cached.attention_over_cache, token by token."""
    heads, rows = k.shape[0], len(completion_k) // (k.shape[0] * int(chunks[:, 1].sum()))

    def own(buffer: Tensor, row: int) -> Tensor:  # a view [Hkv, size, D] for each chunk
        return [
            buffer[rows * heads * start : rows * heads * (start + size)].view(rows, heads, size, -1)[row]
            for start, size in chunks.tolist()
        ]

    places = list(enumerate(zip(group.tolist(), seen.tolist(), length.tolist(), strict=True)))
    for i, (g, s, t) in places:
        for new, prompt, completion in ((k, prompt_k, completion_k), (v, prompt_v, completion_v)):
            if t < 0:
                prompt[g, :, s - 1] = new[:, i]
            else:
                c = max(c for c, start in enumerate(chunks[:, 0].tolist()) if start <= t)
                own(completion, i)[c][:, t - int(chunks[c, 0])] = new[:, i]
    found = q.new_empty(q.shape[1], q.shape[0], q.shape[2])
    for i, (g, s, t) in places:
        first = 0 if window is None else max(0, s + t + 1 - window)
        keys, values = (
            torch.cat([prompt[g, :, :s], *(own(completion, i) if t >= 0 else [])], 1)[:, first : s + max(t + 1, 0)]
            for prompt, completion in ((prompt_k, completion_k), (prompt_v, completion_v))
        )
        scores = q[:, i].unflatten(0, (heads, -1)) @ keys.mT * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        found[i] = (scores.softmax(-1) @ values).flatten(0, 1)
    return found


def linear_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """[N, V] logits: softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap) / temperature."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits / temperature


def gather_logprob(logits: Tensor, target: Tensor, ignore_index: int = -100) -> Tensor:
    """log_softmax(logits)[..., target], 0 where the target is ignored."""
    kept = target != ignore_index
    logp = logits.log_softmax(-1).gather(-1, target.where(kept, 0).unsqueeze(-1)).squeeze(-1)
    return logp.where(kept, 0.0)


def logit_stats(logits: Tensor, target: Tensor, ignore_index: int = -100) -> dict[str, Tensor]:
    """Every statistic linear_logprob can emit, each [N], 0 where the target is ignored."""
    kept = target != ignore_index
    logp = logits.log_softmax(-1)
    p = logp.exp()
    target_logit = logits.gather(-1, target.where(kept, 0).unsqueeze(-1))
    stats = {
        "lse": logits.logsumexp(-1),
        "entropy": -(p * logp.where(p > 0, 0.0)).sum(-1),
        "mean_logit": logits.mean(-1),
        "top1": (target_logit >= logits).all(-1).to(logits.dtype),
        "log_sum_p2": (2 * logp).logsumexp(-1),
    }
    return {name: value.where(kept, 0.0) for name, value in stats.items()}


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight [D] * (x [..., D] / sqrt(mean(x^2) + eps)), arXiv 1910.07467, rounded to x's dtype before the product."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def swiglu_linear(gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    """(silu(gate [..., F]) * up [..., F]) @ weight [D, F].T, arXiv 2002.05202."""
    return F.linear(F.silu(gate) * up, weight)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [1, H, T, D] turned by cos and sin [1, T, D], arXiv 2104.09864 with a head's halves as pairs."""
    first, second = x.chunk(2, -1)
    return x * cos.unsqueeze(1) + torch.cat((-second, first), -1) * sin.unsqueeze(1)


def adamw(
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(master, exp_avg, exp_avg_sq) after a step of AdamW, arXiv 1711.05101; step counts from 1."""
    exp_avg = betas[0] * exp_avg + (1 - betas[0]) * grad
    exp_avg_sq = betas[1] * exp_avg_sq + (1 - betas[1]) * grad.square()
    mean, square = exp_avg / (1 - betas[0] ** step), exp_avg_sq / (1 - betas[1] ** step)
    return master * (1 - lr * weight_decay) - lr * mean / (square.sqrt() + eps), exp_avg, exp_avg_sq
