"""AdamW on the CPU against fp64 and against torch.optim.AdamW with clipping, over several steps; cheaper forms of its
state."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from strop.kernels import optimizer
from strop.kernels.optimizer import formats

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


# -- cheaper forms of the state ---------------------------------------------------------------------------------------

BITS = st.integers(-(1 << 31), (1 << 31) - 1)
TIE = 0x8000  # low half of a number halfway between two bf16 numbers


def of_bits(bits: list[int]) -> torch.Tensor:
    return torch.tensor(bits, dtype=torch.int32).view(torch.float32)


@given(st.lists(BITS, min_size=1, max_size=64))
@example([0, -(1 << 31), 0x7F800000, 0x7FC00001, 0x7F7FFFFF, 1, 0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001])
def test_a_split_master_keeps_every_bit_and_its_weight_is_the_nearest(bits):
    master = of_bits(bits)
    weight, low = optimizer.split(master)
    assert weight.dtype == torch.bfloat16 and low.dtype == torch.int16
    assert torch.equal(optimizer.join(weight, low).view(torch.int32), master.view(torch.int32))
    is_tie = (master.view(torch.int32) & 0xFFFF) == TIE
    usual = master.isfinite() & ~is_tie
    assert torch.equal(weight[usual], master[usual].bfloat16())
    assert (weight[is_tie].float().abs() > master[is_tie].abs())[master[is_tie].isfinite()].all()


def grads_of(shape, steps: int, spread: float = 1.0) -> list[torch.Tensor]:
    """bf16 gradients of very different sizes."""
    draw = torch.Generator().manual_seed(0)
    return [(torch.randn(shape, generator=draw) * (spread * torch.randn(shape, generator=draw)).exp()).bfloat16()
            for _ in range(steps)]


def after(start, grads, kind="float32", is_split=False, betas=(0.9, 0.95), first=0):
    """(master, weight, moments) after a step of each gradient."""
    weight, low = (x.clone() for x in optimizer.split(start))
    master, moments = start.clone(), optimizer.new_moments(start, kind)
    mean, square, *scales = moments.values()
    for step, grad in enumerate(grads, 1):
        optimizer.adamw_(low if is_split else master, grad, mean, square, weight, torch.tensor(0.7), step=step,
                         scales=tuple(scales) or None, key=7919 * step, first=first, **OPTIONS | {"betas": betas})
    return optimizer.join(weight, low) if is_split else master, weight, moments


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_split_masters_are_bit_for_bit_those_of_fp32(csrc, kind):
    start, grads = torch.randn(9, 700).bfloat16().float(), grads_of((9, 700), 5)
    (master, weight, moments), (other, high, others) = (after(start, grads, kind, split) for split in (False, True))
    assert torch.equal(master, other) and torch.equal(high, optimizer.split(master)[0])
    assert all(torch.equal(moments[name], others[name]) for name in moments)
    assert torch.equal(weight, master.bfloat16())


@pytest.mark.parametrize(("kind", "allowed"), [("bfloat16", 0.005), ("int8", 0.03)])
def test_smaller_moments_move_the_master_as_fp32_ones_do(csrc, kind, allowed):
    """The way of ten steps, against fp64; and a row at a time, as on ranks of their own."""
    start, grads = torch.randn(6, 700), grads_of((6, 700), 10, 0.5)
    master, _, moments = after(start, grads, kind)
    truth = (start.double(), torch.zeros(6, 700).double(), torch.zeros(6, 700).double())
    for step, grad in enumerate(grads, 1):
        truth = reference(truth[0], grad.double() * 0.7, *truth[1:], step=step, **OPTIONS)
    assert (master - truth[0]).norm() < allowed * (start - truth[0]).norm()
    for row in range(6):
        part = after(start[row:row + 1], [g[row:row + 1] for g in grads], kind, first=700 * row)
        assert torch.equal(part[0][0], master[row])
        assert all(torch.equal(part[2][name][0], moments[name][row]) for name in moments)


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_the_second_moment_decays_at_beta2_0_999(csrc, kind):
    """Rounded to nearest in bf16 it would not: a step changes it by less than half of its last bit."""
    grads = grads_of((4, 256), 2)
    moments = after(torch.zeros(4, 256), grads + 400 * [torch.zeros(4, 256)], kind, betas=(0.9, 0.999))[2]
    found = moments["exp_avg_sq"].float()
    if kind == "int8":
        found = formats.dequantize(moments["exp_avg_sq"], moments["exp_avg_sq_scale"])
    exact = sum((g.double() * 0.7).square() * 0.001 * 0.999 ** (401 - i) for i, g in enumerate(grads))
    kept = exact > 1e-3 * exact.max()
    assert abs((found / exact)[kept].mean() - 1) < 0.02


def test_rounding_stochastically_keeps_the_mean():
    draws = torch.arange(1 << 16)
    for value in (1.0, 1.001, -3.14159, 1e-30, 255.0):
        x = torch.full((1 << 16,), value)
        found = formats.round_stochastically(x, draws)
        assert abs(found.double().mean() - x[0].double()) <= 2e-9 * abs(value) and len(found.unique()) <= 2
    halves = formats.noise(12345, 0, 1 << 16, torch.device("cpu"))
    for half in (halves & 0xFFFF, halves >> 16):
        assert abs(half.double().mean() / 65535 - 0.5) < 0.005 and 40000 < len(half.unique()) < 43000
    assert torch.equal(formats.noise(12345, 100, 50, torch.device("cpu")), halves[100:150])
    keys = {formats.key_of(step, i) for step in range(100) for i in range(100)}
    assert len(keys) > 9990 and abs(sum(keys) / len(keys) / 2**31 - 0.5) < 0.01 and max(keys) < 2**31


@given(st.integers(1, 3), st.integers(1, 600), st.floats(0, 8), st.booleans(), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_what_was_quantized_stays_as_it_is(rows, width, spread, signed, seed):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=draw) * (spread * torch.randn(rows, width, generator=draw)).exp()
    x = x * (torch.rand(rows, width, generator=draw) < 0.8)
    x = x if signed else x.abs()
    codes, scales = formats.quantize(x, signed)
    found = formats.dequantize(codes, scales)
    largest = scales.repeat_interleave(formats.BLOCK, 1)[:, :width]
    assert ((found - x).abs() <= torch.maximum(0.0072 * largest, 0.45 * x.abs())).all()
    assert torch.equal(formats.dequantize(*formats.quantize(found, signed)), found)
    assert signed or (codes > 0).all()
    if signed:
        assert torch.equal(formats.quantize(-x, True)[0], -codes)


def test_codes_are_the_nearest():
    for signed, count in ((True, formats.SIGNED), (False, formats.UNSIGNED)):
        table = formats.values(count)
        assert len(table) == 2 << count and (table.diff() > 0).all() and table[[0, -1]].tolist() == [0.0, 1.0]
        x = torch.rand(1, 255).pow(8)
        x = torch.cat([x, torch.ones(1, 1)], 1)
        codes = formats.quantize(x, signed)[0]
        nearest = (x[0, :, None].double() - table[None].double()).abs().argmin(1)
        assert torch.equal(codes[0].long(), nearest.clamp(min=0 if signed else 1))
