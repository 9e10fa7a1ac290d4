"""Cases for Triton's interpreter; test_triton.py runs this file with TRITON_INTERPRET=1."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strop.kernels import PREFERENCE_METRICS, preference_loss
from strop.kernels._triton import logprob as kernels
from strop.kernels.head import chunked, passes, reference
from strop.kernels.head.passes import Head
from strop.kernels.preference.losses import Options
from strop.kernels.preference.pairwise import _FUSED, NLL_NORMALIZATIONS, pairwise_sums

HEADS = [Head(), Head(logit_scale=0.5, temperature=0.7), Head(logit_scale=2.0, temperature=1.3, softcap=3.0)]
STATS = ("lse", "entropy", "mean_logit", "top1", "log_sum_p2")


def _inputs(n: int, d: int, v: int, dtype: torch.dtype, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (torch.randn(s, generator=generator).to(dtype) for s in ((n, d), (v, d), (v,)))
    return hidden, weight, bias, torch.randint(0, v, (n,), generator=generator)


def _run(module, hidden, weight, target, bias, head, grad, budget, frozen):
    outputs = chunked.forward(hidden, weight, target, bias, head, STATS, budget, bracket=frozen, passes=module)
    logp, lse, found, bracket = outputs
    if frozen:
        return [logp, lse, *found.values(), bracket]
    gradients = chunked.backward(
        grad, hidden, weight, target, bias, logp, lse, None, None, head, (True, True, True), budget, passes=module
    )
    return [logp, lse, *found.values(), *gradients]


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("frozen", [False, True])
def test_driver_with_triton_equals_driver_with_torch(head: Head, dtype: torch.dtype, frozen: bool):
    """Several chunks, blocks wider than a chunk's rest, every statistic, every gradient."""
    hidden, weight, bias, target = _inputs(5, 24, 1300, dtype)
    grad = torch.tensor([1.0, -0.5, 0.25, 0.0, 2.0])
    arguments = (hidden, weight, target, bias, head, grad, 5 * 512 * hidden.element_size(), frozen)
    ours, expected = _run(kernels, *arguments), _run(passes, *arguments)
    tolerance = {torch.float32: 2e-5, torch.float16: 4e-3}[dtype]
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


def test_dead_rows_write_zeros():
    hidden, weight, bias, target = _inputs(4, 8, 700, torch.float32)
    target[1] = -1
    hidden[1] = math.nan
    head, budget = HEADS[0], 1 << 20
    logp, lse, _, bracket = chunked.forward(
        hidden, weight, target, bias, head, (), budget, bracket=True, passes=kernels
    )
    live = torch.tensor([0, 2, 3])
    assert not logp[live].isnan().any() and not bracket[live].isnan().any()
    product = hidden @ weight.T
    out = torch.full_like(product, 7.0)
    kernels.gradient_chunk(product, 0, target, torch.expm1(logp), lse, 0.0, out)
    assert (out[1] == 0).all() and not out.isnan().any()


def test_a_target_beyond_the_vocabulary_gives_nan():
    hidden, weight, _, target = _inputs(2, 8, 30, torch.float32)
    target[0] = 30
    logp, *_ = chunked.forward(hidden, weight, target, None, HEADS[0], (), 1 << 20, passes=kernels)
    assert logp.isnan().tolist() == [True, False]
    assert kernels.gather_forward(hidden @ weight.T, target)[0].isnan().tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("inplace", [False, True])
def test_gather(dtype: torch.dtype, inplace: bool):
    torch.manual_seed(0)
    logits = (torch.randn(5, 4500) * 4).to(dtype)
    target = torch.tensor([4, 4499, -1, 77, 4096])
    grad = torch.tensor([1.0, -1.0, 1.0, 0.0, 0.5])
    logp, lse = kernels.gather_forward(logits, target)
    torch.testing.assert_close((logp, lse), passes.gather_forward(logits, target))
    expected = torch.empty_like(logits)
    passes.gather_backward(grad, logits, target, torch.expm1(logp), lse, expected)
    out = logits if inplace else torch.empty_like(logits)
    kernels.gather_backward(grad, logits, target, torch.expm1(logp), lse, out)
    torch.testing.assert_close(out, expected)
    assert (out[2:4] == 0).all()


def test_gather_with_columns_apart():
    """A transposed matrix, as a caller may hold it; its gradient has its strides."""
    logits, target, grad = torch.randn(40, 3).t(), torch.tensor([4, -1, 39]), torch.tensor([1.0, 1.0, -0.5])
    logp, lse = kernels.gather_forward(logits, target)
    out, expected = torch.empty_like(logits), torch.empty_like(logits)
    kernels.gather_backward(grad, logits, target, torch.expm1(logp), lse, out)
    passes.gather_backward(grad, logits, target, torch.expm1(logp), lse, expected)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("kind", ["huge", "equal", "-inf", "nan"])
