"""Pairwise preference losses in one launch: segment sums, margin, loss, gradient coefficients and metrics.

One program goes over all pairs, a tile of pairs by tokens at a time: a batch holds few pairs, and a single program
needs no atomics and gives the same bits every time. The formulas are those of kernels/losses.py with their derivatives.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# The losses that are functions of c, r and the lengths alone; several names share a formula.
SIGMOID, ROBUST, IPO, HINGE, EXO, DISCOPOP, NCA, BCO, APO_ZERO, APO_DOWN, SPPO, DPOP = range(12)
REF_NONE, REF_TOKENS, REF_SUMS = range(3)
NLL_TOKENS, NLL_MEAN, NLL_SUM = range(3)
METRICS = 12

_PAIRS, _TOKENS = 16, 128


@triton.jit
def _log_sigmoid(x):
    return tl.minimum(x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1.0 + e)


@triton.jit
def _margin_loss(x, e, tau, beta, LOSS: tl.constexpr):
    """(loss, its derivative in x) of x = beta * margin of scores (plus SimPO's offset)."""
    if LOSS == 0:  # sigmoid, SimPO
        loss = -(1.0 - e) * _log_sigmoid(x) - e * _log_sigmoid(-x)
        slope = e * _sigmoid(x) - (1.0 - e) * _sigmoid(-x)
    elif LOSS == 1:  # robust
        loss = (e * _log_sigmoid(-x) - (1.0 - e) * _log_sigmoid(x)) / (1.0 - 2.0 * e)
        slope = (-e * _sigmoid(x) - (1.0 - e) * _sigmoid(-x)) / (1.0 - 2.0 * e)
    elif LOSS == 2:  # IPO: (x / beta - 1 / (2 beta))^2
        gap = (x - 0.5) / beta
        loss = gap * gap
        slope = 2.0 * gap / beta
    elif LOSS == 3:  # hinge
        loss = tl.maximum(1.0 - x, 0.0)
        slope = tl.where(x < 1.0, -1.0, 0.0)
    elif LOSS == 4:  # EXO
        chosen = _log_sigmoid(x) - tl.log(1.0 - e)
        rejected = _log_sigmoid(-x) - tl.log(e)
        p = _sigmoid(x)
        q = _sigmoid(-x)
        loss = p * chosen + q * rejected
        slope = p * q * (chosen - rejected)
    else:  # DiscoPOP
        m = _sigmoid(x / tau)
        exponential = tl.exp(-x)
        loss = (m - 1.0) * _log_sigmoid(x) + m * exponential
        slope = m * (1.0 - m) / tau * (exponential + _log_sigmoid(x)) - (1.0 - m) * _sigmoid(-x) - m * exponential
    return loss, slope


@triton.jit
def _ratio_loss(c, r, beta, baseline, dpop_lambda, LOSS: tl.constexpr):
    """(loss, derivative in c, derivative in r) of the log-ratios."""
    x = beta * c
    y = beta * r
    if LOSS == 6:  # NCA
        loss = -_log_sigmoid(x) - 0.5 * _log_sigmoid(-x) - 0.5 * _log_sigmoid(-y)
        dc = beta * (0.5 * _sigmoid(x) - _sigmoid(-x))
        dr = beta * 0.5 * _sigmoid(y)
    elif LOSS == 7:  # BCO
        loss = -_log_sigmoid(x - baseline) - _log_sigmoid(baseline - y)
        dc = -beta * _sigmoid(baseline - x)
        dr = beta * _sigmoid(y - baseline)
    elif LOSS == 8:  # APO zero
        loss = _sigmoid(-x) + _sigmoid(y)
        dc = -beta * _sigmoid(x) * _sigmoid(-x)
        dr = beta * _sigmoid(y) * _sigmoid(-y)
    elif LOSS == 9:  # APO down
        loss = _sigmoid(x) + _sigmoid(y - x)
        dr = beta * _sigmoid(y - x) * _sigmoid(x - y)
        dc = beta * _sigmoid(x) * _sigmoid(-x) - dr
    elif LOSS == 10:  # SPPO
        chosen = c - 0.5 / beta
        rejected = r + 0.5 / beta
        loss = chosen * chosen + rejected * rejected
        dc = 2.0 * chosen
        dr = 2.0 * rejected
    else:  # DPOP
        z = beta * (c - r - dpop_lambda * tl.maximum(-c, 0.0))
        loss = -_log_sigmoid(z)
        dr = beta * _sigmoid(-z)
        dc = -dr * (1.0 + tl.where(c < 0, dpop_lambda, 0.0))
    return loss, dc, dr


@triton.jit
def _tile_sum(values_ptr, first, length, TOKENS: tl.constexpr, PAIRS: tl.constexpr):
    """[PAIRS] sums of length values from first on."""
    total = tl.zeros([PAIRS], tl.float32)
    lanes = tl.arange(0, TOKENS)
    for start in range(0, tl.max(length, 0), TOKENS):
        token = start + lanes[None, :]
        inside = token < length[:, None]
        total += tl.sum(tl.load(values_ptr + first[:, None] + token, mask=inside, other=0.0), 1)
    return total


@triton.jit
def pairwise_kernel(
    policy_ptr,
    ref_ptr,
    offsets_ptr,
    slope_ptr,
    nll_slope_ptr,
    metrics_ptr,
    pairs,
    beta,
    smoothing,
    gamma,
    tau,
    baseline,
    dpop_lambda,
    LOSS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    REF: tl.constexpr,
    NLL: tl.constexpr,
    PAIRS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    sum_chosen_reward = 0.0
    sum_rejected_reward = 0.0
    sum_accurate = 0.0
    sum_chosen_logp = 0.0
    sum_rejected_logp = 0.0
    sum_loss = 0.0
    sum_nll = 0.0
    nll_count = 0.0
    for first_pair in range(0, pairs, PAIRS):
        pair = first_pair + tl.arange(0, PAIRS)
        live = pair < pairs
        chosen_start = tl.load(offsets_ptr + 2 * pair, mask=live, other=0)
        rejected_start = tl.load(offsets_ptr + 2 * pair + 1, mask=live, other=0)
        end = tl.load(offsets_ptr + 2 * pair + 2, mask=live, other=0)
        chosen_length = rejected_start - chosen_start
        rejected_length = end - rejected_start
        chosen = _tile_sum(policy_ptr, chosen_start, chosen_length, TOKENS, PAIRS)
        rejected = _tile_sum(policy_ptr, rejected_start, rejected_length, TOKENS, PAIRS)
        c = chosen
        r = rejected
        if REF == 1:
            c -= _tile_sum(ref_ptr, chosen_start, chosen_length, TOKENS, PAIRS)
            r -= _tile_sum(ref_ptr, rejected_start, rejected_length, TOKENS, PAIRS)
        elif REF == 2:
            c -= tl.load(ref_ptr + 2 * pair, mask=live, other=0.0)
            r -= tl.load(ref_ptr + 2 * pair + 1, mask=live, other=0.0)
        chosen_tokens = tl.maximum(chosen_length, 1).to(tl.float32)
        rejected_tokens = tl.maximum(rejected_length, 1).to(tl.float32)
        if LOSS <= 5:
            if NORMALIZE:
                loss, slope = _margin_loss(
                    beta * (c / chosen_tokens - r / rejected_tokens) - gamma, smoothing, tau, beta, LOSS
                )
                dc = beta * slope / chosen_tokens
                dr = -beta * slope / rejected_tokens
            else:
                loss, slope = _margin_loss(beta * (c - r) - gamma, smoothing, tau, beta, LOSS)
                dc = beta * slope
                dr = -beta * slope
        else:
            loss, dc, dr = _ratio_loss(c, r, beta, baseline, dpop_lambda, LOSS)
        tl.store(slope_ptr + 2 * pair, dc, mask=live)
        tl.store(slope_ptr + 2 * pair + 1, dr, mask=live)
        nll_slope = tl.full([PAIRS], -1.0, tl.float32)
        if NLL == 1:
            nll_slope = -1.0 / chosen_tokens
        tl.store(nll_slope_ptr + pair, nll_slope, mask=live)
        if NLL == 0:
            nll_count += tl.sum(chosen_length, 0).to(tl.float32)
        else:
            nll_count += tl.sum(live.to(tl.float32), 0)
        sum_nll += tl.sum(tl.where(live, nll_slope * chosen, 0.0), 0)
        sum_loss += tl.sum(tl.where(live, loss, 0.0), 0)
        sum_chosen_reward += beta * tl.sum(c, 0)
        sum_rejected_reward += beta * tl.sum(r, 0)
        sum_accurate += tl.sum((live & (beta * c - beta * r > 0)).to(tl.float32), 0)
        sum_chosen_logp += tl.sum(chosen, 0)
        sum_rejected_logp += tl.sum(rejected, 0)
    # Not pairs.to(): a launch with one pair makes a constant of it.
    count = pairs * 1.0
    tl.store(metrics_ptr + 0, sum_chosen_reward)
    tl.store(metrics_ptr + 1, sum_rejected_reward)
    tl.store(metrics_ptr + 2, sum_accurate)
    tl.store(metrics_ptr + 3, sum_chosen_reward - sum_rejected_reward)
    tl.store(metrics_ptr + 4, sum_chosen_logp)
    tl.store(metrics_ptr + 5, sum_rejected_logp)
    tl.store(metrics_ptr + 6, sum_loss)
    tl.store(metrics_ptr + 7, sum_nll)
    tl.store(metrics_ptr + 8, count)
    tl.store(metrics_ptr + 9, count)
    tl.store(metrics_ptr + 10, count)
    tl.store(metrics_ptr + 11, nll_count)


@triton.jit
def pairwise_backward_kernel(grad_ptr, offsets_ptr, slope_ptr, nll_slope_ptr, out_ptr, BLOCK: tl.constexpr):
    """Token gradients; grad holds those of METRICS, of which the loss and the NLL count."""
    completion = tl.program_id(0)
    start = tl.load(offsets_ptr + completion)
    end = tl.load(offsets_ptr + completion + 1)
    value = tl.load(grad_ptr + 6) * tl.load(slope_ptr + completion)
    if completion % 2 == 0:
        value += tl.load(grad_ptr + 7) * tl.load(nll_slope_ptr + completion // 2)
    for first in range(start, end, BLOCK):
        token = first + tl.arange(0, BLOCK)
        tl.store(out_ptr + token, tl.zeros([BLOCK], tl.float32) + value, mask=token < end)


def pairwise(
    policy_logp: Tensor,
    ref_logp: Tensor | None,
    offsets: Tensor,
    loss: int,
    normalize: bool,
    nll: int,
    numbers: tuple[float, float, float, float, float, float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums in the order of PREFERENCE_METRICS [12], d loss / d completion sum [2B] and d NLL / d chosen sum [B].

    policy_logp [M] fp32, ref_logp [M] or [2B] fp32, offsets [2B + 1] int64. numbers: beta, label smoothing, SimPO's
    offset, DiscoPOP's temperature, BCO's baseline, DPOP's weight.
    """
    completions = offsets.shape[0] - 1
    policy_logp = policy_logp.contiguous()
    ref_logp = None if ref_logp is None else ref_logp.contiguous()
    reference = REF_NONE
    if ref_logp is not None:
        reference = REF_TOKENS if ref_logp.shape == policy_logp.shape else REF_SUMS
    slope = policy_logp.new_empty(completions)
    nll_slope = policy_logp.new_empty(completions // 2)
    metrics = policy_logp.new_empty(METRICS)
    pairwise_kernel[(1,)](
        policy_logp,
        policy_logp if ref_logp is None else ref_logp,
        offsets,
        slope,
        nll_slope,
        metrics,
        completions // 2,
        *numbers,
        LOSS=loss,
        NORMALIZE=normalize,
        REF=reference,
        NLL=nll,
        PAIRS=_PAIRS,
        TOKENS=_TOKENS,
        num_warps=8,
    )
    return metrics, slope, nll_slope


def pairwise_backward(grad: Tensor, offsets: Tensor, slope: Tensor, nll_slope: Tensor, tokens: int) -> Tensor:
    """Gradient of policy_logp [M], from that of the sums."""
    out = torch.zeros(tokens, dtype=slope.dtype, device=slope.device)
    grid = (offsets.shape[0] - 1,)
    pairwise_backward_kernel[grid](grad.contiguous(), offsets, slope, nll_slope, out, BLOCK=1024, num_warps=4)
    return out
