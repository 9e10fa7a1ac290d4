import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strop.kernels import _cpu, gather_logprob, linear_logprob
from strop.kernels.head import chunked, reference

STATS = ("lse", "entropy", "mean_logit", "top1", "log_sum_p2")
HEADS = [{}, {"logit_scale": 0.5, "temperature": 0.7}, {"softcap": 3.0, "temperature": 1.3, "logit_scale": 2.0}]
RECOMPUTE, KEEP = 0, 1 << 30


def _inputs(n: int, d: int, v: int, dtype: torch.dtype = torch.float64, bias: bool = False, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(n, d), (v, d)] + ([(v,)] if bias else [])
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    target = torch.randint(0, v, (n,), generator=generator)
    return [x.requires_grad_() for x in tensors], target


def _reference(tensors, target, ignore_index=-100, **head):
    logits = reference.linear_logits(*tensors, **head)
    return reference.gather_logprob(logits, target, ignore_index), reference.logit_stats(logits, target, ignore_index)


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("byte_budget", [RECOMPUTE, KEEP])
@pytest.mark.parametrize("needs", ["hidden", "weight", "all", "bias"])
def test_equals_the_reference_in_fp64(head: dict, bias: bool, byte_budget: int, needs: str):
    """Values, stats and gradients over several chunks, with an ignored row and a row of zero upstream gradient."""
    if needs == "bias" and not bias:
        pytest.skip("no bias to differentiate")
    tensors, target = _inputs(9, 12, 1500, bias=bias)
    wanted = {"hidden": [0], "weight": [1], "bias": [2], "all": range(len(tensors))}[needs]
    for i, x in enumerate(tensors):
        x.requires_grad_(i in wanted)
    target[2] = -100
    hidden, weight, *rest = tensors
    logp, stats = linear_logprob(hidden, weight, target, *rest, stats=STATS, byte_budget=byte_budget, **head)
    expected, expected_stats = _reference(tensors, target, **head)
    assert logp.dtype == torch.float64
    torch.testing.assert_close(logp, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(stats, {k: x.detach() for k, x in expected_stats.items()}, rtol=1e-10, atol=1e-10)
    assert not any(x.requires_grad for x in stats.values())
    upstream = torch.linspace(-1, 1, 9, dtype=torch.float64)
    upstream[4] = 0.0
    inputs = [tensors[i] for i in wanted]
    gradients = torch.autograd.grad(logp, inputs, upstream)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, inputs, upstream), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_gradcheck_of_the_reference(head: dict):
    tensors, target = _inputs(4, 3, 7, bias=True)
    assert torch.autograd.gradcheck(lambda *x: _reference(x, target, **head)[0], tensors)


def _errors(values, truths) -> list[float]:
    return [(a.double() - b.double()).norm().item() for a, b in zip(values, truths, strict=True)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_error_is_at_most_twice_that_of_plain_pytorch(csrc, dtype: torch.dtype, frozen: bool, head: dict):
    tensors, target = _inputs(64, 96, 3001, dtype, bias=True)
    with torch.no_grad():
        tensors[1].mul_(0.2)
    inputs = tensors[:1] if frozen else tensors
    for x in tensors[1:]:
        x.requires_grad_(not frozen)
    upstream = torch.randn(64, generator=torch.Generator().manual_seed(1)) / 64
    doubles = [x.detach().double().requires_grad_() for x in tensors]
    truth, _ = _reference(doubles, target, **head)
    truths = [truth, *torch.autograd.grad(truth, doubles[: len(inputs)], upstream.double())]
    logits = reference.linear_logits(*tensors, **head)
    plain = logits.float().log_softmax(-1).gather(1, target[:, None]).squeeze(1)
    plain = [plain, *torch.autograd.grad(plain, inputs, upstream)]
    logp = linear_logprob(tensors[0], tensors[1], target, tensors[2], **head)
    assert logp.dtype == torch.float32
    ours = [logp, *torch.autograd.grad(logp, inputs, upstream)]
    for mine, theirs in zip(_errors(ours, truths), _errors(plain, truths), strict=True):
        assert mine <= 2 * theirs


@settings(max_examples=40, deadline=None)
@given(
    n=st.sampled_from([0, 1, 2, 7, 33]),
    d=st.sampled_from([1, 3, 17, 64]),
    v=st.sampled_from([2, 3, 63, 1025, 2500]),
    chunk=st.sampled_from([0, 1, 65]),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_shapes(n: int, d: int, v: int, chunk: int, bias: bool, seed: int):
    tensors, target = _inputs(n, d, v, bias=bias, seed=seed)
    logp = linear_logprob(tensors[0], tensors[1], target, *tensors[2:], byte_budget=chunk * n * 8)
    expected, _ = _reference(tensors, target)
    torch.testing.assert_close(logp, expected, rtol=1e-11, atol=1e-11)
    upstream = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    gradients = torch.autograd.grad(logp, tensors, upstream)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, tensors, upstream), rtol=1e-9, atol=1e-11)


