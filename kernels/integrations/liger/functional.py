"""The five losses as functions of hidden states and head, with Liger's arguments in Liger's order.

Hidden states are [S, T, D] and targets [S, T], already shifted: position t's hidden state predicts position t's target.
The paired losses take S = 2B sequences, the chosen ones first, then the rejected ones in the same order. `compiled` and
`chunk_size` are accepted and have no effect. Gradients go to the hidden states, the weight and the bias; the second
element of a result, a tuple of statistics, has none. Log-probs and statistics are fp32 (fp64 for fp64 inputs).
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from ...head import linear_logprob
from ...preference.losses import LOSSES, Options, Pairs, kto_desirable, kto_undesirable, log_odds

# The loss types of Liger's DPO, and those that use label_smoothing.
DPO_TYPES = ("sigmoid", "hinge", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero", "apo_down")
DPO_TYPES += ("discopop",)
_SMOOTHED_TYPES = ("sigmoid", "exo_pair", "robust")

# Hidden states, weight and bias; absent where there is no reference.
Head = tuple[Tensor | None, Tensor | None, Tensor | None]
Result = tuple[Tensor, tuple[Tensor, ...]]


def liger_fused_linear_dpo(
    _input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, ref_input: Tensor | None = None,
    ref_weight: Tensor | None = None, ref_bias: Tensor | None = None, ignore_index: int = -100, beta: float = 0.1,
    compute_nll_loss: bool = False, compiled: bool = True, use_ref_model: bool = True, average_log_prob: bool = False,
    chunk_size: int = 1, loss_type: str = "sigmoid", label_smoothing: float = 0.0, discopop_tau: float = 0.05,
    alpha: float = 1.0,
) -> Result:  # fmt: skip
    """DPO and related losses: the mean over pairs, plus alpha times the NLL of the chosen tokens if compute_nll_loss.

    _input [2B, T, D], weight [V, D], target [2B, T] integer, bias [V]. The reference's log-probs come from ref_input
    [2B, T, D'], ref_weight [V, D'], ref_bias [V] and are 0 without use_ref_model. average_log_prob divides sequence
    log-probs by their token counts; the mean of no tokens is 0. loss_type: one of DPO_TYPES (formulas and papers:
    kernels/preference/losses.py). label_smoothing applies to sigmoid (cDPO), exo_pair and robust; for another type it
    is ignored with a warning.

    Returns (loss, (chosen log-probs [B], rejected log-probs [B], mean logit of the chosen, of the rejected, NLL,
    chosen rewards [B], rejected rewards [B])). Raises ValueError on mismatched shapes and unsupported values.
    """
    check_dpo(loss_type, label_smoothing)
    o = _options(beta, label_smoothing if loss_type in _SMOOTHED_TYPES else 0.0, discopop_tau=discopop_tau)
    reference = (ref_input, ref_weight, ref_bias) if use_ref_model else None
    alpha = alpha if compute_nll_loss else None
    return _paired(loss_type, o, (_input, weight, bias), target, ignore_index, alpha, average_log_prob, reference)


def liger_fused_linear_cpo(
    _input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, ignore_index: int = -100,
    beta: float = 0.1, alpha: float = 1.0, label_smoothing: float = 0.0, compute_nll_loss: bool = True,
    compiled: bool = True, average_log_prob: bool = False, chunk_size: int = 1,
) -> Result:  # fmt: skip
    """CPO (arXiv 2401.08417): the sigmoid loss of the policy's log-probs alone, plus alpha times the chosen NLL.

    Arguments, results and errors as in liger_fused_linear_dpo.
    """
    o, alpha = _options(beta, label_smoothing), alpha if compute_nll_loss else None
    return _paired("sigmoid", o, (_input, weight, bias), target, ignore_index, alpha, average_log_prob)


def liger_fused_linear_simpo(
    _input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, ignore_index: int = -100,
    beta: float = 0.1, alpha: float = 1.0, label_smoothing: float = 0.0, compute_nll_loss: bool = False,
    compiled: bool = True, gamma: float = 0.5, chunk_size: int = 1,
) -> Result:  # fmt: skip
    """SimPO (arXiv 2405.14734) on mean token log-probs with margin gamma, plus alpha times the chosen NLL.

    Arguments, results and errors as in liger_fused_linear_dpo; the returned log-probs and rewards are per-token means.
    """
    o, alpha = _options(beta, label_smoothing, gamma=gamma), alpha if compute_nll_loss else None
    return _paired("simpo", o, (_input, weight, bias), target, ignore_index, alpha, average=True)


def liger_fused_linear_orpo(
    _input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, ignore_index: int = -100,
    beta: float = 0.1, compute_nll_loss: bool = True, nll_target: Tensor | None = None, compiled: bool = True,
    chunk_size: int = 1,
) -> Result:  # fmt: skip
    """ORPO (arXiv 2403.07691) on mean token log-probs: beta times the odds-ratio loss, plus the chosen NLL.

    nll_target [2B, T], if given, replaces target in the NLL; only its chosen half counts. Otherwise arguments, results
    and errors are as in liger_fused_linear_dpo, with two more statistics: the mean log sigmoid of the log odds ratio,
    and the mean log odds ratio.
    """
    alpha, nll_target = (1.0, nll_target) if compute_nll_loss else (None, None)
    head = (_input, weight, bias)
    loss, statistics = _paired(
        "orpo", _options(beta), head, target, ignore_index, alpha, average=True, nll_target=nll_target
    )
    odds = log_odds(*statistics[:2])
    return loss, (*statistics, nn.functional.logsigmoid(odds).mean(), odds.mean())


def liger_fused_linear_kto(
    _input: Tensor, weight: Tensor, target: Tensor, preference_labels: Tensor, bias: Tensor | None = None,
    ref_input: Tensor | None = None, ref_weight: Tensor | None = None, ref_bias: Tensor | None = None,
    kl: Tensor | float | None = None, ignore_index: int = -100, beta: float = 0.1, compiled: bool = True,
    use_ref_model: bool = True, average_log_prob: bool = False, chunk_size: int = 1,
) -> Result:  # fmt: skip
    """KTO (arXiv 2402.01306): the mean loss over S sequences, each labeled desirable or not.

    _input [S, T, D], target [S, T], preference_labels [S] bool, True for a desirable sequence; kl, the baseline without
    gradient, one number or [S]; the rest as in liger_fused_linear_dpo.

    Returns (loss, six 0-dim sums: chosen and rejected log-probs, chosen and rejected logits, chosen and rejected
    rewards). Raises ValueError on mismatched shapes and unsupported values.
    """
    head = (_input, weight, bias)
    _check_shapes("_input", _input, target)
    sequences = target.shape[0]
    if preference_labels is None or preference_labels.dtype != torch.bool or preference_labels.shape != (sequences,):
        raise ValueError(f"preference_labels must be bool [{sequences}], True for a chosen sequence")
    if isinstance(kl, Tensor) and kl.numel() != 1 and kl.shape != (sequences,):
        raise ValueError(f"kl must be one number or [{sequences}], got {list(kl.shape)}")
    lengths = (target != ignore_index).sum(1)
    logps = _sequence_logps(_token_logps(head, target, ignore_index), lengths, average_log_prob)
    ratio = logps
    if use_ref_model:
        reference = (ref_input, ref_weight, ref_bias)
        ratio = logps - _reference_logps(reference, target, lengths, ignore_index, average_log_prob)
    baseline = kl.detach().to(ratio.dtype).squeeze() if isinstance(kl, Tensor) else kl or 0.0
    o = _options(beta)
    desirable, undesirable = kto_desirable(ratio, baseline, o), kto_undesirable(ratio, baseline, o)
    loss = torch.where(preference_labels, desirable, undesirable).sum() / sequences
    with torch.no_grad():
        logp_sums, reward_sums = (_side_sums(x, preference_labels) for x in (logps, beta * ratio))
        statistics = (*logp_sums, *_logit_sums(head, preference_labels), *reward_sums)
    return loss, statistics


def _paired(
    name: str, o: Options, head: Head, target: Tensor, ignore_index: int, alpha: float | None, average: bool,
    reference: Head | None = None, nll_target: Tensor | None = None,
) -> Result:  # fmt: skip
    """The loss of that name in kernels/preference/losses.py and Liger's statistics; alpha None leaves the NLL out."""
    hidden, weight, _ = head
    _check_shapes("_input", hidden, target)
    if target.shape[0] % 2 or target.shape[0] == 0:
        raise ValueError(f"{target.shape[0]} sequences are not pairs: the first half is chosen, the second rejected")
    pairs = target.shape[0] // 2
    lengths = (target != ignore_index).sum(1)
    if nll_target is None:
        token_logps = _token_logps(head, target, ignore_index)
        nll_logps, nll_count = token_logps.narrow(0, 0, pairs), lengths.narrow(0, 0, pairs).sum()
    else:
        token_logps, nll_logps = _two_targets(head, target, nll_target, ignore_index)
        nll_count = (nll_target.narrow(0, 0, pairs) != ignore_index).sum()
    logps = _sequence_logps(token_logps, lengths, average)
    ratio = logps
    if reference is not None:
        ratio = logps - _reference_logps(reference, target, lengths, ignore_index, average)
    (chosen, rejected), (c, r) = logps.split(pairs), ratio.split(pairs)
    one = torch.ones_like(chosen)  # a loss that divides by lengths gets means already
    loss = LOSSES[name].formula(Pairs(c, r, c, r, policy=(chosen, rejected), lengths=(one, one)), o).mean()
    nll = torch.zeros_like(loss)
    if alpha is not None:
        nll = -nll_logps.sum() / nll_count.clamp_min(1)
        loss = loss + alpha * nll
    with torch.no_grad():
        count = pairs * target.shape[1] * weight.shape[0]
        means = [x / count for x in _logit_sums(head, torch.arange(2 * pairs, device=target.device) < pairs)]
    rewards = (o.beta * c, o.beta * r)
    return loss, tuple(x.detach() for x in (chosen, rejected, *means, nll, *rewards))


