"""csrc/cpu_cached.cpp: decode attention over the KV cache on the CPU."""

from functools import lru_cache

import pytest
import torch
from torch import Tensor

from strop.kernels import _cpu
from strop.kernels.attention import cached, reference

pytestmark = pytest.mark.usefixtures("library")

BF16 = _cpu._loaded == "avx512_bf16"  # the library's products are of bf16
CHUNKS = torch.tensor([[0, 32], [32, 32], [64, 64], [128, 128]])
PLACES = {  # group, seen, length of each token
    "one token": [(0, 1, -1)],
    "a token after nothing": [(0, 0, 0)],
    "a prompt": [(1, s, -1) for s in range(1, 131)],
    "prompts": [(g, s, -1) for g, n in ((2, 40), (0, 3), (1, 150)) for s in range(n - 2 * g, n + 1)],
    "completions": [(i % 3, (7, 150, 129)[i % 3], i * 9) for i in range(28)],
    "one prompt's": [(0, 150, i % 5) for i in range(64)],
    "both": [(0, 5, -1), (1, 33, 31), (0, 6, -1), (1, 33, 32), (2, 16, 128)],
}
HOW = {
    "plain": {},
    "sharp": {"scale": 3.0},
    "soft-cap": {"softcap": 2.0},
    "wide soft-cap": {"softcap": 50.0},
    "window": {"window": 20},
    "narrow": {"window": 1},
    "both": {"softcap": 5.0, "window": 100},
}


def _inputs(places: list[tuple], heads: int, kv_heads: int, size: int, dtype=torch.bfloat16) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    places = torch.tensor(places)
    q, k, v = (torch.randn(len(places), n, size).transpose(0, 1) for n in (heads, kv_heads, kv_heads))
    prompts = (torch.randn(3, kv_heads, 150, size) for _ in range(2))
    completions = (torch.randn(len(places) * kv_heads * 256, size) for _ in range(2))
    return *(x.to(dtype) for x in (q, k, v, *prompts, *completions)), CHUNKS, *places.T.contiguous()


@lru_cache(maxsize=1)
def _stored(places: str, *sizes: int) -> tuple[Tensor, ...]:
    """_inputs, to be copied: the same for each way of HOW."""
    return _inputs(PLACES[places], *sizes)


def _copies(inputs: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    return *(x.to(dtype, copy=True) for x in inputs[:7]), *inputs[7:]


SIZES = [(9, 3, 64), (4, 4, 32), (70, 1, 48), (2, 1, 256)]


# but for the first size, by default plain and one other way of HOW for each of PLACES
@pytest.mark.parametrize(("heads", "kv_heads", "size", "places", "how"), [
    pytest.param(*size, places, how, marks=[pytest.mark.slow] * (size != SIZES[0] and j not in (0, i % len(HOW))))
    for size in SIZES for i, places in enumerate(PLACES) for j, how in enumerate(HOW)])
def test_error_is_at_most_twice_that_of_plain_pytorch(heads: int, kv_heads: int, size: int, places: str, how: str):
    inputs, how = _stored(places, heads, kv_heads, size), {"scale": size**-0.5, **HOW[how]}
    assert cached.takes(*inputs[:3])
    stored, plainly_stored = _copies(inputs, torch.bfloat16), _copies(inputs, torch.bfloat16)
    truth = reference.attention_over_cache(*_copies(inputs, torch.float64), **how)
    plain = reference.attention_over_cache(*plainly_stored, **how)
    ours = cached.attention_over_cache(*stored, **how)
    assert (ours - truth).norm() <= 2 * (plain - truth).norm()
    assert all(torch.equal(a, b) for a, b in zip(stored[3:7], plainly_stored[3:7], strict=True))


@pytest.mark.skipif(BF16, reason="fp32 is PyTorch's where bf16 is multiplied")
@pytest.mark.parametrize("how", HOW)
def test_fp32(how: str):
    inputs, how = _inputs(PLACES["completions"], 9, 3, 64, torch.float32), {"scale": 0.3, **HOW[how]}
    assert cached.takes(*inputs[:3])
    truth = reference.attention_over_cache(*_copies(inputs, torch.float64), **how)
    plain = reference.attention_over_cache(*_copies(inputs, torch.float32), **how)
    error = (cached.attention_over_cache(*inputs, **how) - truth).norm()
    lone = 1e-7 * truth.norm() * (how.get("window") == 1)  # of one key PyTorch's softmax is exact
    assert error <= 2 * (plain - truth).norm() + lone


def test_what_it_does_not_take():
    q, k, v = _inputs(PLACES["both"], 4, 2, 64)[:3]
    assert cached.takes(q, k, v)
    assert not cached.takes(*(x[..., :16] for x in (q, k, v)))
    assert not cached.takes(*(x[..., :40] for x in (q, k, v)))
    assert not cached.takes(q.half(), k.half(), v.half())
    assert cached.takes(q.float(), k.float(), v.float()) != BF16


def test_a_tokens_bits_depend_on_no_other_and_on_no_thread():
    inputs = _inputs(PLACES["completions"], 6, 2, 64)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(cached.attention_over_cache(*_copies(inputs, torch.bfloat16), scale=0.2))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)
    few = (*(x[:, :5] for x in inputs[:3]), *inputs[3:8], *(x[:5].contiguous() for x in inputs[8:]))
    assert torch.equal(cached.attention_over_cache(*few, scale=0.2), found[0][:5])


def test_any_strides():
    inputs = _inputs(PLACES["both"], 6, 2, 32)
    expected = cached.attention_over_cache(*inputs, scale=0.2)
    for other in (lambda x: x.contiguous(), lambda x: x.mT.contiguous().mT):
        again = (*(other(x) for x in inputs[:3]), *inputs[3:])
        assert torch.equal(cached.attention_over_cache(*again, scale=0.2), expected)


@pytest.mark.parametrize("place", [(3, 5, -1), (-1, 5, -1), (0, 151, -1), (0, -1, 3), (0, 0, -1), (0, 5, 256)])
def test_a_place_outside_of_the_cache_raises(place: tuple):
    with pytest.raises(RuntimeError, match="outside of the cache"):
        cached.attention_over_cache(*_inputs([(0, 5, 2), place], 4, 2, 32), scale=0.2)


def test_tensors_that_do_not_fit_raise():
    inputs = _inputs(PLACES["both"], 4, 2, 32)
    with pytest.raises(RuntimeError, match="do not belong together"):
        cached.attention_over_cache(inputs[0][:3], *inputs[1:], scale=0.2)
    with pytest.raises(RuntimeError, match="prompt_v"):
        cached.attention_over_cache(*inputs[:4], inputs[4][:, :, :9], *inputs[5:], scale=0.2)
    with pytest.raises(RuntimeError, match="completion_v"):
        cached.attention_over_cache(*inputs[:6], inputs[6][1:], *inputs[7:], scale=0.2)
    with pytest.raises(RuntimeError, match="chunks"):
        cached.attention_over_cache(*inputs[:7], CHUNKS[1:], *inputs[8:], scale=0.2)
