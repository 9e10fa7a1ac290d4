"""csrc/cpu_attention.cpp: prefix_attention on the CPU, beyond test_attention.py."""

import pytest
import torch

from strop.kernels import Group, PackedGroups, _cpu, prefix_attention
from strop.kernels.attention import cpu, reference

pytestmark = pytest.mark.usefixtures("library")

GROUPS = {
    "odd": [Group([1] * 7, [[2] * 5, [3]]), Group([1] * 65, [[2] * 64, [3] * 129]), Group([], [[1], [2] * 3])],
    "one token": [Group([], [[1]])],
    # more queries than one thread takes, in the prompt and in later completions
    "slices": [Group([1] * 1100, [[2] * 700, [3] * 30, [4] * 600]), Group([1] * 9, [[2] * 2200])],
    "many completions": [Group([1] * 33, [[2] * (1 + i % 7) for i in range(64)])],
}


def _qkv(groups: PackedGroups, heads: int, kv_heads: int, size: int, dtype=torch.bfloat16) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = [(1, groups.num_tokens, n, size) for n in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape).to(dtype).transpose(1, 2).requires_grad_() for shape in shapes]


def _results(function, qkv, groups, upstream) -> list[torch.Tensor]:
    out = function(*qkv, groups)
    return [out.detach(), *torch.autograd.grad(out, qkv, upstream)]


@pytest.mark.parametrize(
    ("name", "heads", "kv_heads", "size"),
    [
        ("odd", 6, 2, 32),
        ("odd", 3, 3, 48),
        ("odd", 4, 2, 80),
        ("odd", 2, 1, 256),
        ("odd", 70, 1, 32),
        ("one token", 2, 1, 64),
        ("slices", 2, 1, 32),
        ("many completions", 9, 3, 64),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_error_is_at_most_twice_that_of_plain_pytorch(name: str, heads: int, kv_heads: int, size: int, dtype):
    groups = PackedGroups.pack(GROUPS[name])
    low = _qkv(groups, heads, kv_heads, size, dtype)
    if dtype == torch.float32 and not _cpu.multiplies(*low):
        pytest.skip("fp32 is PyTorch's where bf16 is multiplied")
    assert _cpu.multiplies(*low)
    high = [x.detach().double().requires_grad_() for x in low]
    upstream = torch.randn(1, heads, groups.num_tokens, size).to(dtype)
    truths = _results(reference.prefix_attention, high, groups, upstream.double())
    ours, plain = (
        [(a.double() - b).norm() for a, b in zip(_results(f, low, groups, upstream), truths, strict=True)]
        for f in (prefix_attention, reference.prefix_attention)
    )
    for our, other, truth in zip(ours, plain, truths, strict=True):
        # a lone token has no gradient of q and k, but for what rounding leaves
        assert our <= 2 * other + 1e-3 * truth.numel() ** 0.5 * (name == "one token")


def test_any_strides():
    groups = PackedGroups.pack(GROUPS["odd"])
    qkv = _qkv(groups, 6, 2, 32)
    upstream = torch.randn(1, 6, groups.num_tokens, 32).bfloat16()
    expected = _results(prefix_attention, qkv, groups, upstream)
    for other in (lambda x: x.contiguous(), lambda x: x.mT.contiguous().mT):
        again = [other(x.detach()).requires_grad_() for x in qkv]
        for a, b in zip(expected, _results(prefix_attention, again, groups, other(upstream)), strict=True):
            assert torch.equal(a, b)


def test_bits_do_not_depend_on_the_number_of_threads():
    groups = PackedGroups.pack([*GROUPS["odd"], *GROUPS["slices"]])
    qkv = _qkv(groups, 4, 2, 32)
    upstream = torch.randn(1, 4, groups.num_tokens, 32).bfloat16()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(_results(prefix_attention, qkv, groups, upstream))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_what_is_not_finite_stays_in_its_group():
    groups = PackedGroups.pack(GROUPS["odd"])
    qkv = _qkv(groups, 6, 2, 32)
    upstream = torch.randn(1, 6, groups.num_tokens, 32).bfloat16()
    expected = _results(prefix_attention, qkv, groups, upstream)
    start, end = groups.prompt_bounds[1][0], groups.completion_bounds[3][1]
    broken = [x.detach().clone() for x in (*qkv, upstream)]
    for x in broken:
        x[:, :, start:end] = torch.nan
    found = _results(prefix_attention, [x.requires_grad_() for x in broken[:3]], groups, broken[3])
    for a, b in zip(expected, found, strict=True):
        assert b[:, :, start:end].isnan().all()
        rest = [*range(start), *range(end, groups.num_tokens)]
        assert torch.equal(a[:, :, rest], b[:, :, rest])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda q, k, v: (q[..., :24], k[..., :24], v[..., :24]), "no multiple of 16"),
        (lambda q, k, v: (q, k[:, 1:], v), "do not belong together"),
        (lambda q, k, v: (q, k.float(), v), "expected bf16"),
    ],
)
def test_what_the_operator_cannot_take_raises(spoil, message: str):
    groups = PackedGroups.pack(GROUPS["odd"])
    q, k, v = spoil(*(x.detach()[0] for x in _qkv(groups, 6, 2, 32)))
    tables = cpu._tables(groups.prompt_bounds, groups.completion_bounds, groups.completion_group)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2])
    with pytest.raises(RuntimeError, match=message):
        torch.ops.strop.cpu_prefix_attention(q, k, v, tables.segments, tables.blocks, 1.0, out, lse)


def test_blocks_of_other_tokens_raise():
    groups = PackedGroups.pack(GROUPS["odd"])
    q, k, v = (x.detach()[0] for x in _qkv(groups, 6, 2, 32))
    tables = cpu._tables(groups.prompt_bounds, groups.completion_bounds, groups.completion_group)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2])
    for blocks in (tables.blocks + 1, tables.blocks - 1):
        with pytest.raises(RuntimeError, match="not of these tokens"):
            torch.ops.strop.cpu_prefix_attention(q, k, v, tables.segments, blocks, 1.0, out, lse)
