"""The formulas of the preference losses and the options that each of them uses.

Notation, per pair: c and r are the log-ratios log pi - log ref of the chosen and the rejected completion, each summed
over its tokens (log pi alone where there is no reference), D = c - r, b = beta, e = label smoothing, S = log sigmoid.
Scores are log-ratios after the f-divergence and length normalization; losses that use scores take D from them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Options:
    """Scalar options of preference_loss, by the same names."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.5
    dpop_lambda: float = 50.0
    discopop_tau: float = 0.05
    rpo_eta: float = 1.0
    rpo_divergence: str = "target_first"
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0


@dataclass(frozen=True)
class Pairs:
    """Inputs of the formulas, [B] each.

    policy: sequence log-probs. lengths: tokens in the loss. baseline: KTO's z or BCO's d. reward_margin: RPO's dr*.
    batch: no-grad sequence log-probs (policy, reference) of the whole global batch, [2G] each, alternating chosen and
    rejected; batch_offset: the index of the first of these pairs in it.
    """

    c: Tensor
    r: Tensor
    chosen_score: Tensor
    rejected_score: Tensor
    policy: tuple[Tensor, Tensor]
    lengths: tuple[Tensor, Tensor] | None
    baseline: Tensor | float = 0.0
    reward_margin: Tensor | None = None
    batch: tuple[Tensor, Tensor] | None = None
    batch_offset: int = 0

    @property
    def margin(self) -> Tensor:
        return self.chosen_score - self.rejected_score

    def mean_logps(self) -> tuple[Tensor, Tensor]:
        chosen, rejected = self.policy
        return chosen / self.lengths[0].clamp_min(1), rejected / self.lengths[1].clamp_min(1)


def _smoothed(x: Tensor, o: Options) -> Tensor:
    loss = -F.logsigmoid(x)
    return loss if o.label_smoothing == 0 else torch.lerp(loss, -F.logsigmoid(-x), o.label_smoothing)


def _sigmoid(x: Pairs, o: Options) -> Tensor:
    """-S(bD), arXiv 2305.18290; with label smoothing e: -(1-e) S(bD) - e S(-bD), Mitchell's cDPO note."""
    return _smoothed(o.beta * x.margin, o)


def _robust(x: Pairs, o: Options) -> Tensor:
    """[-(1-e) S(bD) + e S(-bD)] / (1-2e), arXiv 2403.00409."""
    e, logits = o.label_smoothing, o.beta * x.margin
    return (e * F.logsigmoid(-logits) - (1 - e) * F.logsigmoid(logits)) / (1 - 2 * e)


def _ipo(x: Pairs, o: Options) -> Tensor:
    """(D - 1/(2b))^2, arXiv 2310.12036 eq. 17."""
    return (x.margin - 0.5 / o.beta).square()


def _hinge(x: Pairs, o: Options) -> Tensor:
    """max(0, 1 - bD), arXiv 2309.06657."""
    return torch.relu(1 - o.beta * x.margin)


def _simpo(x: Pairs, o: Options) -> Tensor:
    """-S(b (mean log pi_w - mean log pi_l) - g), arXiv 2405.14734."""
    chosen, rejected = x.mean_logps()
    return _smoothed(o.beta * (chosen - rejected) - o.simpo_gamma, o)


def log_odds(chosen: Tensor, rejected: Tensor) -> Tensor:
    """log odds_w - log odds_l of mean token log-probs, odds = p / (1 - p)."""
    chosen, rejected = (p.clamp(max=-torch.finfo(p.dtype).eps) for p in (chosen, rejected))
    return (chosen - rejected) - (torch.log(-torch.expm1(chosen)) - torch.log(-torch.expm1(rejected)))


def _orpo(x: Pairs, o: Options) -> Tensor:
    """-b S(log odds_w - log odds_l) of the mean token log-probs, arXiv 2403.07691; the caller adds its NLL."""
    return -o.beta * F.logsigmoid(log_odds(*x.mean_logps()))


def kto_desirable(c: Tensor, baseline: Tensor | float, o: Options) -> Tensor:
    """l_D (1 - sigmoid(b(c-z)))."""
    return o.desirable_weight * torch.sigmoid(o.beta * (baseline - c))