def test_a_large_vocabulary_in_a_hidden_size_of_no_power_of_two():
    tensors, target = _inputs(3, 7, 151_936)
    logp = linear_logprob(*tensors, target, byte_budget=1 << 20)
    expected, _ = _reference(tensors, target)
    torch.testing.assert_close(logp, expected, rtol=1e-11, atol=1e-11)
    gradients = torch.autograd.grad(logp.sum(), tensors)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.sum(), tensors), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("free", "idle", "budget"), [(1 << 30, 0, 512 << 20), (39 << 30, 1 << 30, 5 << 30)])
def test_a_gpus_budget_follows_its_free_memory(free: int, idle: int, budget: int, monkeypatch):
    device, held = torch.device("cuda"), 7 << 30
    for name, value in (("is_available", True), ("memory_reserved", held + idle), ("memory_allocated", held),
                        ("mem_get_info", (free, 80 << 30))):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    assert chunked.default_byte_budget(device) == budget


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["huge", "equal", "-inf bias"])
def test_extreme_logits(csrc, dtype: torch.dtype, kind: str):
    """With a hidden size of 1 and a hidden state of 1 the weight is the logits."""
    vocab = 2048
    weight = torch.zeros(vocab, 1, dtype=dtype) if kind == "equal" else torch.randn(vocab, 1).to(dtype)
    if kind == "huge":
        weight[5], weight[1700] = 1e4, -1e4
    bias = torch.zeros(vocab, dtype=dtype)
    if kind == "-inf bias":
        bias[:1100] = -math.inf
    hidden, target = torch.ones(3, 1, dtype=dtype), torch.tensor([5, 1700, 2000])
    logp, stats = linear_logprob(hidden.requires_grad_(), weight, target, bias, stats=STATS, byte_budget=3 * 64 * 4)
    logits = (weight.squeeze(1) + bias).double().expand(3, -1)
    expected = logits.log_softmax(-1).gather(1, target[:, None]).squeeze(1)
    torch.testing.assert_close(logp.double(), expected, rtol=1e-5, atol=1e-5)
    assert (logp <= 0).all()
    expected_stats = reference.logit_stats(logits, target)
    for name in ("lse", "entropy", "top1", "log_sum_p2"):
        torch.testing.assert_close(stats[name].double(), expected_stats[name], rtol=1e-4, atol=1e-4)
    if kind != "-inf bias":
        assert torch.isfinite(torch.autograd.grad(logp.sum(), hidden)[0]).all()


def test_logp_is_never_above_zero(csrc):
    """Even if the target has all the probability and everything is rounded to bf16."""
    torch.manual_seed(0)
    weight = torch.randn(1000, 32).bfloat16()
    hidden = weight * 3
    assert (linear_logprob(hidden, weight, torch.arange(1000)) <= 0).all()


def test_nan_is_not_hidden(csrc):
    tensors, target = _inputs(4, 5, 1300, torch.float32)
    with torch.no_grad():
        tensors[0][1, 2] = math.nan
    logp = linear_logprob(*tensors, target)
    assert logp.isnan().tolist() == [False, True, False, False]
    gradient = torch.autograd.grad(logp.sum(), tensors[0])[0]
    assert gradient[1].isnan().all() and not gradient[0].isnan().any()


