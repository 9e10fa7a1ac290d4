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


@pytest.mark.parametrize(("kind", "is_split", "launches"), [
    ("float32", False, 2), ("float32", True, 2), ("bfloat16", False, 4), ("int8", True, 4)])
def test_many_tensors_get_the_bits_of_a_launch_each(kind: str, is_split: bool, launches: int):
    """In a launch for each form, of whole and of ragged sizes, without a wait."""
    shapes, found = [(64, 1000), (2048,), (0,), (3, 33), (2, 1 << 16), (5,), (7, 64)], []
    starts = [torch.randn(shape, device="cuda") for shape in shapes]
    grads = [[torch.randn_like(x).bfloat16() for x in starts] for _ in range(4)]
    factor = torch.tensor(0.7, device="cuda")
    for at_once in (True, False):
        states = []
        for i, start in enumerate(starts):
            weight, low = (x.clone() for x in optimizer.split(start))
            mean, square, *scales = optimizer.new_moments(start, kind).values()
            states.append(optimizer.State(low if is_split else start.clone(), mean, square, weight,
                                          tuple(scales) or None, 5 * i, i))
        together = optimizer.AdamW(states)
        for step, mine in enumerate(grads, 1):
            if not at_once:
                for s, grad in zip(states, mine, strict=True):
                    optimizer.adamw_(s.master, grad, s.exp_avg, s.exp_avg_sq, s.weight, factor, scales=s.scales,
                                     step=step, key=optimizer.key_of(step, s.number), first=s.first, **OPTIONS)
                continue
            torch.cuda.synchronize()
            if step == len(grads):
                with torch.profiler.profile() as prof:
                    together.step(mine, factor, step=step, **OPTIONS)
                    torch.cuda.synchronize()
                names = [event.name for event in prof.events() if "LaunchKernel" in event.name]
                assert len(names) == launches, names
                continue
            torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")  # the first compiles
            try:
                together.step(mine, factor, step=step, **OPTIONS)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        found.append([x for s in states for x in (s.master, s.exp_avg, s.exp_avg_sq, s.weight, *(s.scales or ()))])
    assert all(map(torch.equal, *found))


def test_gradients_are_added_as_pytorch_does():
    shapes = [(64, 1000), (2048,), (0,), (3, 33), (5,)]
    sums = [torch.full(shape, 7.0, device="cuda") for shape in shapes]
    expected, adder = [x.clone() for x in sums], optimizer.Sums(sums)
    for overwrite, missing in ((True, 3), (False, 1), (False, None)):
        grads = [None if i == missing else torch.randn_like(x).bfloat16() for i, x in enumerate(sums)]
        adder.add(grads, overwrite)
        for total, grad in zip(expected, grads, strict=True):
            total.copy_(total * (not overwrite) + (0 if grad is None else grad.float()))
    assert all(map(torch.equal, sums, expected))


@pytest.mark.parametrize("is_split", [False, True])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_cheaper_state_is_that_of_the_cpu(kind: str, is_split: bool):
    """Numbers halfway between two codes, or two bf16 numbers, go either way."""
    start, grads = torch.randn(64, 1000), torch.randn(5, 64, 1000).bfloat16()
    found = []
    for device in ("cpu", "cuda"):
        weight, low = (x.to(device) for x in optimizer.split(start))
        master = low if is_split else start.to(device, copy=True)
        mean, square, *scales = optimizer.new_moments(weight, kind).values()
        for step, grad in enumerate(grads, 1):
            optimizer.adamw_(master, grad.to(device), mean, square, weight, torch.tensor(0.7, device=device), step=step,
                             scales=tuple(scales) or None, key=7919 * step, **OPTIONS)
        found.append((optimizer.join(weight, master) if is_split else master).cpu())
    far = (found[0] - found[1]).abs() > 1e-5
    assert far.float().mean() < 2e-3 and (found[0] - found[1]).norm() < 1e-3 * (found[0] - start).norm()
