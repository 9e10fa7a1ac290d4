import math
from types import SimpleNamespace

import pytest
import torch

from strop.kernels import (
    LOSS_TYPES,
    PREFERENCE_METRICS,
    linear_preference_loss,
    preference_loss,
    preference_means,
)
from strop.kernels.head import reference
from strop.kernels.preference import plackett_luce_loss

# Loss, dL/dc and dL/dr of one pair at c = r = 0 with beta 0.1: the papers' formulas worked by hand.
ANCHORS = {
    "sigmoid": (math.log(2), -0.05, 0.05, {}),
    "sigmoid smoothed": (math.log(2), -0.04, 0.04, {"label_smoothing": 0.1}),
    "robust": (math.log(2), -0.0625, 0.0625, {"label_smoothing": 0.1}),
    "ipo": (25.0, -10.0, 10.0, {}),
    "hinge": (1.0, -0.1, 0.1, {}),
    "kto": (0.5, -0.0125, 0.0125, {}),
    "dpop": (math.log(2), -0.05, 0.05, {}),
    "exo_pair": (2.7612, -0.1727, 0.1727, {"label_smoothing": 1e-3}),
    "nca_pair": (1.3863, -0.025, 0.025, {}),
    "bco_pair": (1.3863, -0.05, 0.05, {}),
    "apo_zero": (1.0, -0.025, 0.025, {}),
    "apo_down": (1.0, 0.0, 0.025, {}),
    "aot": (math.log(2), -0.05, 0.05, {}),
    "aot_unpaired": (math.log(2), -0.05, 0.05, {}),
    "discopop": (0.8466, 0.0784, -0.0784, {}),
    "sppo_hard": (50.0, -10.0, 10.0, {}),
    "sigmoid_norm": (math.log(2), -0.25, 0.25, {"beta": 5.0, "lengths": torch.tensor([10, 10])}),
    "rpo": (0.1109, -0.0231, 0.0231, {"reward_margin": torch.ones(1)}),
    "rpo policy first": (0.1201, -0.025, 0.025, {"reward_margin": torch.ones(1), "rpo_divergence": "policy_first"}),
    "rpo squared": (1.0, -0.2, 0.2, {"reward_margin": torch.ones(1), "rpo_divergence": "squared"}),
    "kto one by one": (0.5, -0.0125, 0.0125, {"desirable": torch.tensor([True, False])}),  # a mean over completions
    "bco_pair one by one": (math.log(2), -0.025, 0.025, {"desirable": torch.tensor([True, False])}),
}


@pytest.mark.parametrize("name", ANCHORS)
def test_anchor_values(name: str):
    expected, grad_c, grad_r, options = ANCHORS[name]
    logp = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    loss, _ = preference_loss(logp, torch.zeros(2), loss_type=name.split()[0], **options)
    (gradient,) = torch.autograd.grad(loss, logp)
    assert loss.item() == pytest.approx(expected, abs=6e-5)
    assert gradient.tolist() == pytest.approx([grad_c, grad_r], abs=6e-5)


