"""Policy gradients: the formulas written out, and their expectations over every completion of a small policy."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strop.kernels.policy import POLICY_METRICS, leave_one_out, policy_loss, reference

REWARDS = st.lists(st.lists(st.floats(-100, 100), min_size=2, max_size=6), min_size=1, max_size=5)


def packed(lengths, seed=0, dtype=torch.float64):
    """Token log-probs of completions of these lengths, and their segments."""
    draw = torch.Generator().manual_seed(seed)
    logp = -torch.rand(sum(lengths), generator=draw, dtype=dtype)
    return logp, torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32), torch.tensor(lengths))


@settings(deadline=None)
@given(REWARDS)
def test_advantages_are_rewards_less_the_mean_of_the_others(rewards):
    groups = torch.tensor([g for g, mine in enumerate(rewards) for _ in mine])
    found = leave_one_out(torch.tensor([r for mine in rewards for r in mine], dtype=torch.float64), groups)
    expected = [a for mine in reference.leave_one_out(rewards) for a in mine]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)


@settings(deadline=None)  # the first call loads the op
@given(st.floats(-1e6, 1e6), st.integers(2, 9))
def test_equal_rewards_teach_exactly_nothing(reward, k):
    advantages = leave_one_out(torch.full((k,), reward), torch.zeros(k, dtype=torch.int64))
    assert advantages.tolist() == [0.0] * k
    logp, segments = packed([3] * k)
    logp.requires_grad_()
    policy_loss(logp, advantages, segments=segments, num_segments=k)[0].backward()
    assert logp.grad.abs().max() == 0


def test_a_completion_without_others_has_no_advantage():
    assert leave_one_out(torch.ones(3), torch.tensor([0, 0, 1])).isnan().tolist() == [False, False, True]
    assert leave_one_out(torch.ones(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize("loss_type", ["rloo", "mdloo"])
def test_value_and_gradient_are_those_of_the_written_formula(loss_type):
    lengths, advantages = [3, 1, 7, 2], [0.5, -1.5, 2.0, 0.25]
    logp, segments = packed(lengths)
    start = logp + 0.1 * packed(lengths, seed=1)[0]
    logp.requires_grad_()
    mirror = {} if loss_type == "rloo" else {"mirror_weight": 0.7}
    loss, metrics = policy_loss(logp, torch.tensor(advantages), segments=segments, num_segments=4, loss_type=loss_type,
                                **mirror, **({} if loss_type == "rloo" else {"start_logp": start}))
    split = reference.policy_loss(logp.split(lengths), advantages, loss_type, start.split(lengths), **mirror)
    torch.testing.assert_close(loss, split, rtol=1e-12, atol=0)
    ours, theirs = (torch.autograd.grad(x, logp, retain_graph=True)[0] for x in (loss, split))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    found = dict(zip(POLICY_METRICS, metrics.tolist(), strict=True))
    assert found["count"] == 4 and found["loss"] == pytest.approx(4 * loss.item(), rel=1e-6)
    if loss_type == "mdloo":
        assert found["policy/approxkl"] > 0 and found["policy/ratio"] != 4
        options = {"segments": segments, "num_segments": 4, "loss_type": "mdloo", "start_logp": start}
        torch.autograd.gradcheck(lambda x: policy_loss(x, torch.tensor(advantages), **options)[0], logp)


def test_the_first_mirror_step_is_that_of_rloo():
    logp, segments = packed([2, 5, 1])
    logp.requires_grad_()
    advantages, grads = torch.tensor([1.0, -2.0, 1.0]), []
    for loss_type in ("rloo", "mdloo"):
        loss, _ = policy_loss(logp, advantages, segments=segments, num_segments=3, loss_type=loss_type)
        grads.append(torch.autograd.grad(loss, logp)[0])
    torch.testing.assert_close(*grads, rtol=1e-12, atol=0)


def test_expectations_are_the_gradient_of_the_expected_reward_and_the_kl():
    """Every completion of a policy over 6 tokens, weighted by its probability."""
    draw = torch.Generator().manual_seed(0)
    logits, old, rewards = (torch.randn(6, generator=draw, dtype=torch.float64) for _ in range(3))
    logits.requires_grad_()
    segments = torch.arange(6, dtype=torch.int32)
    p, logp, start = logits.softmax(0), logits.log_softmax(0), old.log_softmax(0)

    def expected(weights, **options):
        return sum(weights[y] * policy_loss(logp[y:y + 1], rewards[y:y + 1], segments=segments[:1], num_segments=1,
                                            **options)[0] for y in range(6))

    def gradient(x):
        return torch.autograd.grad(x, logits, retain_graph=True)[0]

    torch.testing.assert_close(gradient(expected(p.detach())), gradient(-(p * rewards).sum()))
    kl = (p * (logp - start)).sum()
    found = sum(start.exp()[y] * policy_loss(
        logp[y:y + 1], rewards[y:y + 1], segments=segments[:1], num_segments=1, loss_type="mdloo",
        start_logp=start[y:y + 1], mirror_weight=0.3)[0] for y in range(6))
    torch.testing.assert_close(found, 0.3 * kl - (p * rewards).sum())
    torch.testing.assert_close(gradient(found), gradient(0.3 * kl - (p * rewards).sum()))


@pytest.mark.parametrize(("change", "message"), [
    ({"loss_type": "ppo"}, "unknown loss_type"),
    ({"start_logp": torch.zeros(3)}, "on-policy"),
    ({"loss_type": "mdloo", "start_logp": torch.zeros(2)}, "must have the shape"),
    ({"num_segments": 3}, r"must be \[tokens\]"),
    ({"segments": torch.zeros(2, dtype=torch.int32)}, r"must be \[tokens\]"),
])
def test_what_does_not_fit_is_refused(change, message):
    options = {"segments": torch.tensor([0, 0, 1], dtype=torch.int32), "num_segments": 2} | change
    with pytest.raises(ValueError, match=message):
        policy_loss(torch.zeros(3), torch.zeros(2), **options)
    with pytest.raises(ValueError, match="must be"):
        leave_one_out(torch.zeros(3), torch.zeros(2, dtype=torch.int64))
