"""Cases for Triton's interpreter; test_triton.py runs this file with TRITON_INTERPRET=1."""

import math
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strop.kernels import LOSS_TYPES, _triton, optimizer, preference, preference_loss
from strop.kernels._triton import adamw, sums
from strop.kernels._triton import logprob as kernels
from strop.kernels._triton import segment_sum as segments
from strop.kernels.head import chunked, passes, reference
from strop.kernels.head.passes import LogitTransform
from strop.kernels.optimizer import formats, many
from strop.kernels.optimizer import reference as optimizer_reference

HEADS = [LogitTransform(), LogitTransform(0.5, temperature=0.7), LogitTransform(2.0, temperature=1.3, softcap=3.0)]
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
def test_driver_with_triton_equals_driver_with_torch(head: LogitTransform, dtype: torch.dtype, frozen: bool):
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
    logp, total = kernels.gather_forward(logits, target)
    torch.testing.assert_close((logp, total), passes.gather_forward(logits, target))
    expected = torch.empty_like(logits)
    passes.gather_backward(grad, logits, target, torch.expm1(logp), total, expected)
    out = logits if inplace else torch.empty_like(logits)
    kernels.gather_backward(grad, logits, target, torch.expm1(logp), total, out)
    torch.testing.assert_close(out, expected)
    assert (out[2:4] == 0).all()


@pytest.mark.parametrize("shift", [0, 50])
def test_gradients_of_gather_err_as_pytorchs_do(shift: int):
    """Also where the log-sum-exp is so large that rounding it would show in every gradient."""
    logits = torch.randn(8, 3001, generator=torch.Generator().manual_seed(0)) * 3 + shift
    target, found = torch.arange(8), []
    for x in (logits.double().requires_grad_(), logits.clone().requires_grad_()):
        found += torch.autograd.grad(reference.gather_logprob(x, target).sum(), x)
    logp, total = kernels.gather_forward(logits, target)
    out = torch.empty_like(logits)
    kernels.gather_backward(torch.ones(8), logits, target, torch.expm1(logp), total, out)
    assert (out - found[0]).norm() <= 2 * (found[1] - found[0]).norm()


