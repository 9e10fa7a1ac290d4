"""AdamW on the CPU against fp64 and against torch.optim.AdamW with clipping, over several steps."""

import pytest
import torch

from strop.kernels import optimizer

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
SHAPES = [(7,), (3, 5), (1,), (0,), (130, 1025), (2, 1 << 16)]
CLIP = 1.0


def clip_factor(norm):
    return (CLIP / (norm + 1e-6)).clamp(max=1.0)


def reference(master, grad, exp_avg, exp_avg_sq, *, lr, betas, eps, weight_decay, step):
    """(master, exp_avg, exp_avg_sq) after a step of AdamW, arXiv 1711.05101; step counts from 1."""
    exp_avg = betas[0] * exp_avg + (1 - betas[0]) * grad
    exp_avg_sq = betas[1] * exp_avg_sq + (1 - betas[1]) * grad.square()
    mean, square = exp_avg / (1 - betas[0] ** step), exp_avg_sq / (1 - betas[1] ** step)
    return master * (1 - lr * weight_decay) - lr * mean / (square.sqrt() + eps), exp_avg, exp_avg_sq


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_steps_are_no_further_from_fp64_than_pytorchs(library, dtype):
    torch.manual_seed(0)
    starts = [torch.randn(shape) for shape in SHAPES]
    weights = [start.bfloat16() for start in starts]
    ours = [(start.clone(), torch.zeros_like(start), torch.zeros_like(start)) for start in starts]
    truth = [tuple(x.double() for x in state) for state in ours]
    plain = [torch.nn.Parameter(start.clone()) for start in starts]
    theirs = torch.optim.AdamW(plain, fused=True, **OPTIONS)
    for step in range(1, 6):
        grads = [torch.randn(shape).to(dtype) * 10.0 ** (step - 3) for shape in SHAPES]
        norm = optimizer.total_norm(grads)
        exact = torch.cat([g.double().flatten() for g in grads]).norm()
        assert norm.dtype == torch.float32 and abs(norm - exact) <= 1e-6 * exact
        for (master, *moments), grad, weight in zip(ours, grads, weights, strict=True):
            optimizer.adamw_(master, grad, *moments, weight, clip_factor(norm), step=step, **OPTIONS)
            assert torch.equal(weight, master.bfloat16())
        scaled = [grad.double() * clip_factor(exact) for grad in grads]
        truth = [
            reference(master, grad, *moments, step=step, **OPTIONS)
            for (master, *moments), grad in zip(truth, scaled, strict=True)
        ]
        for parameter, grad in zip(plain, grads, strict=True):
            parameter.grad = grad.float()
        torch.nn.utils.clip_grad_norm_(plain, CLIP)
        theirs.step()
        for state, parameter, exact_state in zip(ours, plain, truth, strict=True):
            others = (parameter.detach(), *(theirs.state[parameter][key] for key in ("exp_avg", "exp_avg_sq")))
            for mine, other, exact in zip(state, others, exact_state, strict=True):
                allowed = 2 * (other.double() - exact).norm() + 1e-7 * exact.norm()
                assert (mine.double() - exact).norm() <= allowed


def test_a_weight_is_optional_and_rows_may_be_strided(library):
    torch.manual_seed(0)
    master, grad = torch.randn(6, 4), torch.randn(4, 6).T
    expected = reference(master, grad, torch.zeros(6, 4), torch.zeros(6, 4), step=1, **OPTIONS)[0]
    optimizer.adamw_(master, grad, torch.zeros(6, 4), torch.zeros(6, 4), None, torch.ones(()), step=1, **OPTIONS)
    torch.testing.assert_close(master, expected)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_norm_does_not_depend_on_threads(library, threads):
    grads = [torch.randn(300, 1000, generator=torch.Generator().manual_seed(0))]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        norm = optimizer.total_norm(grads)
    finally:
        torch.set_num_threads(before)
    assert norm == optimizer.total_norm(grads)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_in_the_norm(library, value):
    assert not optimizer.total_norm([torch.ones(3), torch.tensor([1.0, value])]).isfinite()


def test_only_contiguous_fp32_on_the_cpu_is_taken(library):
    assert optimizer.available([torch.zeros(3), torch.zeros(2, 2)])
    for other in (torch.zeros(3).bfloat16(), torch.zeros(2, 3).T, torch.zeros(3, device="meta")):
        assert not optimizer.available([torch.zeros(3), other])
