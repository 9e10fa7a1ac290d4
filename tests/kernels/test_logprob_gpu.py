"""The head and the preference loss on a GPU: against fp64, without synchronization, deterministic."""

import pytest
import torch

from strop.kernels import gather_logprob, linear_logprob, linear_preference_loss, preference_loss
from strop.kernels.head import reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
N, D, V = 300, 128, 50257


def _inputs(dtype: torch.dtype, n: int = N, d: int = D, v: int = V):
    draw = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(n, d, generator=draw, device="cuda").to(dtype).requires_grad_()
    weight = (torch.randn(v, d, generator=draw, device="cuda") * 3 * d**-0.5).to(dtype).requires_grad_()
    target = torch.randint(v, (n,), generator=draw, device="cuda")
    return hidden, weight, target, torch.linspace(-1, 1, n, device="cuda")


def _results(function, hidden, weight, target, grad, **options) -> list[torch.Tensor]:
    logp = function(hidden, weight, target, **options)
    return [logp, *torch.autograd.grad(logp, (hidden, weight), grad.to(logp.dtype))]


def _plain(hidden, weight, target, softcap=None):
    logits = hidden @ weight.T
    logits = logits if hidden.dtype == torch.float64 else logits.float()
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    return logits.log_softmax(-1).gather(-1, target[:, None])[:, 0]


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("budget", [None, 8 << 20], ids=["one chunk", "chunks"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_error_is_at_most_twice_that_of_plain_pytorch(dtype: torch.dtype, budget: int | None, softcap):
    inputs = _inputs(dtype)
    exact = [x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in inputs]
    truth, plain = _results(_plain, *exact, softcap=softcap), _results(_plain, *inputs, softcap=softcap)
    ours = _results(linear_logprob, *inputs, softcap=softcap, byte_budget=budget)
    for a, b, c in zip(ours, plain, truth, strict=True):
        assert (a.double() - c).norm() <= 2 * (b.double() - c).norm() + 1e-12


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_and_a_frozen_head(dtype: torch.dtype):
    hidden, weight, target, grad = _inputs(dtype)
    logp, stats = linear_logprob(hidden, weight.detach(), target, stats=("entropy", "top1"))
    logits = hidden.detach().double() @ weight.detach().double().T
    p = logits.log_softmax(-1)
    entropy = -(p.exp() * p).sum(-1)
    assert (stats["entropy"] - entropy).norm() <= 1e-2 * entropy.norm()
    assert (stats["top1"] == (logits.argmax(-1) == target)).float().mean() > 0.99
    (frozen,) = torch.autograd.grad(logp, hidden, grad)
    trained = _results(linear_logprob, hidden, weight, target, grad)[1]
    assert (frozen - trained).float().norm() <= 1e-2 * trained.float().norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gather(dtype: torch.dtype):
    logits = (torch.randn(64, V, device="cuda") * 3).to(dtype).requires_grad_()
    target = torch.randint(V, (64,), device="cuda")
    target[5] = -100
    logp = gather_logprob(logits, target)
    torch.testing.assert_close(logp, reference.gather_logprob(logits.detach().float(), target), rtol=1e-4, atol=1e-4)
    (grad,) = torch.autograd.grad(logp.sum(), logits)
    exact = logits.detach().double().requires_grad_()
    (true,) = torch.autograd.grad(_plain_gather(exact, target), exact)
    assert (grad.double() - true).norm() <= 1e-2 * true.norm()
    assert not grad[5].any()


def _plain_gather(logits, target):
    live = target >= 0
    return logits.log_softmax(-1)[live].gather(-1, target[live][:, None]).sum()


def test_nothing_waits_and_bits_repeat():
    inputs = _inputs(torch.bfloat16)
    bounds = [(i, i + 50) for i in range(0, N, 50)]
    ref = torch.zeros(N, device="cuda")

    def both() -> list[torch.Tensor]:
        loss, _ = linear_preference_loss(*inputs[:3], ref, target_bounds=bounds, beta=0.1)
        return [loss, *torch.autograd.grad(loss, inputs[:2])]

    first = both()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = both()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "apo_zero"])
def test_preference_loss_equals_that_on_the_cpu(loss: str):
    policy = -torch.rand(1500, dtype=torch.float64)
    bounds, ref = [(0, 1100), (1100, 1130), (1130, 1130), (1130, 1500)], policy + 0.1 * torch.randn(1500).double()
    found = []
    for device in ("cpu", "cuda"):
        x = policy.to(device).requires_grad_()
        value, metrics = preference_loss(x, ref.to(device), target_bounds=bounds, loss_type=loss, beta=0.3)
        found.append([value, metrics, *torch.autograd.grad(value, x)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b.cpu())