def test_gather_with_columns_apart():
    """A transposed matrix, as a caller may hold it; its gradient has its strides."""
    logits, target, grad = torch.randn(40, 3).t(), torch.tensor([4, -1, 39]), torch.tensor([1.0, 1.0, -0.5])
    logp, total = kernels.gather_forward(logits, target)
    out, expected = torch.empty_like(logits), torch.empty_like(logits)
    kernels.gather_backward(grad, logits, target, torch.expm1(logp), total, out)
    passes.gather_backward(grad, logits, target, torch.expm1(logp), total, expected)
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
    """Row 3 of a view with 2^30 elements between rows lies beyond 2^31; only the rows' own pages are touched."""
    stride, columns = 1 << 30, 64
    storage = torch.empty(3 * stride + columns, dtype=torch.float16)
    logits = storage.as_strided((4, columns), (stride, 1))
    logits.copy_(torch.randn(4, columns))
    target, out = torch.tensor([1, 2, 3, 4]), torch.empty(4, columns, dtype=torch.float16)
    state = passes.new_state(logits, target, False, False, False)
    kernels.scan_chunk(logits, 0, state, 0.0)
    logp, *_ = chunked._finish(state, (), columns)
    torch.testing.assert_close(logp, reference.gather_logprob(logits.float(), target), rtol=1e-5, atol=1e-5)
    total = torch.stack((state.highest, state.total), 1)
    kernels.gather_backward(torch.ones(4), logits, target, torch.expm1(logp), total, out)
    expected = -logits.float().softmax(-1)
    expected[torch.arange(4), target] += 1
    torch.testing.assert_close(out.float(), expected, rtol=1e-3, atol=1e-3)


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 7, segments.BLOCK, 2 * segments.BLOCK + 3]), min_size=1, max_size=5),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_segment_sums(lengths: list[int], dtype: torch.dtype):
    """Empty completions, and some longer than a block."""
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    values = torch.randn(int(offsets[-1]) * 2, dtype=dtype)[::2]
    found = segments.segment_sum(values, offsets)
    expected = torch.stack([part.double().sum() for part in values.split(lengths)])
    assert found.dtype == dtype
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-10}[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=tolerance)
    grad = torch.randn(len(lengths), dtype=dtype)
    spread = segments.segment_spread(grad, offsets, len(values))
    assert torch.equal(spread, grad.repeat_interleave(torch.tensor(lengths)))


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_preference_losses_on_the_kernels_equal_those_on_the_cpu(name: str, monkeypatch: pytest.MonkeyPatch):
    """Loss, metrics and token gradients of every loss; an empty completion, one longer than a block."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 40, (34,), generator=generator)
    lengths[3], lengths[8] = 0, 1300
    policy, ref = (-torch.rand(int(lengths.sum()), generator=generator, dtype=torch.float64) for _ in range(2))
    policy.requires_grad_()
    options = {"target_bounds": list(zip(lengths.cumsum(0) - lengths, lengths.cumsum(0), strict=True))}
    options |= {"loss_type": name, "beta": 0.3, "nll_weight": 0.0 if name == "orpo" else 0.7}
    options |= {"label_smoothing": 0.1} if name in ("exo_pair", "robust") else {}
    options |= {"reward_margin": torch.randn(17, generator=generator, dtype=torch.float64)} if name == "rpo" else {}
    ref = None if name in ("simpo", "orpo") else ref

    def results():
        loss, metrics = preference_loss(policy, ref, **options)
        return loss, metrics, torch.autograd.grad(loss, policy)[0]

    expected = results()
    calls = []
    monkeypatch.setattr(preference.loss, "segment_sum", lambda *x: calls.append(x) or _KernelSum.apply(*x))
    torch.testing.assert_close(results(), expected)
    assert len(calls) == 1 + (ref is not None)


class _KernelSum(torch.autograd.Function):
    """segment_sum as it is on a GPU."""

    @staticmethod
    def forward(ctx, values, offsets):
        ctx.offsets, ctx.tokens = offsets, len(values)
        return segments.segment_sum(values, offsets)

    @staticmethod
    def backward(ctx, grad):
        return segments.segment_spread(grad, ctx.offsets, ctx.tokens), None


ADAMW = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("count", [0, 1, 777, adamw.BLOCK, 2 * adamw.BLOCK + 5])
def test_adamw_is_no_further_from_fp64_than_pytorchs(count: int, dtype: torch.dtype):
    """Five steps with a clip factor; also against torch.optim.AdamW in fp64. The weight is fp16: the interpreter
    truncates to bf16, hardware rounds."""
    generator = torch.Generator().manual_seed(count)
    start = torch.randn(count, generator=generator)
    weight, ours = start.half(), [start.clone(), torch.zeros(count), torch.zeros(count)]
    betas, others = (ADAMW["beta1"], ADAMW["beta2"]), {k: v for k, v in ADAMW.items() if not k.startswith("beta")}
    exact, plain = (torch.nn.Parameter(start.to(kind, copy=True)) for kind in (torch.float64, torch.float32))
    optimizers = [torch.optim.AdamW([p], betas=betas, **others) for p in (exact, plain)]
    for step in range(1, 6):
        grad = (torch.randn(count, generator=generator) * 10.0 ** (step - 3)).to(dtype)
        factor = torch.rand((), generator=generator)
        adamw.adamw_(ours[0], grad, ours[1], ours[2], weight, factor, None, **ADAMW, step=step, key=0, first=0)
        for parameter, other in zip((exact, plain), optimizers, strict=True):
            parameter.grad = grad.to(parameter.dtype) * factor
            other.step()
        assert torch.equal(weight, ours[0].half())
        for mine, key in zip(ours, (None, "exp_avg", "exp_avg_sq"), strict=True):
            truth, other = (p.detach() if key is None else o.state[p][key]
                            for p, o in zip((exact, plain), optimizers, strict=True))
            assert (mine.double() - truth).norm() <= 2 * (other.double() - truth).norm() + 1e-6 * truth.norm()
    before = weight.clone()
    adamw.adamw_(ours[0], grad, ours[1], ours[2], None, factor, None, **ADAMW, step=6, key=0, first=0)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("is_split", [False, True])
@pytest.mark.parametrize(("kind", "shape"), [("float32", (3, 700)), ("bfloat16", (3, 700)), ("int8", (3, 700)),
                                             ("int8", (9, 33)), ("int8", (2, 1024))])
def test_adamw_on_cheaper_state_equals_plain_pytorch(kind: str, shape: tuple[int, int], is_split: bool):
    generator = torch.Generator().manual_seed(0)
    start, found = torch.randn(shape, generator=generator), []
    grads = torch.randn(3, *shape, generator=generator) * torch.randn(3, *shape, generator=generator).exp()
    for step_of in (adamw.adamw_, optimizer_reference.adamw_):
        moments, (weight, low) = optimizer.new_moments(start, kind), (x.clone() for x in optimizer.split(start))
        master = low if is_split else start.clone()
        mean, square, *scales = moments.values()
        for step, grad in enumerate(grads, 1):
            step_of(master, grad, mean, square, weight if is_split else None, torch.tensor(0.7), tuple(scales) or None,
                    **ADAMW, step=step, key=7919 * step, first=5)
        moments = [mean.float(), square.float()]
        if scales:
            moments = [formats.dequantize(*pair) for pair in zip((mean, square), scales, strict=True)]
        found.append((optimizer.join(weight, master) if is_split else master, *moments))
    for mine, other in zip(*found, strict=True):
        close = (mine - other).abs() <= 1e-6 + 1e-5 * other.abs()
        assert close.float().mean() > 0.998  # a number halfway between two codes or bf16 numbers goes either way
        torch.testing.assert_close(mine, other, rtol=0.2, atol=1e-4)


def counted(monkeypatch: pytest.MonkeyPatch, module) -> list:
    """The grids of a module's launches from now on; kernels for many tensors run on those of the CPU."""
    grids, launch = [], module.launch
    monkeypatch.setattr(module, "launch", lambda kernel, grid, *rest, **options: (
        grids.append(tuple(grid)), launch(kernel, grid, *rest, **options))[1])
    monkeypatch.setattr(many, "on_gpu", lambda x: True)
    return grids


