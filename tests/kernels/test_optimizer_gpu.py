"""AdamW on a GPU against torch.optim.AdamW in fp64, without synchronization."""

import pytest
import torch

from strop.kernels import optimizer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_steps_are_no_further_from_fp64_than_pytorchs(dtype: torch.dtype):
    shapes = [(7,), (0,), (130, 1025), (2, 1 << 16)]
    starts = [torch.randn(shape, device="cuda") for shape in shapes]
    states = [(x.clone(), torch.zeros_like(x), torch.zeros_like(x), x.bfloat16()) for x in starts]
    exact, plain = ([torch.nn.Parameter(x.to(kind, copy=True)) for x in starts] for kind in
                    (torch.float64, torch.float32))
    optimizers = [torch.optim.AdamW(parameters, **OPTIONS) for parameters in (exact, plain)]
    assert optimizer.available([state[0] for state in states])
    for step in range(1, 6):
        grads = [torch.randn(shape, device="cuda").to(dtype) for shape in shapes]
        norm = optimizer.total_norm(grads)
        true = torch.cat([g.double().flatten() for g in grads]).norm()
        assert norm.dtype == torch.float32 and abs(norm - true) <= 1e-5 * true
        factor = (1.0 / (norm + 1e-6)).clamp(max=1.0)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")  # the first compiles
        try:
            for (master, mean, square, weight), grad in zip(states, grads, strict=True):
                optimizer.adamw_(master, grad, mean, square, weight, factor, step=step, **OPTIONS)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for parameters, other in zip((exact, plain), optimizers, strict=True):
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.grad = grad.to(parameter.dtype) * factor
            other.step()
        for (master, *_, weight), truth, other in zip(states, exact, plain, strict=True):
            assert torch.equal(weight, master.bfloat16())
            assert (master - truth).norm() <= 2 * (other - truth).norm() + 1e-6 * truth.norm()