def _options(beta: float, label_smoothing: float = 0.0, *, gamma: float = 0.0, discopop_tau: float = 0.05) -> Options:
    return Options(beta=beta, label_smoothing=label_smoothing, simpo_gamma=gamma, discopop_tau=discopop_tau)


def _check_shapes(name: str, hidden: Tensor, target: Tensor) -> None:
    if hidden.dim() != 3 or target.shape != hidden.shape[:2]:
        raise ValueError(f"{name} [S, T, D] and target [S, T] do not match: {list(hidden.shape)}, {list(target.shape)}")


def check_dpo(loss_type: str, label_smoothing: float) -> None:
    """Raises ValueError where Liger does; warns about a label_smoothing that the loss ignores."""
    if loss_type not in DPO_TYPES:
        raise ValueError(f"Unsupported loss_type: {loss_type}. Supported types are: {', '.join(DPO_TYPES)}")
    if loss_type == "exo_pair" and label_smoothing <= 0.0:
        raise ValueError("label_smoothing must be > 0 for loss_type='exo_pair'. The EXO paper recommends 1e-3.")
    if loss_type == "robust" and not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must lie in [0.0, 0.5) for loss_type='robust'. Got {label_smoothing}.")
    if label_smoothing and loss_type not in _SMOOTHED_TYPES:
        warnings.warn(f"label_smoothing has no effect on loss_type={loss_type!r}", stacklevel=3)