def kto_undesirable(r: Tensor, baseline: Tensor | float, o: Options) -> Tensor:
    """l_U (1 - sigmoid(b(z-r)))."""
    return o.undesirable_weight * torch.sigmoid(o.beta * (r - baseline))


def _kto(x: Pairs, o: Options) -> Tensor:
    """Mean over the pair of l_D (1 - sigmoid(b(c-z))) and l_U (1 - sigmoid(b(z-r))), arXiv 2402.01306."""
    return (kto_desirable(x.c, x.baseline, o) + kto_undesirable(x.r, x.baseline, o)) / 2


def _dpop(x: Pairs, o: Options) -> Tensor:
    """-S(b(D - l max(0, -c))), arXiv 2402.13228."""
    return -F.logsigmoid(o.beta * (x.margin - o.dpop_lambda * torch.relu(-x.c)))


def _exo_pair(x: Pairs, o: Options) -> Tensor:
    """sigmoid(bD)[S(bD) - log(1-e)] + sigmoid(-bD)[S(-bD) - log e], arXiv 2402.00856 eq. 16."""
    e, logits = o.label_smoothing, o.beta * x.margin
    chosen = torch.sigmoid(logits) * (F.logsigmoid(logits) - math.log1p(-e))
    return chosen + torch.sigmoid(-logits) * (F.logsigmoid(-logits) - math.log(e))


def _nca_pair(x: Pairs, o: Options) -> Tensor:
    """-S(bc) - S(-bc)/2 - S(-br)/2, arXiv 2402.05369."""
    c, r = o.beta * x.c, o.beta * x.r
    return -F.logsigmoid(c) - 0.5 * F.logsigmoid(-c) - 0.5 * F.logsigmoid(-r)


def bco_desirable(c: Tensor, baseline: Tensor | float, o: Options) -> Tensor:
    """-l_D S(bc - d)."""
    return -o.desirable_weight * F.logsigmoid(o.beta * c - baseline)


def bco_undesirable(r: Tensor, baseline: Tensor | float, o: Options) -> Tensor:
    """-l_U S(-(br - d))."""
    return -o.undesirable_weight * F.logsigmoid(baseline - o.beta * r)


def _bco_pair(x: Pairs, o: Options) -> Tensor:
    """-l_D S(bc - d) - l_U S(-(br - d)), d the running mean reward, arXiv 2404.04656; its weights are 1."""
    return bco_desirable(x.c, x.baseline, o) + bco_undesirable(x.r, x.baseline, o)


def _apo_zero(x: Pairs, o: Options) -> Tensor:
    """1 - sigmoid(bc) + sigmoid(br), arXiv 2408.06266 eq. 7."""
    return torch.sigmoid(-o.beta * x.c) + torch.sigmoid(o.beta * x.r)


def _apo_down(x: Pairs, o: Options) -> Tensor:
    """sigmoid(bc) + 1 - sigmoid(bD), arXiv 2408.06266 eq. 8."""
    return torch.sigmoid(o.beta * x.c) + torch.sigmoid(o.beta * (x.r - x.c))


def alternating(values: Tensor) -> tuple[Tensor, Tensor]:
    """(chosen, rejected), each [B], of values [2B] that alternate between them."""
    return values.view(-1, 2).unbind(1)


def _ranks(values: Tensor) -> Tensor:
    return values.argsort(stable=True).argsort(stable=True)


def _aot(x: Pairs, o: Options) -> Tensor:
    """-S(b(sorted policy margin - sorted reference margin)) over the whole batch, arXiv 2406.05882.

    The reference is constant, so a pair needs only the reference margin of the same rank as its own.
    """
    policy, ref = x.batch
    policy_margin, ref_margin = (chosen - rejected for chosen, rejected in map(alternating, (policy, ref)))
    opposite = ref_margin.sort().values.index_select(0, _ranks(policy_margin))
    opposite = opposite.narrow(0, x.batch_offset, x.c.shape[0])
    return _smoothed(o.beta * (x.policy[0] - x.policy[1] - opposite), o)


