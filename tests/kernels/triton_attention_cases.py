"""Attention kernels under Triton's interpreter; test_triton.py runs this file with TRITON_INTERPRET=1."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strop.kernels import Group, PackedGroups
from strop.kernels._triton import attention_launch as kernels
from strop.kernels.attention import reference
from strop.kernels.layout import TILE


def _group(prompt: int, *completions: int) -> Group:
    return Group([1] * prompt, [[2] * n for n in completions])


# Completions that end within a block, groups of one token, no prompt; a prompt of more than a tile.
GROUPS = [_group(70, 20, 45, 1), _group(0, 3, 20), _group(1, 1)]
LONG = _group(130, 9, 2)


def _qkv(groups: PackedGroups, heads: int, key_heads: int, size: int, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = [(1, groups.num_tokens, n, size) for n in (heads, key_heads, key_heads)]
    return [torch.randn(shape).to(dtype).transpose(1, 2) for shape in shapes]


def _run(
    qkv, grad_out, groups, scale, window, cap, monkeypatch, queries: int, keys: int, **more
) -> list[torch.Tensor]:
    monkeypatch.setattr(kernels, "blocks", lambda *_: kernels.Blocks(queries, keys, 4, 2, **more))
    layout = (groups.tiles, groups.readers_end, groups.position_ids, scale, window, cap)
    out, lse = kernels.forward(*qkv, *layout)
    return [out, *kernels.backward(grad_out, *qkv, out, lse, *layout)]


def _reference(qkv, grad_out, groups, scale, window, cap, dtype: torch.dtype) -> list[torch.Tensor]:
    qkv = [x.to(dtype).requires_grad_() for x in qkv]
    options = {"scale": scale, "sliding_window": window or None, "softcap": cap or None}
    out = reference.prefix_attention(*qkv, groups, **options)
    return [out.detach(), *torch.autograd.grad(out, qkv, grad_out.to(dtype))]


@pytest.mark.parametrize(
    ("heads", "key_heads", "size", "window", "cap", "queries", "keys", "more"),
    [
        (2, 1, 16, 0, 0.0, 32, 32, {"edge": 16}),
        (2, 2, 24, 13, 0.0, 32, 16, {}),
        (3, 1, 32, 0, 2.0, 64, 32, {"tma": True, "edge": 32}),
        (2, 1, 16, 40, 3.0, 32, 64, {}),
        (2, 1, 80, 0, 0.0, TILE, 64, {}),
        (1, 1, 16, 100, 0.0, 64, TILE, {"tma": True, "edge": 32}),
    ],
)
def test_fp32_equals_the_reference(heads, key_heads, size, window, cap, queries, keys, more, monkeypatch):
    groups = PackedGroups.pack([*GROUPS, LONG] if TILE in (queries, keys) else GROUPS)
    qkv = _qkv(groups, heads, key_heads, size, torch.float32)
    grad_out = torch.randn_like(qkv[0])
    case = (qkv, grad_out, groups, 0.3, window, cap)
    ours, truth = _run(*case, monkeypatch, queries, keys, **more), _reference(*case, torch.float64)
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("window", "cap"), [(0, 0.0), (9, 2.0)])
def test_gradients_of_keys_and_values_in_launches_of_their_own(window, cap, monkeypatch):
    """As on sm_90 at head size 256: the same bits."""
    groups = PackedGroups.pack([_group(35, 9, 2), *GROUPS[1:]])
    qkv = _qkv(groups, 2, 1, 32, torch.float32)
    case = (qkv, torch.randn_like(qkv[0]), groups, 0.2, window, cap)
    together = _run(*case, monkeypatch, 32, 32)
    names = []
    monkeypatch.setattr(kernels, "grad_kv_launches", lambda *_: names.append(1) or ("grad_k", "grad_v"))
    apart = _run(*case, monkeypatch, 32, 32)
    assert names and all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))


def test_loads_by_tma_give_the_same_bits(monkeypatch):
    groups = PackedGroups.pack([_group(36, 14), _group(1, 1)])
    qkv = _qkv(groups, 1, 1, 24, torch.float32)
    case = (qkv, torch.randn_like(qkv[0]), groups, 0.2, 0, 0.0)
    described, make = [], kernels.TensorDescriptor
    monkeypatch.setattr(kernels, "TensorDescriptor", lambda x, *rest: described.append(x.data_ptr()) or make(x, *rest))
    plain = _run(*case, monkeypatch, 32, 16)
    assert not described
    ours = _run(*case, monkeypatch, 32, 16, tma=True)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    q, k, v = (x.data_ptr() for x in qkv)
    assert len(described) == 7 and described[:6] == [k, v, k, v, case[1].data_ptr(), q]
    described.clear()
    qkv[1] = _shifted(qkv[1])
    ours = _run(*case, monkeypatch, 32, 16, tma=True)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    v = case[0][2].data_ptr()
    assert described[:4] == [v, v, case[1].data_ptr(), q], "an address that no descriptor can have"


def _shifted(x: torch.Tensor) -> torch.Tensor:
    """The same values 8 bytes off."""
    found = torch.empty(x.numel() + 2)[2:].as_strided(x.shape, x.stride(), 2)
    return found.copy_(x)


def test_launches_by_device():
    assert kernels.grad_kv_launches(256, 2, 9) == ("grad_k", "grad_v")
    for case in ((128, 2, 9), (256, 2, 8), (256, 2, 10), (256, 4, 9), (256, 2, None)):
        assert kernels.grad_kv_launches(*case) == ("grad_kv",)


@pytest.mark.parametrize(("window", "cap"), [(0, 0.0), (9, 2.0)])
def test_fp16_error_is_at_most_twice_that_of_plain_pytorch(window, cap, monkeypatch):
    """Not bf16: the interpreter multiplies it wrongly."""
    groups = PackedGroups.pack(GROUPS)
    qkv = _qkv(groups, 2, 1, 32, torch.float16)
    case = (qkv, torch.randn_like(qkv[0]), groups, 0.2, window, cap)
    truth, plain = (_reference(*case, dtype) for dtype in (torch.float64, torch.float16))
    for a, b, c in zip(_run(*case, monkeypatch, 32, 32), plain, truth, strict=True):
        assert (a - c).norm() <= 2 * (b - c).norm()


@settings(max_examples=3, deadline=None)
@given(
    lengths=st.lists(
        st.tuples(st.integers(0, 40), st.lists(st.integers(1, 30), min_size=1, max_size=4)), min_size=1, max_size=3
    ),
    window=st.sampled_from([0, 1, 7]),
)
def test_shapes(lengths, window: int):
    groups = PackedGroups.pack([_group(prompt, *completions) for prompt, completions in lengths])
    qkv = _qkv(groups, 1, 1, 16, torch.float32)
    case = (qkv, torch.randn_like(qkv[0]), groups, 0.25, window, 0.0)
    with pytest.MonkeyPatch.context() as patch:
        ours = _run(*case, patch, 32, 16)
    for a, b in zip(ours, _reference(*case, torch.float32), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("prompt", "row_stride", "head_stride"), [(280, 1 << 23, 16), (9, 288, 1 << 30)])
def test_offsets_pass_two_to_the_31(prompt: int, row_stride: int, head_stride: int, monkeypatch):
    """Rows or heads more than 2^31 elements apart; only the rows' own pages are touched."""
    groups = PackedGroups.pack([_group(prompt, 5, 3)])
    heads, tokens, size = 3, groups.num_tokens, 16
    storage = torch.empty((tokens - 1) * row_stride + (heads - 1) * head_stride + 3 * heads * size, dtype=torch.float16)
    shape, strides = (1, heads, tokens, size), (1, head_stride, row_stride, 1)
    far = [storage.as_strided(shape, strides, heads * size * i) for i in range(3)]
    near = _qkv(groups, heads, heads, size, torch.float16)
    for x, y in zip(far, near, strict=True):
        x.copy_(y)
    case = (torch.randn_like(near[0]), groups, 0.25, 0, 0.0, monkeypatch, TILE, 64)
    torch.testing.assert_close(_run(far, *case), _run(near, *case), rtol=0, atol=0)