@pytest.mark.parametrize("has_matrix_unit", [False, True])
def test_with_a_matrix_unit_and_without(has_matrix_unit: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_cpu, "HAS_MATRIX_UNIT", has_matrix_unit)
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 32).bfloat16(), torch.randn(3000, 32).bfloat16()
    target = torch.randint(3000, (9,))
    low, high = ([x.to(dtype).requires_grad_() for x in (hidden, weight)] for dtype in (torch.bfloat16, torch.float64))
    found = torch.autograd.grad(linear_logprob(*low, target).sum(), low)
    truths = torch.autograd.grad(reference.gather_logprob(high[0] @ high[1].mT, target).sum(), high)
    for value, truth in zip(found, truths, strict=True):
        assert (value.double() - truth).norm() <= 0.01 * truth.norm()


def test_two_runs_give_identical_bits():
    def run():
        tensors, target = _inputs(50, 32, 3000, torch.bfloat16)
        logp = linear_logprob(*tensors, target)
        return [logp, *torch.autograd.grad(logp.sum(), tensors)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_autocast_computes_in_its_dtype_and_returns_the_weights_gradient_in_its_own():
    (hidden, weight), target = _inputs(6, 8, 40, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        logp = linear_logprob(hidden, weight, target)
    expected = linear_logprob(hidden.bfloat16(), weight.bfloat16(), target)
    assert torch.equal(logp, expected)
    assert torch.autograd.grad(logp.sum(), weight)[0].dtype == torch.float32


def test_the_budget_bounds_the_scratch():
    """The largest tensor alive is a chunk within the budget, not [N, V]."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.untyped_storage().nbytes())
            return out

    tensors, target = _inputs(512, 16, 20000, torch.bfloat16)
    with Watch():
        logp = linear_logprob(*tensors, target, byte_budget=2 << 20)
        logp.sum().backward()
    assert largest <= 2 << 20


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inplace", [False, True])
def test_gather_logprob(csrc, dtype: torch.dtype, inplace: bool):
    torch.manual_seed(0)
    logits = (torch.randn(3, 5, 301, dtype=torch.float64) * 4).to(dtype).requires_grad_()
    target = torch.randint(0, 301, (3, 5))
    target[0, 1] = -1
    upstream = torch.randn(3, 5)
    high = logits.detach().double().requires_grad_()
    expected = reference.gather_logprob(high, target, ignore_index=-1)
    expected_gradient = torch.autograd.grad(expected, high, upstream.double())[0]
    logp = gather_logprob(logits, target, ignore_index=-1, inplace_backward=inplace)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(logp.double(), expected, rtol=tolerance, atol=tolerance)
    gradient = torch.autograd.grad(logp, logits, upstream.to(logp.dtype))[0]
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient, expected_gradient.to(dtype))


@pytest.mark.parametrize("shift", [0, 50])
def test_gradients_of_gather_logprob_err_as_pytorchs_do(csrc, shift: int):
    """Also where the log-sum-exp is so large that rounding it would show in every gradient."""
    logits = (torch.randn(8, 3001, generator=torch.Generator().manual_seed(0)) * 3 + shift).requires_grad_()
    high, target, norms = logits.detach().double().requires_grad_(), torch.arange(8), []
    (truth,) = torch.autograd.grad(reference.gather_logprob(high, target).sum(), high)
    for function in (gather_logprob, reference.gather_logprob):
        norms.append((torch.autograd.grad(function(logits, target).sum(), logits)[0] - truth).norm())
    assert norms[0] <= 2 * norms[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(4, 6)}, "do not match"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, "target must be"),
        ({"target": torch.tensor([0, 1, 2, 9])}, "vocabulary of 9"),
        ({"target": torch.zeros(4)}, "integer"),
        ({"weight": torch.zeros(9, 5, dtype=torch.float16)}, "share one dtype"),
        ({"weight": torch.zeros(0, 5)}, "empty"),
        ({"bias": torch.zeros(5)}, "bias must be"),
        ({"temperature": 0.0}, "temperature"),
        ({"softcap": -1.0}, "softcap"),
        ({"stats": ("perplexity",)}, "unknown stats"),
    ],
)
def test_what_does_not_fit_raises(change: dict, message: str):
    arguments = {"hidden": torch.zeros(4, 5), "weight": torch.zeros(9, 5), "target": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        linear_logprob(**(arguments | change))