def _pairs(pairs: int = 3, dtype: torch.dtype = torch.float64, seed: int = 0):
    """Token log-probs of policy and reference, segment ids and bounds; completions of 1 to 8 tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (2 * pairs,), generator=generator)
    tokens = int(lengths.sum())
    policy, ref = (-torch.rand(tokens, generator=generator, dtype=dtype) * 3 for _ in range(2))
    segments = torch.arange(2 * pairs, dtype=torch.int32).repeat_interleave(lengths)
    ends = lengths.cumsum(0).tolist()
    return policy.requires_grad_(), ref, segments, tuple(zip([0, *ends[:-1]], ends, strict=True))


def _needed(name: str, pairs: int = 3) -> dict:
    """The options that a loss requires."""
    if name == "rpo":
        return {"reward_margin": torch.linspace(-1, 2, pairs, dtype=torch.float64)}
    return {"label_smoothing": 0.1} if name in ("exo_pair", "robust") else {}


NO_REFERENCE = ("simpo", "orpo")


def _loss(name: str, policy, ref, segments, **options):
    ref = None if name in NO_REFERENCE else ref
    num_segments = int(segments[-1]) + 1
    options = _needed(name, num_segments // 2) | options
    return preference_loss(policy, ref, segments=segments, num_segments=num_segments, loss_type=name, **options)


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_gradients_are_those_of_finite_differences(name: str):
    policy, ref, segments, _ = _pairs()
    options = {"nll_weight": 0.3} if name != "orpo" else {}
    if name in ("aot", "aot_unpaired"):
        # The no-grad batch is constant by definition; finite differences would move it.
        sums = [torch.zeros(6, dtype=torch.float64).index_add(0, segments, x.detach()) for x in (policy, ref)]
        options["batch"] = tuple(sums)
    if name == "aot_unpaired":
        pytest.skip("its rejected side has gradient only; test_aot_unpaired_is_the_batch_formula compares it")
    assert torch.autograd.gradcheck(lambda p: _loss(name, p, ref, segments, **options)[0], policy)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_aot_is_the_batch_formula(name: str):
    policy, ref, segments, _ = _pairs(5)
    loss, _ = _loss(name, policy, ref, segments, beta=0.4, label_smoothing=0.1)
    sums = [torch.zeros(10, dtype=torch.float64).index_add(0, segments, x) for x in (policy, ref)]
    if name == "aot":
        delta = (sums[0][0::2] - sums[0][1::2]).sort().values - (sums[1][0::2] - sums[1][1::2]).sort().values
    else:
        ratio = sums[0] - sums[1]
        delta = ratio[0::2].sort().values - ratio[1::2].sort().values
    s = torch.nn.functional.logsigmoid
    expected = (-0.9 * s(0.4 * delta) - 0.1 * s(-0.4 * delta)).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, policy), torch.autograd.grad(expected, policy))


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_aot_in_parts_of_a_global_batch_equals_the_whole(name: str):
    policy, ref, segments, bounds = _pairs(4)
    whole, whole_metrics = _loss(name, policy, ref, segments)
    (expected,) = torch.autograd.grad(whole, policy)
    batch = tuple(torch.zeros(8, dtype=torch.float64).index_add(0, segments, x.detach()) for x in (policy, ref))
    total, metrics, gradient = 0.0, 0.0, torch.zeros_like(policy)
    for first in (0, 2):
        part = slice(bounds[2 * first][0], bounds[2 * first + 3][1])
        loss, m = _loss(
            name,
            policy[part],
            ref[part],
            segments[part] - 2 * first,
            batch=batch,
            batch_offset=first,
            pair_denominator=4,
        )
        total, metrics = total + loss, metrics + m
        gradient += torch.autograd.grad(loss, policy)[0]
    torch.testing.assert_close(total, whole)
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(metrics, whole_metrics)


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_tokens_bounds_and_sums_agree(name: str):
    policy, ref, segments, bounds = _pairs()
    loss, metrics = _loss(name, policy, ref, segments)
    ref = None if name in NO_REFERENCE else ref
    options = {"loss_type": name, **_needed(name)}
    torch.testing.assert_close(preference_loss(policy, ref, target_bounds=bounds, **options), (loss, metrics))
    lengths = torch.tensor([end - start for start, end in bounds])
    sums = torch.zeros(6, dtype=torch.float64).index_add(0, segments, policy)
    ref_sums = None if ref is None else torch.zeros(6, dtype=torch.float64).index_add(0, segments, ref)
    torch.testing.assert_close(preference_loss(sums, ref_sums, lengths=lengths, **options), (loss, metrics))


def test_microbatches_add_up_to_the_batch():
    """Loss and metrics of four microbatches with global denominators equal those of one batch, for each NLL key."""
    policy, ref, segments, bounds = _pairs(4)
    chosen_tokens = sum(end - start for start, end in bounds[::2])
    for normalization, denominator in (("batch_tokens", chosen_tokens), ("sequence_mean", 4), ("sequence_sum", 4)):
        options = {"nll_weight": 0.5, "nll_normalization": normalization, "label_smoothing": 0.1}
        whole = _loss("sigmoid", policy, ref, segments, **options)
        parts = []
        for i in range(4):
            part = slice(bounds[2 * i][0], bounds[2 * i + 1][1])
            arguments = (policy[part], ref[part], segments[part] - 2 * i)
            parts.append(_loss("sigmoid", *arguments, pair_denominator=4, nll_denominator=denominator, **options))
        torch.testing.assert_close(sum(loss for loss, _ in parts), whole[0])
        torch.testing.assert_close(sum(metrics for _, metrics in parts), whole[1])


def test_metrics():
    policy = torch.tensor([-1.0, -2.0, -4.0, -1.0, -1.0])
    ref = torch.tensor([-2.0, -2.0, -3.0, -1.5, -0.5])
    loss, metrics = preference_loss(
        policy, ref, segments=torch.tensor([0, 0, 1, 2, 3]), num_segments=4, beta=0.5, nll_weight=1.0
    )
    assert metrics.dtype == torch.float32 and metrics.shape == (len(PREFERENCE_METRICS),)
    means = preference_means(metrics)
    assert means["rewards/chosen"] == pytest.approx((0.5 * 1.0 + 0.5 * 0.5) / 2)
    assert means["rewards/rejected"] == pytest.approx((0.5 * -1.0 + 0.5 * -0.5) / 2)
    assert means["rewards/margins"] == pytest.approx(0.75)
    assert means["rewards/accuracies"] == 1.0
    assert means["logps/chosen"] == pytest.approx(-2.0)
    assert means["logps/rejected"] == pytest.approx(-2.5)
    assert means["nll_loss"] == pytest.approx(4 / 3)
    assert means["loss"] + means["nll_loss"] == pytest.approx(loss.item())


def test_unpaired_kto():
    logp = torch.tensor([-1.0, -3.0, -2.0], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([-2.0, -2.0, -2.0], dtype=torch.float64)
    desirable = torch.tensor([True, False, True])
    loss, metrics = preference_loss(
        logp, ref, loss_type="kto", desirable=desirable, baseline=0.25, undesirable_weight=2.0, beta=1.0
    )
    s = torch.sigmoid
    expected = ((1 - s(torch.tensor(0.75))) + 2 * (1 - s(torch.tensor(1.25))) + (1 - s(torch.tensor(-0.25)))) / 3
    assert loss.item() == pytest.approx(expected.item())
    means = preference_means(metrics)
    assert (means["rewards/chosen"], means["rewards/rejected"]) == (0.5, -1.0)
    assert "rewards/accuracies" not in means


def test_unpaired_bco():
    logp = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([True, False, False, True])
    loss, _ = preference_loss(logp, torch.zeros(4), loss_type="bco_pair", desirable=labels)
    assert loss.item() == pytest.approx(math.log(2))
    assert torch.autograd.grad(loss, logp)[0].tolist() == pytest.approx([-0.0125, 0.0125, 0.0125, -0.0125])
    policy, ref, segments, _ = _pairs(2)
    options = {"loss_type": "bco_pair", "baseline": 0.3, "beta": 0.4, "segments": segments, "num_segments": 4}
    paired, _ = preference_loss(policy, ref, **options)
    alternating = torch.tensor([True, False] * 2)
    single, metrics = preference_loss(policy, ref, desirable=alternating, **options)
    torch.testing.assert_close(single, paired / 2)  # a mean over completions, not over pairs
    assert "rewards/accuracies" not in preference_means(metrics)
    ratio = torch.zeros(4, dtype=torch.float64).index_add(0, segments, (policy - ref).detach())
    weighted, _ = preference_loss(policy, ref, desirable=labels, desirable_weight=2.0, undesirable_weight=3.0,
                                  **options)
    s = torch.nn.functional.logsigmoid
    good, bad = 0.4 * ratio[labels] - 0.3, 0.4 * ratio[~labels] - 0.3
    torch.testing.assert_close(weighted.detach(), -(2 * s(good).sum() + 3 * s(-bad).sum()) / 4)


@pytest.mark.parametrize("k", [2, 3, 5])
def test_plackett_luce_at_zero_and_against_its_formula(k: int):
    logp = torch.zeros(2 * k, dtype=torch.float64, requires_grad=True)
    loss = plackett_luce_loss(logp, torch.zeros(2 * k), completions=k)
    (gradient,) = torch.autograd.grad(loss, logp)
    assert loss.item() == pytest.approx(math.log(math.factorial(k)))  # every ranking is as likely
    # each place pushes the n completions that are left down by 1/n, and the best of them up by 1
    expected = [0.1 / 2 * (sum(1 / n for n in range(k - place, k + 1)) - 1) for place in range(k)]
    assert gradient.tolist() == pytest.approx(expected * 2)
    policy, ref, segments, _ = _pairs(k)
    options = {"completions": k, "segments": segments, "num_segments": 2 * k, "beta": 0.7}
    ratio = torch.zeros(2 * k, dtype=torch.float64).index_add(0, segments, policy - ref).view(2, k)
    by_hand = -sum((0.7 * row[i:]).log_softmax(0)[0] for row in ratio for i in range(k)) / 2
    torch.testing.assert_close(plackett_luce_loss(policy, ref, **options), by_hand)
    assert torch.autograd.gradcheck(lambda p: plackett_luce_loss(p, ref, **options), policy)
    if k == 2:
        pairs, _ = preference_loss(policy, ref, segments=segments, num_segments=4, beta=0.7)
        torch.testing.assert_close(plackett_luce_loss(policy, ref, **options), pairs)


def by_hand(ratios: list[list[float]], ranks: list[list[int]]) -> float:
    """The loss of each prompt's log-ratios, from its definition."""
    return sum(math.log(sum(math.exp(b) for j, b in enumerate(row) if j == i or rank[j] > rank[i])) - row[i]
               for row, rank in zip(ratios, ranks, strict=True) for i in range(len(row))) / len(ratios)


