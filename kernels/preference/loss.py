"""Preference losses over packed token log-probs or sequence sums, without a host synchronization."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..head import linear_logprob
from .losses import LOSSES, UNPAIRED, Loss, Options, Pairs, alternating
from .segment_sum import segment_of_token, segment_sum

LOSS_TYPES = tuple(LOSSES)
F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
RPO_DIVERGENCES = ("target_first", "policy_first", "squared")
NLL_NORMALIZATIONS = ("batch_tokens", "sequence_mean", "sequence_sum")

# Order of the metrics: sums, then the counts that preference_means divides them by.
PREFERENCE_METRICS = (
    "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected",
    "loss", "nll_loss", "count", "count/chosen", "count/rejected", "count/nll",
)


def preference_loss(
    policy_logp: Tensor, ref_logp: Tensor | None = None, *, segments: Tensor | None = None,
    num_segments: int | None = None, target_bounds: Sequence[tuple[int, int]] | None = None,
    lengths: Tensor | None = None, loss_mask: Tensor | None = None, nll_mask: Tensor | None = None,
    loss_type: str | Sequence[str] = "sigmoid", loss_weights: Sequence[float] | None = None, beta: float = 0.1,
    label_smoothing: float = 0.0,
    nll_weight: float = 0.0, nll_normalization: str = "batch_tokens", pair_denominator: Tensor | float | None = None,
    nll_denominator: Tensor | float | None = None, length_normalization: bool = False,
    f_divergence: str = "reverse_kl", f_alpha: float = 1.0, ld_alpha: float | None = None,
    log_sum_p2: Tensor | None = None, simpo_gamma: float = 0.5, dpop_lambda: float = 50.0, discopop_tau: float = 0.05,
    rpo_eta: float = 1.0, rpo_divergence: str = "target_first", reward_margin: Tensor | None = None,
    desirable: Tensor | None = None, desirable_weight: float = 1.0, undesirable_weight: float = 1.0,
    baseline: Tensor | float = 0.0, batch: tuple[Tensor, Tensor] | None = None, batch_offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """A preference loss and its metrics, on the device, without a host synchronization.

    The S completions alternate chosen, rejected, chosen, rejected ...: B = S / 2 pairs. policy_logp is either token
    log-probs [M] with `segments` [M] (ascending completion ids, as PackedGroups.target_segment) and num_segments = S,
    or with `target_bounds` on the host; or sequence sums [S], with `lengths` [S] if a loss or the NLL divides by them.
    ref_logp has the same shape, or is sequence sums [S]; None for losses without a reference. loss_mask and nll_mask
    [M] bool: the tokens in the loss and in its NLL term, e.g. end-of-turn tokens in the latter alone; None: all of
    them.

    loss_type: one of LOSS_TYPES, or several with loss_weights. The loss is the sum over pairs over pair_denominator
    (default B), plus nll_weight times the NLL of the chosen completions over nll_denominator: "batch_tokens" sums over
    tokens (default denominator: the chosen tokens), "sequence_mean" and "sequence_sum" use each completion's mean or
    sum (default B). "orpo" includes its NLL with weight 1.

    Options: label_smoothing; length_normalization divides each score by its length ("sigmoid_norm" and "ipo_norm",
    TRL's IPO, always do); f_divergence of the log-ratios (arXiv 2309.16240) with f_alpha; ld_alpha weights tokens
    beyond the shorter completion's length (arXiv 2409.06411); log_sum_p2 [M] enables WPO's pair weights (arXiv
    2406.11827); reward_margin [B] is dr* of "rpo"; baseline is z of "kto" (log-ratio) or d of "bco_pair" (reward);
    desirable [S] bool makes "kto" and "bco_pair" unpaired: completions in any order, default denominator S. batch
    holds no-grad sequence sums (policy [2G], reference [2G]) of the whole global batch for "aot" and "aot_unpaired",
    batch_offset is this call's first pair in it; without batch the given pairs are the batch.

    Returns (loss, metrics): loss 0-dim; metrics fp32 sums in the order of PREFERENCE_METRICS, to be added over
    microbatches and ranks and then divided by preference_means. Rewards are beta times the log-ratio. Raises ValueError
    on mismatched shapes, options out of range, and options that the loss would ignore.
    """
    types = (loss_type,) if isinstance(loss_type, str) else tuple(loss_type)
    weights = (1.0,) * len(types) if loss_weights is None else tuple(loss_weights)
    o = Options(
        beta=beta, label_smoothing=label_smoothing, simpo_gamma=simpo_gamma, dpop_lambda=dpop_lambda,
        discopop_tau=discopop_tau, rpo_eta=rpo_eta, rpo_divergence=rpo_divergence, desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
    )
    losses = _check_losses(types, weights, o)
    _check_options(types, losses, o, ref_logp, length_normalization, f_divergence, ld_alpha, log_sum_p2, batch)
    if nll_normalization not in NLL_NORMALIZATIONS:
        raise ValueError(f"unknown nll_normalization {nll_normalization!r}; known are {NLL_NORMALIZATIONS}")
    if "orpo" in types:
        if nll_weight:
            raise ValueError("orpo includes its NLL with weight 1; nll_weight must be 0")
        nll_weight = weights[types.index("orpo")]
    if ("rpo" in types) != (reward_margin is not None):
        raise ValueError("reward_margin is required by rpo and used by no other loss")
    alone = len(types) == 1 and types[0] in UNPAIRED
    if desirable is not None and (not alone or nll_weight or log_sum_p2 is not None or ld_alpha is not None):
        raise ValueError("desirable is for kto alone or bco_pair alone, without nll_weight, ld_alpha and log_sum_p2")

    dtype = torch.promote_types(policy_logp.dtype, torch.float32)
    policy_logp = policy_logp.to(dtype)
    ref_logp = None if ref_logp is None else ref_logp.detach().to(dtype)
    offsets = _offsets(policy_logp, segments, num_segments, target_bounds)
    completions = policy_logp.shape[0] if offsets is None else offsets.shape[0] - 1
    for mask in (loss_mask, nll_mask):
        if mask is not None and (offsets is None or mask.shape != policy_logp.shape or mask.dtype != torch.bool):
            raise ValueError("loss_mask and nll_mask are bool, one entry for each token log-prob")
    if desirable is None and (completions % 2 or completions == 0):
        raise ValueError(f"{completions} completions are not pairs of chosen and rejected")
    nll_lengths = lengths
    if offsets is not None:
        lengths, nll_lengths = _counts(offsets, loss_mask, dtype), _counts(offsets, nll_mask, dtype)
    elif ld_alpha is not None or log_sum_p2 is not None:
        raise ValueError("ld_alpha and log_sum_p2 need token log-probs with segments or target_bounds")
    nll_needs_lengths = nll_weight != 0 and nll_normalization != "sequence_sum"
    if lengths is None and (nll_needs_lengths or length_normalization or any(loss.mean for loss in losses)):
        raise ValueError("this loss divides by completion lengths: give token log-probs, or lengths with sequence sums")
    if ref_logp is not None and ref_logp.shape not in ((completions,), policy_logp.shape):
        raise ValueError(f"ref_logp {list(ref_logp.shape)} is neither {completions} sums nor one for each token")

    lengths, nll_lengths = (None if n is None else n.to(dtype) for n in (lengths, nll_lengths))
    policy, ref = _sequence_sums(policy_logp, ref_logp, offsets, loss_mask, ld_alpha)
    ratio = policy if ref is None else policy - ref
    if desirable is not None:
        return _unpaired(types[0], ratio, policy, desirable, baseline, o, weights[0], pair_denominator)
    if batch is None and any(loss.batchwide for loss in losses):
        batch = (policy.detach(), ref)
    score = _f_score(ratio, f_divergence, f_alpha)
    terms = []
    for loss, weight in zip(losses, weights, strict=True):
        normalize = loss.scores and (loss.mean or length_normalization)
        scaled = score / lengths.clamp_min(1) if normalize else score
        pairs = Pairs(
            *alternating(ratio), *alternating(scaled), policy=alternating(policy),
            lengths=None if lengths is None else alternating(lengths), baseline=baseline, reward_margin=reward_margin,
            batch=batch, batch_offset=batch_offset,
        )
        terms.append(loss.formula(pairs, o) if weight == 1.0 else weight * loss.formula(pairs, o))
    per_pair = sum(terms[1:], terms[0])
    if log_sum_p2 is not None:
        likelihood = policy_logp.detach() - log_sum_p2.detach()
        likelihood = segment_sum(_masked(likelihood, loss_mask), offsets) / lengths.clamp_min(1)
        per_pair = per_pair * likelihood.view(-1, 2).sum(1).exp()
    pair_sum = per_pair.sum()
    # ld_alpha does not apply to the NLL.
    same = ld_alpha is None and loss_mask is nll_mask
    unweighted = policy if same else segment_sum(_masked(policy_logp, nll_mask), offsets)
    nll_sum, nll_count = _nll(unweighted, nll_lengths, nll_normalization)
    metrics = _metrics(ratio, policy, beta, pair_sum, nll_sum, nll_count)
    total = pair_sum / (completions // 2 if pair_denominator is None else pair_denominator)
    if nll_weight:
        total = total + nll_weight * nll_sum / (nll_count.clamp_min(1) if nll_denominator is None else nll_denominator)
    return total, metrics


def linear_preference_loss(
    hidden: Tensor, weight: Tensor, target: Tensor, ref_logp: Tensor | None = None, bias: Tensor | None = None, *,
    logit_scale: float = 1.0, temperature: float = 1.0, softcap: float | None = None, ignore_index: int = -100,
    byte_budget: int | None = None, wpo: bool = False, **options,
) -> tuple[Tensor, Tensor]:
    """preference_loss of linear_logprob: from the hidden states that predict the completions' tokens to the loss.

    hidden [M, D], weight [V, D], target [M], bias [V] and the keywords named here as in linear_logprob; segments,
    num_segments or target_bounds, ref_logp and every other option as in preference_loss. wpo weights the pairs as WPO
    does (arXiv 2406.11827). An ignored target counts as a token of log-prob 0: drop it if lengths matter. Returns and
    raises as preference_loss.
    """
    if "log_sum_p2" in options:
        raise ValueError("log_sum_p2 is computed here: set wpo=True")
    scored = linear_logprob(
        hidden, weight, target, bias, logit_scale=logit_scale, temperature=temperature, softcap=softcap,
        ignore_index=ignore_index, stats=("log_sum_p2",) if wpo else (), byte_budget=byte_budget,
    )
    logp, log_sum_p2 = (scored[0], scored[1]["log_sum_p2"]) if wpo else (scored, None)
    return preference_loss(logp, ref_logp, log_sum_p2=log_sum_p2, **options)


def preference_means(metrics: Tensor) -> dict[str, float]:
    """Means by name from summed metrics of preference_loss; synchronizes with the device.

    For unpaired data, accuracies are omitted and rewards/margins is the difference of the two means.
    """
    sums = dict(zip(PREFERENCE_METRICS, metrics.tolist(), strict=True))
    both, chosen, rejected, nll = (max(value, 1.0) for value in metrics[8:].tolist())
    means = {
        "rewards/chosen": sums["rewards/chosen"] / chosen, "rewards/rejected": sums["rewards/rejected"] / rejected,
        "rewards/accuracies": sums["rewards/accuracies"] / both, "logps/chosen": sums["logps/chosen"] / chosen,
        "logps/rejected": sums["logps/rejected"] / rejected, "loss": sums["loss"] / both,
        "nll_loss": sums["nll_loss"] / nll,
    }
    means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
    if sums["count"] != sums["count/chosen"]:
        del means["rewards/accuracies"]
    return means


def _offsets(
    policy_logp: Tensor, segments: Tensor | None, num_segments: int | None,
    target_bounds: Sequence[tuple[int, int]] | None,
) -> Tensor | None:
    """[S + 1] int64 offsets of the completions in policy_logp; None if it holds sequence sums."""
    if policy_logp.dim() != 1:
        raise ValueError(f"policy_logp must have one dimension, got {list(policy_logp.shape)}")
    if target_bounds is not None:
        if segments is not None:
            raise ValueError("give segments or target_bounds, not both")
        offsets = torch.tensor([0, *(end for _, end in target_bounds)])
        return offsets.to(policy_logp.device, non_blocking=True)
    if segments is None:
        return None
    if num_segments is None or segments.shape != policy_logp.shape:
        raise ValueError("segments must have policy_logp's shape, and num_segments must be given")
    edges = torch.arange(num_segments + 1, dtype=segments.dtype, device=segments.device)
    return torch.searchsorted(segments, edges)


def _masked(values: Tensor, mask: Tensor | None) -> Tensor:
    """[M] values, 0 where the mask is False, also in place of infinities."""
    return values if mask is None else torch.where(mask, values, 0.0)


def _counts(offsets: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[S] the completions' numbers of tokens, of those in the mask."""
    return offsets.diff() if mask is None else segment_sum(mask.to(dtype), offsets)


def _beyond_shorter(offsets: Tensor, mask: Tensor | None, tokens: int) -> Tensor:
    """[M] bool: the token is beyond the length of the pair's shorter completion, both without masked tokens."""
    segment = segment_of_token(offsets, tokens)
    counted = torch.ones(tokens, dtype=torch.int64, device=offsets.device) if mask is None else mask.long()
    before = torch.cat([counted.new_zeros(1), counted.cumsum(0)])  # counted tokens before each token
    start = before.index_select(0, offsets)
    shorter = torch.minimum(*alternating(start.diff()))
    place = before.narrow(0, 0, tokens) - start.index_select(0, segment)
    return place >= shorter.index_select(0, segment // 2)


def _f_score(ratio: Tensor, f_divergence: str, alpha: float) -> Tensor:
    """f'(exp(ratio)), arXiv 2309.16240 table 1."""
    if f_divergence == "forward_kl":
        return -torch.expm1(-ratio)
    if f_divergence == "js_divergence":
        return math.log(2) + F.logsigmoid(ratio)
    if f_divergence == "alpha_divergence" and alpha != 1.0:
        # exp(80) is finite in fp32; beyond that the clamp makes the pair's gradient zero.
        return torch.expm1(((alpha - 1) * ratio).clamp(max=80.0)) / (alpha - 1)
    return ratio


def _sequence_sums(
    policy_logp: Tensor, ref_logp: Tensor | None, offsets: Tensor | None, mask: Tensor | None, ld_alpha: float | None
) -> tuple[Tensor, Tensor | None]:
    """[S] sums of policy and reference over the tokens of the mask, those beyond the pair's shorter completion weighted
    by ld_alpha."""
    if offsets is None:
        return policy_logp, ref_logp
    per_token_ref = ref_logp is not None and ref_logp.shape == policy_logp.shape
    policy_logp = _masked(policy_logp, mask)
    if per_token_ref:
        ref_logp = _masked(ref_logp, mask)
    if ld_alpha is not None:
        if ref_logp is not None and not per_token_ref:
            raise ValueError("ld_alpha needs the reference's token log-probs, not its sums")
        token_weight = torch.where(_beyond_shorter(offsets, mask, policy_logp.shape[0]), ld_alpha, 1.0)
        policy_logp = policy_logp * token_weight
        ref_logp = None if ref_logp is None else ref_logp * token_weight
    return segment_sum(policy_logp, offsets), segment_sum(ref_logp, offsets) if per_token_ref else ref_logp


def _nll(policy: Tensor, lengths: Tensor | None, normalization: str) -> tuple[Tensor, Tensor]:
    """The chosen completions' NLL summed under the given normalization, and its default denominator."""
    nll = -alternating(policy)[0]
    count = torch.ones_like(nll)
    if lengths is not None and normalization == "batch_tokens":
        count = alternating(lengths)[0]
    elif lengths is not None and normalization == "sequence_mean":
        nll = nll / alternating(lengths)[0].clamp_min(1)
    return nll.sum(), count.sum()


@torch.no_grad()
def _metrics(
    ratio: Tensor, policy: Tensor, beta: float, pair_sum: Tensor, nll_sum: Tensor, nll_count: Tensor
) -> Tensor:
    chosen, rejected = alternating(beta * ratio)
    chosen_logp, rejected_logp = alternating(policy)
    margin = chosen - rejected
    count = torch.full_like(pair_sum, margin.shape[0])
    by_pair = torch.stack([chosen, rejected, (margin > 0).to(ratio.dtype), margin, chosen_logp, rejected_logp])
    totals = torch.stack([pair_sum, nll_sum, count, count, count, nll_count])
    return torch.cat([by_pair.sum(1), totals]).float()


def _unpaired(
    name: str, ratio: Tensor, policy: Tensor, desirable: Tensor, baseline: Tensor | float, o: Options, weight: float,
    denominator: Tensor | float | None,
) -> tuple[Tensor, Tensor]:
    """preference_loss for completions that are each labeled desirable or not, instead of paired."""
    if desirable.shape != ratio.shape or desirable.dtype != torch.bool:
        raise ValueError(f"desirable must be bool [{ratio.shape[0]}], got {desirable.dtype} {list(desirable.shape)}")
    wanted, unwanted = UNPAIRED[name]
    each = weight * torch.where(desirable, wanted(ratio, baseline, o), unwanted(ratio, baseline, o))
    total = each.sum()
    with torch.no_grad():
        chosen, rejected = desirable.to(ratio.dtype), desirable.logical_not().to(ratio.dtype)
        zero, reward = torch.zeros_like(total), o.beta * ratio
        entries = ((reward * chosen).sum(), (reward * rejected).sum(), zero, zero)
        entries += ((policy * chosen).sum(), (policy * rejected).sum(), total, zero)
        entries += (zero + ratio.shape[0], chosen.sum(), rejected.sum(), zero)
        metrics = torch.stack(entries).float()
    return total / (max(ratio.shape[0], 1) if denominator is None else denominator), metrics


def _check_losses(types: tuple[str, ...], weights: tuple[float, ...], o: Options) -> list[Loss]:
    """The losses by name. Raises ValueError on unknown names and on options outside a formula's domain."""
    if not types or len(types) != len(weights):
        raise ValueError(f"{len(types)} loss types need as many loss_weights, got {len(weights)}")
    if unknown := [name for name in types if name not in LOSSES]:
        raise ValueError(f"unknown loss_type {unknown[0]!r}; known are {LOSS_TYPES}")
    if not o.beta > 0:
        raise ValueError(f"beta must be above 0, got {o.beta}")
    if not 0 <= o.label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {o.label_smoothing}")
    if "exo_pair" in types and o.label_smoothing == 0:
        raise ValueError("exo_pair takes the log of label_smoothing, which must be above 0 (the paper uses 1e-3)")
    if not o.discopop_tau > 0:
        raise ValueError(f"discopop_tau must be above 0, got {o.discopop_tau}")
    if o.rpo_divergence not in RPO_DIVERGENCES:
        raise ValueError(f"unknown rpo_divergence {o.rpo_divergence!r}; known are {RPO_DIVERGENCES}")
    return [LOSSES[name] for name in types]


def _check_options(
    types: tuple[str, ...], losses: list[Loss], o: Options, ref_logp: Tensor | None, length_normalization: bool,
    f_divergence: str, ld_alpha: float | None, log_sum_p2: Tensor | None, batch: tuple[Tensor, Tensor] | None,
) -> None:
    """Raises ValueError on an option that a loss needs and lacks, or that all of them would ignore."""
    for name, loss in zip(types, losses, strict=True):
        if loss.reference == "needed" and ref_logp is None:
            raise ValueError(f"{name} needs ref_logp")
        if loss.reference == "none" and ref_logp is not None:
            raise ValueError(f"{name} has no reference model; ref_logp must be None")
        if ld_alpha is not None and (loss.mean or length_normalization):
            raise ValueError(f"ld_alpha and {name}'s division by length cancel each other")
        if log_sum_p2 is not None and (loss.batchwide or name == "kto"):
            raise ValueError(f"WPO weights (log_sum_p2) belong to pairs; {name} has none")
    if f_divergence not in F_DIVERGENCES:
        raise ValueError(f"unknown f_divergence {f_divergence!r}; known are {F_DIVERGENCES}")
    if f_divergence != "reverse_kl" and (ref_logp is None or not any(loss.scores for loss in losses)):
        raise ValueError(f"f_divergence {f_divergence!r} would be ignored by {types}")
    if length_normalization and not any(loss.scores for loss in losses):
        raise ValueError(f"length_normalization would be ignored by {types}")
    if o.label_smoothing and not any(loss.smoothing for loss in losses):
        raise ValueError(f"label_smoothing would be ignored by {types}")
    if batch is not None and not any(loss.batchwide for loss in losses):
        raise ValueError(f"batch would be ignored by {types}")