def _aot_unpaired(x: Pairs, o: Options) -> Tensor:
    """-S(b(sorted c - sorted r)) over the whole batch, arXiv 2406.05882.

    c and r of one pair are matched with different partners, which may be on another rank and are constants here. The
    value counts c's term only; r's term adds its gradient.
    """
    policy, ref = x.batch
    c, r = alternating(policy - ref)
    opposite_c = r.sort().values.index_select(0, _ranks(c)).narrow(0, x.batch_offset, x.c.shape[0])
    opposite_r = c.sort().values.index_select(0, _ranks(r)).narrow(0, x.batch_offset, x.r.shape[0])
    with_r = _smoothed(o.beta * (opposite_r - x.r), o)
    return _smoothed(o.beta * (x.c - opposite_c), o) + (with_r - with_r.detach())


def _discopop(x: Pairs, o: Options) -> Tensor:
    """(1-m)(-S(l)) + m e^-l with l = bD, m = sigmoid(l/t), arXiv 2406.08414 eq. 5."""
    logits = o.beta * x.margin
    modulation = torch.sigmoid(logits / o.discopop_tau)
    return torch.lerp(-F.logsigmoid(logits), torch.exp(-logits), modulation)


def _sppo_hard(x: Pairs, o: Options) -> Tensor:
    """(c - 1/(2b))^2 + (r + 1/(2b))^2, arXiv 2405.00675."""
    return (x.c - 0.5 / o.beta).square() + (x.r + 0.5 / o.beta).square()


def _rpo(x: Pairs, o: Options) -> Tensor:
    """KL(p || sigmoid(bD)) with p = sigmoid(h dr*), Nemotron-4's reward-aware loss, arXiv 2406.11704."""
    target, logits = o.rpo_eta * x.reward_margin, o.beta * x.margin
    if o.rpo_divergence == "squared":
        return (logits - target).square()
    first, second = (target, logits) if o.rpo_divergence == "target_first" else (logits, target)
    chosen = torch.sigmoid(first) * (F.logsigmoid(first) - F.logsigmoid(second))
    return chosen + torch.sigmoid(-first) * (F.logsigmoid(-first) - F.logsigmoid(-second))


@dataclass(frozen=True)
class Loss:
    """A formula and the options it uses; preference_loss rejects an option that the loss would ignore.

    scores: a function of the margin of scores alone, so f-divergences and length normalization apply. mean: divides by
    lengths. reference: "needed", "optional" or "none". batchwide: mixes pairs, so per-pair weights are undefined.
    """

    formula: Callable[[Pairs, Options], Tensor]
    scores: bool = False
    smoothing: bool = False
    mean: bool = False
    reference: str = "needed"
    batchwide: bool = False


# losses of completions that are each labeled, instead of paired: the terms of a desirable and an undesirable one
UNPAIRED = {"kto": (kto_desirable, kto_undesirable), "bco_pair": (bco_desirable, bco_undesirable)}

LOSSES: dict[str, Loss] = {
    "sigmoid": Loss(_sigmoid, scores=True, smoothing=True, reference="optional"),
    "sigmoid_norm": Loss(_sigmoid, scores=True, smoothing=True, mean=True),
    "robust": Loss(_robust, scores=True, smoothing=True), "ipo": Loss(_ipo, scores=True, reference="optional"),
    "ipo_norm": Loss(_ipo, scores=True, mean=True, reference="optional"),
    "hinge": Loss(_hinge, scores=True, reference="optional"),
    "simpo": Loss(_simpo, smoothing=True, mean=True, reference="none"),
    "orpo": Loss(_orpo, mean=True, reference="none"), "kto": Loss(_kto), "dpop": Loss(_dpop),
    "exo_pair": Loss(_exo_pair, scores=True, smoothing=True), "nca_pair": Loss(_nca_pair),
    "bco_pair": Loss(_bco_pair), "apo_zero": Loss(_apo_zero), "apo_down": Loss(_apo_down),
    "aot": Loss(_aot, smoothing=True, batchwide=True),
    "aot_unpaired": Loss(_aot_unpaired, smoothing=True, batchwide=True), "discopop": Loss(_discopop, scores=True),
    "sppo_hard": Loss(_sppo_hard), "rpo": Loss(_rpo, scores=True),
}