def test_plackett_luce_of_unequal_numbers_and_with_ties():
    counts, ranks = [2, 4, 3], [[0, 1], [0, 0, 1, 1], [0, 1, 2]]
    ratio = torch.randn(9, dtype=torch.float64, generator=torch.Generator().manual_seed(4), requires_grad=True)
    rows = [row.tolist() for row in ratio.detach().split(counts)]
    flat = [r for row in ranks for r in row]
    options = {"completions": counts, "beta": 1.0}
    tied = plackett_luce_loss(ratio, ranks=flat, **options)
    assert tied.item() == pytest.approx(by_hand(rows, ranks))
    untied = plackett_luce_loss(ratio, **options)
    assert untied.item() == pytest.approx(by_hand(rows, [list(range(n)) for n in counts])) != pytest.approx(tied.item())
    apart = sum(plackett_luce_loss(part, completions=len(part), ranks=rank, beta=1.0)
                for part, rank in zip(ratio.split(counts), ranks, strict=True)) / 3
    torch.testing.assert_close(tied, apart)
    assert torch.autograd.gradcheck(lambda r: plackett_luce_loss(r, ranks=flat, **options), ratio)
    # completions of equal rank, as all that are below, are pushed alike
    zeros = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    even = plackett_luce_loss(zeros, completions=4, ranks=[0, 0, 1, 1], beta=0.3)
    assert even.item() == pytest.approx(2 * math.log(3))
    assert torch.autograd.grad(even, zeros)[0].tolist() == pytest.approx([-0.2, -0.2, 0.2, 0.2])
    for bad in ([0, 1, 0, 0], [0, 1, 2]):
        with pytest.raises(ValueError, match="ranks"):
            plackett_luce_loss(torch.zeros(4), completions=4, ranks=bad)