MANY = [(9, 700), (64,), (0,), (3, 33), (2, 1024), (5,), (4, 64)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("kind", "is_split", "launches"), [
    ("float32", False, 2), ("float32", True, 2), ("bfloat16", False, 4), ("int8", False, 4), ("int8", True, 4)])
def test_adamw_on_many_tensors_gives_the_bits_of_a_launch_each(monkeypatch, kind, is_split, launches, dtype):
    """Whole and ragged sizes; a tensor that is a slice; gradients that move from step to step, also to addresses
    that wide loads cannot take."""
    generator, found = torch.Generator().manual_seed(0), []
    starts = [torch.randn(shape, generator=generator) for shape in MANY]
    grads = [[torch.randn(x.numel() + 1, generator=generator).to(dtype)[step % 2:][:x.numel()].view_as(x)
              for x in starts] for step in range(3)]
    grids = counted(monkeypatch, adamw)
    options = {"lr": 1e-2, "eps": 1e-8, "weight_decay": 0.1}
    for at_once in (False, True):
        states = []
        for i, start in enumerate(starts):
            weight, low = (x.clone() for x in optimizer.split(start))
            mean, square, *scales = optimizer.new_moments(start, kind).values()
            has_weight = is_split or dtype == torch.bfloat16
            states.append(optimizer.State(low if is_split else start.clone(), mean, square,
                                          weight if has_weight else None, tuple(scales) or None, 7 * i, i + 3))
        together, factor = optimizer.AdamW(states), torch.tensor(0.7)
        grids.clear()
        for step, mine in enumerate(grads, 1):
            if at_once:
                together.step(mine, factor, betas=(0.9, 0.95), step=step, **options)
                continue
            for state, grad in zip(states, mine, strict=True):
                adamw.adamw_(state.master, grad, state.exp_avg, state.exp_avg_sq, state.weight, factor, state.scales,
                             beta1=0.9, beta2=0.95, step=step, key=optimizer.key_of(step, state.number),
                             first=state.first, **options)
        found.append([x for s in states for x in (s.master, s.exp_avg, s.exp_avg_sq, s.weight, *(s.scales or ()))])
    assert len(grids) == 3 * launches and sum(math.prod(grid) for grid in grids) >= 3 * len(MANY[:2] + MANY[3:])
    assert all(x is y is None or torch.equal(x, y) for x, y in zip(*found, strict=True))
    assert not torch.equal(found[0][0], optimizer.split(starts[0])[1] if is_split else starts[0])