def test_extreme_logits(kind: str):
    logits = torch.randn(2, 5000)
    if kind == "huge":
        logits[:, 5], logits[:, 4500] = 1e4, -1e4
    elif kind == "equal":
        logits[:] = 1.0
    elif kind == "-inf":
        logits[:, :4200] = -math.inf
    else:
        logits[1, 9] = math.nan
    target = torch.tensor([4500, 4700])
    logp, _ = kernels.gather_forward(logits, target)
    torch.testing.assert_close(logp, reference.gather_logprob(logits, target), equal_nan=True)
    state = passes.new_state(logits, target, True, True, True)
    for start in (0, 2500):
        kernels.scan_chunk(logits[:, start : start + 2500].contiguous(), start, state, 0.0)
    logp, _, found = chunked._finish(state, STATS, 5000)
    torch.testing.assert_close(logp, reference.gather_logprob(logits, target), equal_nan=True)
    if kind != "nan":
        expected = {name: value for name, value in reference.logit_stats(logits, target).items()}
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=15, deadline=None)
@given(n=st.integers(0, 3), v=st.sampled_from([2, 3, 255, 1000, 4097]), seed=st.integers(0, 9))
def test_shapes(n: int, v: int, seed: int):
    hidden, weight, bias, target = _inputs(n, 3, v, torch.float32, seed)
    arguments = (hidden, weight, target, bias, HEADS[0], torch.ones(n), 1 << 12, False)
    torch.testing.assert_close(_run(kernels, *arguments), _run(passes, *arguments), rtol=1e-4, atol=1e-4)


def test_offsets_pass_two_to_the_31():
    """Row 3 of a view with 2^30 elements between rows lies past 2^31; only the rows' own pages are touched."""
    stride, columns = 1 << 30, 64
    storage = torch.empty(3 * stride + columns, dtype=torch.float16)
    logits = storage.as_strided((4, columns), (stride, 1))
    logits.copy_(torch.randn(4, columns))
    target, out = torch.tensor([1, 2, 3, 4]), torch.empty(4, columns, dtype=torch.float16)
    state = passes.new_state(logits, target, False, False, False)
    kernels.scan_chunk(logits, 0, state, 0.0)
    logp, lse, _ = chunked._finish(state, (), columns)
    torch.testing.assert_close(logp, reference.gather_logprob(logits.float(), target), rtol=1e-5, atol=1e-5)
    kernels.gather_backward(torch.ones(4), logits, target, torch.expm1(logp), lse, out)
    expected = -logits.float().softmax(-1)
    expected[torch.arange(4), target] += 1
    torch.testing.assert_close(out.float(), expected, rtol=1e-3, atol=1e-3)


def _options(**changes) -> Options:
    numbers = {"beta": 0.3, "label_smoothing": 0.1, "simpo_gamma": 0.4, "dpop_lambda": 5.0, "discopop_tau": 0.2}
    numbers |= {"rpo_eta": 1.0, "rpo_divergence": "squared", "desirable_weight": 1.0, "undesirable_weight": 1.0}
    return Options(**(numbers | changes))


@pytest.mark.parametrize("name", _FUSED)
@pytest.mark.parametrize("nll", NLL_NORMALIZATIONS)
def test_pairwise_losses_equal_their_formulas(name: str, nll: str):
    """Loss, metrics and token gradients; more pairs than a tile, an empty completion, one longer than a tile."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 40, (34,), generator=generator)
    lengths[3], lengths[8] = 0, 300
    tokens = int(lengths.sum())
    policy, ref = (-torch.rand(tokens, generator=generator) for _ in range(2))
    policy.requires_grad_()
    segments = torch.arange(34, dtype=torch.int32).repeat_interleave(lengths)
    smoothed = name in ("sigmoid", "sigmoid_norm", "simpo", "robust", "exo_pair")
    o = _options(label_smoothing=0.1 if smoothed else 0.0)
    ref = None if name == "simpo" else ref
    options = {"segments": segments, "num_segments": 34, "loss_type": name, "beta": 0.3, "dpop_lambda": 5.0}
    options |= {"label_smoothing": o.label_smoothing, "simpo_gamma": 0.4, "discopop_tau": 0.2, "baseline": 0.1}
    options |= {"nll_normalization": nll, "nll_weight": 0.7, "pair_denominator": 17, "nll_denominator": 5.0}
    expected, expected_metrics = preference_loss(policy, ref, **options)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    for reference_logp in (ref,) if ref is None else (ref, torch.zeros(34).index_add(0, segments, ref)):
        sums = pairwise_sums(policy, reference_logp, offsets, name, o, False, nll, 0.1)
        torch.testing.assert_close(sums, expected_metrics, rtol=1e-4, atol=1e-4)
        loss = sums[PREFERENCE_METRICS.index("loss")] / 17 + 0.7 * sums[PREFERENCE_METRICS.index("nll_loss")] / 5
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
        gradients = [torch.autograd.grad(x, policy, retain_graph=True)[0] for x in (loss, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_opcheck_of_pairwise_loss():
    from torch.library import opcheck

    from strop.kernels.preference.pairwise import _pairwise, _pairwise_backward

    offsets = torch.tensor([0, 2, 3, 3, 6])
    numbers = [0.1, 0.0, 0.0, 0.05, 0.0, 50.0]
    policy = torch.randn(6, requires_grad=True)
    opcheck(_pairwise, (policy, torch.randn(6), offsets, "SIGMOID", False, 0, numbers))
    opcheck(_pairwise_backward, (torch.ones(12), offsets, torch.randn(4), torch.randn(2), 6))