def test_plackett_luce_is_finite_far_out_and_refuses_what_is_no_ranking():
    logp = torch.tensor([-4e4, 0.0, 4e4], requires_grad=True)
    loss = plackett_luce_loss(logp, completions=3, beta=1.0)
    assert loss.item() == pytest.approx(8e4 + 4e4) and torch.autograd.grad(loss, logp)[0].isfinite().all()
    for options in ({"completions": 2}, {"completions": 1}, {"completions": [2]}, {"completions": [1, 2]},
                    {"completions": 3, "beta": 0.0},
                    {"completions": 3, "segments": torch.arange(3)}, {"completions": 3, "ref_logp": torch.zeros(2)}):
        with pytest.raises(ValueError, match=r"rankings|beta|num_segments|shape"):
            plackett_luce_loss(logp, **options)


def test_several_losses_are_weighted():
    policy, ref, segments, _ = _pairs()
    both, _ = _loss(("sigmoid", "bco_pair"), policy, ref, segments, loss_weights=(0.7, 0.3))
    parts = [_loss(name, policy, ref, segments)[0] for name in ("sigmoid", "bco_pair")]
    torch.testing.assert_close(both, 0.7 * parts[0] + 0.3 * parts[1])


@pytest.mark.parametrize("wpo", [False, True])
def test_linear_preference_loss_is_the_composition(wpo: bool):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((6, 5), (30, 5)))
    target, ref = torch.arange(6), torch.full((6,), -3.0, dtype=torch.float64)
    bounds = ((0, 2), (2, 3), (3, 5), (5, 6))
    options = {"target_bounds": bounds, "loss_type": "hinge", "nll_weight": 0.3}
    loss, metrics = linear_preference_loss(hidden, weight, target, ref, softcap=4.0, wpo=wpo, **options)
    logits = reference.linear_logits(hidden, weight, softcap=4.0)
    log_sum_p2 = reference.logit_stats(logits, target)["log_sum_p2"] if wpo else None
    logp = reference.gather_logprob(logits, target)
    torch.testing.assert_close((loss, metrics), preference_loss(logp, ref, log_sum_p2=log_sum_p2, **options))
    with pytest.raises(ValueError, match="wpo=True"):
        linear_preference_loss(hidden, weight, target, ref, log_sum_p2=ref, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "dpo"}, "unknown loss_type"),
        ({"loss_type": ("sigmoid", "ipo"), "loss_weights": (1.0,)}, "as many loss_weights"),
        ({"beta": 0.0}, "beta"),
        ({"label_smoothing": 0.5}, "label_smoothing"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing would be ignored"),
        ({"loss_type": "exo_pair"}, "above 0"),
        ({"loss_type": "apo_zero", "f_divergence": "forward_kl"}, "would be ignored"),
        ({"f_divergence": "renyi"}, "unknown f_divergence"),
        ({"loss_type": "nca_pair", "length_normalization": True}, "would be ignored"),
        ({"loss_type": "simpo"}, "ref_logp must be None"),
        ({"loss_type": "sigmoid_norm", "ld_alpha": 0.5}, "cancel each other"),
        ({"loss_type": "aot", "log_sum_p2": torch.zeros(4)}, "WPO"),
        ({"loss_type": "rpo"}, "reward_margin"),
        ({"reward_margin": torch.ones(2)}, "reward_margin"),
        ({"desirable": torch.ones(4, dtype=torch.bool)}, "kto alone"),
        ({"batch": (torch.zeros(4), torch.zeros(4))}, "batch would be ignored"),
        ({"nll_weight": 1.0, "nll_normalization": "mean"}, "nll_normalization"),
        ({"loss_type": "rpo", "reward_margin": torch.ones(2), "rpo_divergence": "js"}, "rpo_divergence"),
    ],
)
def test_combinations_that_make_no_sense_raise(options: dict, message: str):
    logp, segments = torch.zeros(4), torch.arange(4, dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        preference_loss(logp, torch.zeros(4), segments=segments, num_segments=4, **options)


def test_inputs_that_do_not_fit_raise():
    with pytest.raises(ValueError, match="needs ref_logp"):
        preference_loss(torch.zeros(4), loss_type="apo_zero")
    with pytest.raises(ValueError, match="not pairs"):
        preference_loss(torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match="lengths"):
        preference_loss(torch.zeros(4), loss_type="simpo")
    with pytest.raises(ValueError, match="num_segments"):
        preference_loss(torch.zeros(4), torch.zeros(4), segments=torch.arange(4))
    with pytest.raises(ValueError, match="token log-probs"):
        preference_loss(torch.zeros(4), torch.zeros(4), ld_alpha=0.5)
    with pytest.raises(ValueError, match="neither 4 sums"):
        preference_loss(torch.zeros(4), torch.zeros(2))


TRL = [{"loss_type": [name]} for name in LOSS_TYPES if name not in (*NO_REFERENCE, "kto", "dpop", "rpo", "ipo")]
TRL += [{"f_divergence_type": kind} for kind in ("forward_kl", "js_divergence", "alpha_divergence")]
TRL += [{"ld_alpha": 0.3}, {"use_weighting": True}, {"loss_type": ["aot"], "label_smoothing": 0.2}]
TRL += [{"loss_type": ["sigmoid", "ipo_norm"], "loss_weights": [0.6, 0.4]}]


@pytest.mark.parametrize("trl_options", TRL, ids=str)
def test_equals_trl(trl_options: dict, monkeypatch: pytest.MonkeyPatch):
    """Loss, gradients and metrics of DPOTrainer on the same log-probs."""
    pytest.importorskip("trl")
    from accelerate import Accelerator
    from trl import DPOTrainer

    policy, ref, segments, bounds = _pairs(4, torch.float32, seed=3)
    lengths = torch.tensor([end - start for start, end in bounds])
    types = trl_options.get("loss_type", ["sigmoid"])
    smoothing = trl_options.get("label_smoothing", 0.1 if types[0] in ("exo_pair", "robust") else 0.0)
    log_sum_p2 = -torch.rand(len(policy), generator=torch.Generator().manual_seed(9))

    # TRL's layout: rows padded, all chosen before all rejected.
    width, order = int(lengths.max()), [*range(0, 8, 2), *range(1, 8, 2)]
    index = torch.full((8, width + 1), -1)
    for row, completion in enumerate(order):
        start, end = bounds[completion]
        index[row, 1 : 1 + end - start] = torch.arange(start, end)
    mask = (index >= 0).long()

    def padded(values: torch.Tensor) -> torch.Tensor:
        return torch.where(mask.bool(), values[index.clamp_min(0)], 0.0)[:, 1:]

    ref_logp = padded(ref)
    position = mask[:, 1:].cumsum(1)
    shorter = torch.minimum(*mask[:, 1:].sum(1).chunk(2)).repeat(2)[:, None]
    tail = trl_options.get("ld_alpha", 1.0)
    ref_sums = (ref_logp * torch.where(position <= shorter, 1.0, tail)).sum(1)
    zeros = torch.zeros(8, width)
    outputs = SimpleNamespace(
        log_probs=padded(policy),
        log_sum_sq_probs=padded(log_sum_p2),
        entropy=zeros,
        mean_logits=zeros,
        is_top1=zeros.bool(),
    )
    trainer = object.__new__(DPOTrainer)
    attributes = {
        "model": SimpleNamespace(training=True),
        "accelerator": Accelerator(cpu=True),
        "args": SimpleNamespace(discopop_tau=0.05),
        "beta": 0.3,
        "label_smoothing": smoothing,
        "loss_types": ["ipo" if name == "ipo_norm" else name for name in types],
        "loss_weights": trl_options.get("loss_weights", [1.0] * len(types)),
        "f_divergence_type": trl_options.get("f_divergence_type", "reverse_kl"),
        "f_alpha_divergence_coef": 0.5,
        "ld_alpha": trl_options.get("ld_alpha"),
        "use_weighting": trl_options.get("use_weighting", False),
        "precompute_ref_logps": True,
        "aux_loss_enabled": False,
        "ref_model": None,
        "_tp_size": 1,
        "_total_train_tokens": 0,
        "_metrics": {"train": {name: [] for name in ("entropy", "num_tokens", "mean_token_accuracy")}},
    }
    names = [name for name in PREFERENCE_METRICS if "count" not in name and "loss" not in name]
    attributes["_metrics"]["train"] |= {name: [] for name in (*names, "logits/chosen", "logits/rejected")}
    for name, value in attributes.items():
        setattr(trainer, name, value)
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": ref_sums[:4],
        "ref_rejected_logps": ref_sums[4:],
    }
    expected = trainer._compute_loss(lambda **_: outputs, inputs, return_outputs=False)
    (expected_gradient,) = torch.autograd.grad(expected, policy)

    loss, metrics = preference_loss(
        policy,
        ref,
        segments=segments,
        num_segments=8,
        loss_type=types,
        loss_weights=trl_options.get("loss_weights"),
        beta=0.3,
        label_smoothing=smoothing,
        f_divergence=attributes["f_divergence_type"],
        f_alpha=0.5,
        ld_alpha=attributes["ld_alpha"],
        log_sum_p2=log_sum_p2 if attributes["use_weighting"] else None,
    )
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(loss, policy)[0], expected_gradient, rtol=1e-5, atol=1e-7)
    means = preference_means(metrics)
    for name in names:
        assert means[name] == pytest.approx(attributes["_metrics"]["train"][name][0], rel=1e-5, abs=1e-6), name


