"""Attention on a GPU: every backend against fp64 in every dtype, without synchronization, deterministic."""

import pytest
import torch

from strop.kernels import Group, PackedGroups, prefix_attention
from strop.kernels.attention import reference, varlen
from strop.kernels.attention.prefix import BACKENDS, _unable

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def _group(prompt: int, *completions: int) -> Group:
    return Group([1] * prompt, [[2] * n for n in completions])


# Longer than a tile, cut within blocks, of one token, without a prompt.
GROUPS = [_group(300, 64, 200, 1, 129), _group(0, 3, 140), _group(1, 1), _group(40, 500), _group(129, *[31] * 8)]


def _qkv(groups: PackedGroups, heads: int, key_heads: int, size: int, dtype: torch.dtype) -> list[torch.Tensor]:
    draw = torch.Generator("cuda").manual_seed(0)
    shapes = [(1, groups.num_tokens, n, size) for n in (heads, key_heads, key_heads)]
    drawn = (torch.randn(shape, generator=draw, device="cuda").to(dtype) for shape in shapes)
    return [x.transpose(1, 2).requires_grad_() for x in drawn]


def _results(function, qkv, groups, upstream, **options) -> list[torch.Tensor]:
    out = function(*qkv, groups, **options)
    return [out, *torch.autograd.grad(out, qkv, upstream.to(out.dtype))]


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Every head size and dtype, and what bends the scores where registers are tightest.
PLAIN = [(size, dtype, {}) for size in (32, 64, 80, 96, 128, 256) for dtype in (BF16, FP16, FP32)]
BENT = [{"sliding_window": 100}, {"softcap": 3.0}, {"sliding_window": 33, "softcap": 5.0}]


@pytest.mark.parametrize(
    ("size", "dtype", "options"), [*PLAIN, *((size, BF16, options) for size in (64, 256) for options in BENT)], ids=str
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_error_is_at_most_twice_that_of_plain_pytorch(backend: str, size: int, dtype: torch.dtype, options: dict):
    groups = PackedGroups.pack(GROUPS).to("cuda")
    qkv = _qkv(groups, 4, 2, size, dtype)
    if reason := _unable(backend, qkv[0], qkv[2], options.get("softcap", 0.0)):
        pytest.skip(reason)
    upstream = torch.randn_like(qkv[0])
    exact = [x.detach().double().requires_grad_() for x in qkv]
    truth = _results(reference.prefix_attention, exact, groups, upstream, **options)
    plain = _results(reference.prefix_attention, qkv, groups, upstream, **options)
    ours = _results(prefix_attention, qkv, groups, upstream, backend=backend, **options)
    for a, b, c in zip(ours, plain, truth, strict=True):
        assert (a.double() - c).norm() <= 2 * (b.double() - c).norm()


@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_nothing_waits_for_the_device(backend: str | None):
    groups = PackedGroups.pack(GROUPS).pin_memory()
    qkv = _qkv(groups, 4, 4, 64, torch.bfloat16)
    if backend and (reason := _unable(backend, qkv[0], qkv[2], 0.0)):
        pytest.skip(reason)
    upstream = torch.randn_like(qkv[0])
    moved = groups.to("cuda")
    _results(prefix_attention, qkv, moved, upstream, backend=backend)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        moved = groups.to("cuda", non_blocking=True)
        _results(prefix_attention, qkv, moved, upstream, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_give_identical_bits(backend: str):
    groups = PackedGroups.pack(GROUPS).to("cuda")
    qkv = _qkv(groups, 6, 2, 128, torch.bfloat16)
    if reason := _unable(backend, qkv[0], qkv[2], 0.0):
        pytest.skip(reason)
    upstream = torch.randn_like(qkv[0])
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(backend in ("varlen", "sdpa"))  # these two leave it to the setting
    try:
        first, second = (_results(prefix_attention, qkv, groups, upstream, backend=backend) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(before)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_compiled_in_one_graph():
    groups = PackedGroups.pack(GROUPS).to("cuda")
    qkv = _qkv(groups, 4, 2, 64, torch.bfloat16)
    upstream = torch.randn_like(qkv[0])
    compiled = torch.compile(prefix_attention, fullgraph=True)
    results = [_results(f, qkv, groups, upstream) for f in (compiled, prefix_attention)]
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_long_prompts_of_many_completions():
    """As benchmarked: against SDPA on separate rows, one head at a time."""
    groups = PackedGroups.pack([_group(4096, *[128] * 8)]).to("cuda")
    qkv = _qkv(groups, 4, 1, 128, torch.bfloat16)
    upstream = torch.randn_like(qkv[0])
    ours, segments = (
        _results(prefix_attention, qkv, groups, upstream, backend=backend) for backend in ("triton", "sdpa")
    )
    for a, b in zip(ours, segments, strict=True):
        assert (a - b).float().norm() <= 1e-2 * b.float().norm()


def test_the_backends_that_should_be_here_are():
    q = torch.empty(1, 2, 4, 64, device="cuda", dtype=torch.bfloat16)
    if torch.cuda.get_device_capability()[0] >= 8:
        assert _unable("triton", q, q, 0.0) is None
        assert varlen.unable("varlen", q, q, 0.0) is None
