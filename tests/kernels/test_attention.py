from functools import cache

import pytest
import torch

from strop.kernels import Group, PackedGroups, prefix_attention
from strop.kernels.attention import reference

OPTIONS = [
    {},
    {"scale": 0.7},
    {"sliding_window": 3},
    {"sliding_window": 12},
    {"sliding_window": 1000},
    {"softcap": 2.0},
]
OPTIONS += [{"sliding_window": 4, "softcap": 5.0}]


def _groups() -> PackedGroups:
    completions = [[4, 5], [6], [7, 8, 9, 1, 2]]
    return PackedGroups.pack([Group([1, 2, 3], completions), Group([], [[1, 2], [3]]), Group([1] * 9, [[2] * 4])])


def _qkv(groups: PackedGroups, heads: int, kv_heads: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """In a model's layout: heads transposed out of [tokens, heads, size]."""
    torch.manual_seed(0)
    shapes = [(1, groups.num_tokens, n, 16) for n in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, dtype=torch.float64).to(dtype).transpose(1, 2).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
def test_equals_the_reference_in_fp64(options: dict, heads: int, kv_heads: int):
    groups = _groups()
    qkv = _qkv(groups, heads, kv_heads, torch.float64)
    out, expected = prefix_attention(*qkv, groups, **options), reference.prefix_attention(*qkv, groups, **options)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(out)
    gradients = torch.autograd.grad(out, qkv, upstream)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, qkv, upstream), rtol=1e-11, atol=1e-11)


def _long_groups() -> PackedGroups:
    """Several blocks of queries per segment, and blocks of equal size in several groups."""
    first, second = Group([1] * 250, [[2] * 61, [3] * 400, [4] * 200]), Group([1] * 250, [[2] * 61, [3]])
    return PackedGroups.pack([first, second, Group([], [[5] * 9])])


CASES = [(_groups, dtype, options) for dtype in (torch.bfloat16, torch.float16, torch.float32) for options in OPTIONS]
CASES += [
    (_long_groups, dtype, options)
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    for options in (*OPTIONS[:2], {"scale": 2.0})
]


@cache
def _case(index: int) -> tuple:
    """(errors of a function that is called like prefix_attention, those of plain PyTorch)"""
    make, dtype, options = CASES[index]
    groups = make()
    low = _qkv(groups, 6, 2, dtype)
    high = [x.detach().double().requires_grad_() for x in low]
    truth = reference.prefix_attention(*high, groups, **options)
    upstream = torch.randn_like(truth).to(dtype)
    truths = [truth.detach(), *torch.autograd.grad(truth, high, upstream.double())]

    def errors(function) -> list[float]:
        out = function(*low, groups, **options)
        values = [out, *torch.autograd.grad(out, low, upstream)]
        return [(a.double() - b).norm().item() for a, b in zip(values, truths, strict=True)]

    return errors, errors(reference.prefix_attention)


# scales change nothing in how long groups are cut
@pytest.mark.parametrize("index", [
    pytest.param(i, id="-".join((make.__name__, str(dtype), str(options))),
                 marks=[pytest.mark.slow] * (make is _long_groups and bool(options) and dtype != torch.bfloat16))
    for i, (make, dtype, options) in enumerate(CASES)])
def test_error_is_at_most_twice_that_of_plain_pytorch(csrc, index: int):
    errors, plainly = _case(index)
    for ours, plain in zip(errors(prefix_attention), plainly, strict=True):
        assert ours <= 2 * plain


@pytest.mark.parametrize("options", OPTIONS[:2], ids=str)
def test_fp32_is_exact_to_1e_5(options: dict):
    groups = _long_groups()
    low = _qkv(groups, 6, 2, torch.float32)
    high = [x.detach().double().requires_grad_() for x in low]
    truth, out = reference.prefix_attention(*high, groups, **options), prefix_attention(*low, groups, **options)
    upstream = torch.randn_like(out)
    truths = [truth, *torch.autograd.grad(truth, high, upstream.double())]
    for value, exact in zip([out, *torch.autograd.grad(out, low, upstream)], truths, strict=True):
        assert (value.double() - exact).norm() <= 1e-5 * exact.norm()


def test_no_token_sees_a_sibling_or_the_future():
    groups = _groups()
    qkv = _qkv(groups, 4, 2, torch.float64)
    out = prefix_attention(*qkv, groups)
    start, end = groups.completion_bounds[2]
    gradient = torch.autograd.grad(out[:, :, end - 2].sum(), qkv[2])[0].abs().sum((0, 1, 3))
    prompt = range(*groups.prompt_bounds[0])
    assert gradient.nonzero().flatten().tolist() == [*prompt, *range(start, end - 1)]


def test_shapes_that_do_not_fit_raise():
    groups = _groups()
    q, k, v = _qkv(groups, 4, 2, torch.float32)
    with pytest.raises(ValueError, match="q must be"):
        prefix_attention(q[:, :, 1:], k, v, groups)
    with pytest.raises(ValueError, match="same tokens"):
        prefix_attention(q, k[:, :, 1:], v, groups)
    with pytest.raises(ValueError, match="multiple"):
        prefix_attention(q[:, :3], k, v, groups)