MASKED = {"sigmoid": {}, "ld": {"ld_alpha": 0.3}, "simpo": {"loss_type": "simpo"}, "sigmoid_norm": {
    "loss_type": "sigmoid_norm"}, "mean": {"nll_normalization": "sequence_mean"}, "sum": {
        "nll_normalization": "sequence_sum"}}


@pytest.mark.parametrize("options", MASKED.values(), ids=MASKED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masks_equal_the_loss_and_the_nll_of_tokens_that_are_cut_out(options: dict, dtype: torch.dtype):
    """The loss is that of the loss tokens alone, plus the NLL of the NLL tokens alone: the same bits."""
    policy, ref, segments, bounds = _pairs(5, dtype, seed=3)
    draw = torch.Generator().manual_seed(1)
    loss_mask, nll_mask = (torch.rand(policy.shape, generator=draw) < 0.6 for _ in range(2))
    for start, end in bounds:  # the last token is in the NLL alone, as an end of turn is
        loss_mask[start], loss_mask[end - 1], nll_mask[end - 1] = end - start > 1, end - start == 1, True
    ref = None if options.get("loss_type") == "simpo" else ref
    both = {"segments": segments, "num_segments": 10, **options}
    loss, metrics = preference_loss(policy, ref, loss_mask=loss_mask, nll_mask=nll_mask, nll_weight=0.7, **both)
    (gradient,) = torch.autograd.grad(loss, policy)
    parts, gradients = [], []
    for mask, weight in ((loss_mask, 0.0), (nll_mask, 0.7)):
        kept = policy.detach()[mask].requires_grad_()
        there = {**both, "segments": segments[mask]}
        value, found = preference_loss(kept, None if ref is None else ref[mask], nll_weight=weight, **there)
        if weight:  # its loss part comes from the other tokens
            value = value - preference_loss(kept, None if ref is None else ref[mask], **there)[0]
        parts.append((value, found))
        gradients.append(torch.zeros_like(policy).masked_scatter(mask, torch.autograd.grad(value, kept)[0]))
    names = PREFERENCE_METRICS.index("nll_loss"), PREFERENCE_METRICS.index("count/nll")
    for i, name in enumerate(PREFERENCE_METRICS):
        assert metrics[i] == parts[i in names][1][i], name
    torch.testing.assert_close(loss, parts[0][0] + parts[1][0])
    torch.testing.assert_close(gradient, gradients[0] + gradients[1])
    assert not gradient[~(loss_mask | nll_mask)].any() and gradient[~loss_mask & nll_mask].any()


def test_masks_must_fit_the_tokens():
    policy, ref, segments, _ = _pairs()
    for mask in (torch.ones(1, dtype=torch.bool), torch.ones_like(policy)):
        with pytest.raises(ValueError, match="loss_mask and nll_mask are bool"):
            preference_loss(policy, ref, segments=segments, num_segments=6, nll_mask=mask)
    with pytest.raises(ValueError, match="loss_mask and nll_mask are bool"):
        preference_loss(torch.zeros(2), torch.zeros(2), loss_mask=torch.ones(2, dtype=torch.bool))