@pytest.mark.parametrize("seed", [0, 2**31 - 1, 2**31, 2**32 - 1])
def test_the_key_of_a_tensor_is_that_of_key_of(monkeypatch, seed):
    monkeypatch.setattr(many, "on_gpu", lambda x: True)
    monkeypatch.setattr(many, "mix", lambda *_: seed)
    found, grad = [], torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    for at_once in (False, True):
        state = optimizer.State(torch.ones(2, 64), *optimizer.new_moments(grad, "bfloat16").values(), number=11)
        if at_once:
            optimizer.AdamW([state]).step([grad], torch.ones(()), lr=0.1, betas=(0.9, 0.9), eps=1e-8, weight_decay=0.0,
                                          step=1)
        else:
            adamw.adamw_(state.master, grad, state.exp_avg, state.exp_avg_sq, None, torch.ones(()), None, 0.1, 0.9, 0.9,
                         1e-8, 0.0, 1, formats.mix(seed, 11) >> 1, 0)
        found.append(state.exp_avg)
    assert torch.equal(*found)


def test_gradients_are_added_in_one_launch(monkeypatch):
    """bf16 into fp32, as copy_ and add_ do it; some have none."""
    grids, generator = counted(monkeypatch, sums), torch.Generator().manual_seed(0)
    found = [torch.full(shape, 7.0) for shape in MANY]
    expected, adder = [x.clone() for x in found], optimizer.Sums(found)
    for overwrite, missing in ((True, 3), (False, 1), (False, None), (True, None)):
        grads = [None if i == missing else torch.randn(shape, generator=generator).bfloat16()
                 for i, shape in enumerate(MANY)]
        adder.add(grads, overwrite)
        for total, grad in zip(expected, grads, strict=True):
            total.copy_(total * (not overwrite) + (0 if grad is None else grad.float()))
        assert all(map(torch.equal, found, expected))
    assert len(grids) == 4


def test_launches_run_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch):
    order = []

    class Tensor:
        is_cuda, device = True, torch.device("cuda:1")

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **options: order.append((grid, len(arguments), options))

    @contextmanager
    def current(device):
        order.append(device)
        yield
        order.append("left")

    monkeypatch.setattr(torch.cuda, "device", current)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    _triton.launch(Kernel(), (2, 3), Tensor(), 5, BLOCK=1)
    assert order == [torch.device("cuda:1"), ((2, 3), 2, {"BLOCK": 1}), "left"]
    _triton.launch(Kernel(), (0, 3), Tensor())
    assert len(order) == 3, "an empty grid launches nothing"
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    _triton.launch(Kernel(), (2, 3), Tensor(), 5, BLOCK=1)
    assert order[3:] == order[1:2], "on the current device there is nothing to change"
    sources = [path.read_text() for path in Path(_triton.__file__).parent.glob("*.py")]
    assert not any("_kernel[" in text for text in sources), "every launch goes through launch()"