def _token_logps(head: Head, target: Tensor, ignore_index: int) -> Tensor:
    """[S, T] log-probs, 0 where ignored."""
    hidden, weight, bias = head
    logps = linear_logprob(hidden.flatten(0, 1), weight, target.flatten(), bias, ignore_index=ignore_index)
    return logps.view(target.shape)


def _sequence_logps(token_logps: Tensor, lengths: Tensor, average: bool) -> Tensor:
    """[S] sums or means; the mean of no tokens is 0."""
    sums = token_logps.sum(1)
    return sums / lengths.clamp_min(1) if average else sums


@torch.no_grad()
def _reference_logps(head: Head, target: Tensor, lengths: Tensor, ignore_index: int, average: bool) -> Tensor:
    hidden, weight, _ = head
    if hidden is None or weight is None:
        raise ValueError("use_ref_model needs ref_input and ref_weight")
    _check_shapes("ref_input", hidden, target)
    return _sequence_logps(_token_logps(head, target, ignore_index), lengths, average)


def _two_targets(head: Head, target: Tensor, nll_target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Log-probs of target [2B, T] and of the chosen half of nll_target [B, T], 0 where ignored.

    Each position is computed once, and a second time only where the two targets differ; finding those positions
    synchronizes on a GPU.
    """
    hidden, weight, bias = head
    if nll_target.shape != target.shape:
        raise ValueError(f"nll_target must be {list(target.shape)}, got {list(nll_target.shape)}")
    pairs = target.shape[0] // 2
    (chosen, rejected), nll_target = target.split(pairs), nll_target.narrow(0, 0, pairs)
    scored = chosen != ignore_index
    either = torch.cat([torch.where(scored, chosen, nll_target), rejected]).flatten()
    differs = scored & (nll_target != ignore_index) & (nll_target != chosen)
    rows = differs.flatten().nonzero().squeeze(1)
    flat = hidden.flatten(0, 1)
    if rows.numel():
        flat, either = torch.cat([flat, flat[rows]]), torch.cat([either, nll_target.flatten()[rows]])
    logps = linear_logprob(flat, weight, either, bias, ignore_index=ignore_index)
    token_logps = logps[: target.numel()]
    nll_logps = token_logps[: nll_target.numel()].index_copy(0, rows, logps[target.numel() :])
    return (
        token_logps.view(target.shape).masked_fill(target == ignore_index, 0.0),
        nll_logps.view(nll_target.shape).masked_fill(nll_target == ignore_index, 0.0),
    )


def _side_sums(values: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of values [S] over the sequences where chosen [S] is True, and over the others."""
    return values.where(chosen, 0.0).sum(), values.masked_fill(chosen, 0.0).sum()


def _logit_sums(head: Head, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Logits summed over the vocabulary and all positions, ignored ones included, of chosen and of other sequences.

    The sum of h W_v over positions and vocabulary is the product of two sums, so no logits are needed.
    """
    hidden, weight, bias = head
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    # In blocks: on the CPU, a sum in another dtype copies its operand.
    direction = torch.stack([block.sum(0, dtype=dtype) for block in weight.split(8192)]).sum(0)
    sums = (hidden.sum(1, dtype=dtype) * direction).sum(1)
    if bias is not None:
        sums = sums + hidden.shape[1] * bias.sum(dtype=dtype)
    return _side_sums(sums, chosen)


def _function(name: str, apply) -> type:
    """Liger's autograd Function of a loss, of which callers use `apply` only."""
    return type(name, (), {"apply": staticmethod(apply), "__module__": __name__})


LigerFusedLinearDPOFunction = _function("LigerFusedLinearDPOFunction", liger_fused_linear_dpo)
LigerFusedLinearCPOFunction = _function("LigerFusedLinearCPOFunction", liger_fused_linear_cpo)
LigerFusedLinearSimPOFunction = _function("LigerFusedLinearSimPOFunction", liger_fused_linear_simpo)
LigerFusedLinearORPOFunction = _function("LigerFusedLinearORPOFunction", liger_fused_linear_orpo)
LigerFusedLinearKTOFunction = _function("LigerFusedLinearKTOFunction", liger_fused_linear_kto)
