"""Kernels of the decode step under Triton's interpreter; test_triton.py runs this file."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from strop.kernels import draw_key
from strop.kernels import layers as plain_layers
from strop.kernels import sampling as plain_sampling
from strop.kernels._triton import decode_attention as kernels
from strop.kernels._triton import layers, sampling
from strop.kernels.attention import paged, reference


def _case(prompts, rows, heads, kv_heads, size, dtype, members=4, page=8, seed=0):
    """rows: (group, length) of each row. Pages are shuffled, unused entries of tables and pages hold garbage."""
    draw = torch.Generator().manual_seed(seed)
    need = [-(-n // page) for n in prompts] + [max(t, 0) // page + 1 for _, t in rows]
    order = torch.randperm(sum(need) + 3, generator=draw).split([*need, 3])
    tables = []
    for part in (order[: len(prompts)], order[len(prompts) : -1]):
        width = max(len(pages) for pages in part) + 1
        tables.append(torch.full((len(part), width), 1 << 20, dtype=torch.int32))
        for table, pages in zip(tables[-1], part, strict=True):
            table[: len(pages)] = pages
    tiles = []
    for g in range(len(prompts)):
        of_group = [r for r, (group, length) in enumerate(rows) if group == g]
        for at in range(0, len(of_group), members):
            tile = of_group[at : at + members]
            tiles.append(tile + [-1] * (members - len(tile)))
    tiles.append([-1] * members)
    of_rows = [g for g, _ in rows], [t for _, t in rows]
    integers = [torch.tensor(x, dtype=torch.int32) for x in (prompts, *of_rows, tiles)]
    q, k, v = (torch.randn(len(rows), n, size, generator=draw).to(dtype) for n in (heads, kv_heads, kv_heads))
    k_pages, v_pages = (torch.randn(sum(need) + 3, kv_heads, page, size, generator=draw).to(dtype) for _ in range(2))
    return [q, k, v, k_pages, v_pages], paged.Tables(*tables, *integers)


def _run(case, dtype, split=16, room=0, scale=0.3, softcap=0.0, window=0):
    tensors, tables = [x.to(dtype, copy=True) for x in case[0]], case[1]
    splits = -(-int(tables.prompt_length.max()) // split) + room, max(1, -(-int(tables.length.max()) // split)) + room
    out = kernels.decode_attention(*tensors, *tables, *splits, split, scale, softcap, window)
    return [out, *tensors[3:]]


def _truth(case, dtype=torch.float64, scale=0.3, softcap=0.0, window=0):
    tensors = [x.to(dtype, copy=True) for x in case[0]]
    out = reference.decode_attention(*tensors, case[1], scale=scale, softcap=softcap or None, window=window or None)
    return [out, *tensors[3:]]


# Prompts of more than a split, of one token; an empty completion, one that ends a page, rows that ended.
ROWS = [(0, 0), (0, 7), (2, 40), (0, 8), (1, 33), (0, -1), (0, 16), (2, -1), (0, 3)]


BENT = {"softcap": 1.5, "window": 30}
HEADS = [(4, 2, 16), (3, 1, 24), (7, 1, 40), (2, 2, 64)]


@pytest.mark.parametrize(("heads", "kv_heads", "size", "how"), [
    *((*heads, {}) for heads in HEADS[:2]), (*HEADS[1], {"softcap": 2.0}), (*HEADS[0], {"window": 12}),
    (*HEADS[2], BENT), *(pytest.param(*heads, how, marks=pytest.mark.slow) for heads in HEADS
                         for how in ({}, {"softcap": 2.0}, {"window": 12}, BENT))], ids=str)  # fmt: skip
def test_attention_in_fp32_equals_the_reference(heads, kv_heads, size, how):
    case = _case([37, 1, 16], ROWS, heads, kv_heads, size, torch.float32)
    ours, truth = _run(case, torch.float32, **how), _truth(case, **how)
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    assert (ours[0][[5, 7]] == 0).all()


@pytest.mark.parametrize("size", [16, 256])
def test_attention_in_fp16_is_no_further_from_fp64_than_plain_pytorch(size):
    case = _case([37, 1, 16], ROWS, 4, 2, size, torch.float16)
    truth, plain, ours = _truth(case), _truth(case, torch.float16), _run(case, torch.float16)
    assert (ours[0].double() - truth[0]).norm() <= 2 * (plain[0].double() - truth[0]).norm()
    assert torch.equal(ours[1], plain[1]) and torch.equal(ours[2], plain[2]), "the same keys and values are stored"


@settings(max_examples=8, deadline=None)
@given(
    prompts=st.lists(st.sampled_from([1, 7, 16, 17, 50]), min_size=1, max_size=3),
    lengths=st.lists(st.sampled_from([-1, 0, 1, 15, 16, 31, 40]), min_size=1, max_size=5),
    members=st.sampled_from([1, 2, 8]), window=st.sampled_from([0, 1, 20]), seed=st.integers(0, 9),
)
def test_attention_of_any_rows(prompts, lengths, members, window, seed):
    rows = [((i * 7 + seed) % len(prompts), length) for i, length in enumerate(lengths)]
    case = _case(prompts, rows, 2, 1, 16, torch.float32, members, seed=seed)
    for a, b in zip(_run(case, torch.float32, window=window), _truth(case, window=window), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_a_row_is_the_same_bits_whatever_runs_beside_it():
    """Other rows, other tiles, more room for parts."""
    prompts, rows = [37, 1, 16], [row for row in ROWS if row[1] >= 0]
    tensors, tables = case = _case(prompts, rows, 4, 2, 16, torch.float32, members=8)
    whole = _run(case, torch.float32, room=2)[0]
    for r, (g, _) in enumerate(rows):
        alone = paged.Tables(*tables[:3], *(x[r : r + 1] for x in tables[3:5]), torch.tensor([[0]], dtype=torch.int32))
        alone = alone._replace(own_pages=tables.own_pages[r : r + 1])
        one = [*(x[r : r + 1] for x in tensors[:3]), *tensors[3:]]
        assert torch.equal(_run((one, alone), torch.float32)[0][0], whole[r]), (r, g)


def _keys(n: int, seed: int = 0) -> torch.Tensor:
    return torch.tensor([draw_key(seed, "prompt", i) for i in range(n)])


def _drawn(logits, key, position, temperature=1.0, top_k=0, top_p=1.0) -> torch.Tensor:
    """The definition: equal logits rank by token, and the inverse of the cumulative distribution takes the token."""
    logits, vocab = logits.float(), logits.shape[-1]
    if temperature == 0:
        return logits.argmax(-1)
    order = torch.arange(vocab).expand_as(logits)
    if top_k or top_p < 1:
        logits, order = logits.sort(dim=-1, descending=True, stable=True)
    weights = ((logits - logits.amax(-1, keepdim=True)) / temperature).exp().double()
    weights[:, top_k or vocab :] = 0
    cumulative = weights.cumsum(-1)
    mass = cumulative[:, -1:]
    if top_p < 1:
        mass = cumulative.gather(-1, torch.searchsorted(cumulative, mass * top_p).clamp_(max=vocab - 1))
    at = torch.searchsorted(cumulative, plain_sampling.uniform(key, position)[:, None] * mass, right=True)
    return order.gather(-1, at.clamp_(max=vocab - 1)).squeeze(-1)


@pytest.fixture(autouse=True)
def few_candidates(monkeypatch):
    """So that short rows, too, have more; sorting takes the interpreter long."""
    monkeypatch.setattr(sampling, "CANDIDATES", 32)


HOW = [{}, {"temperature": 0.0}, {"temperature": 0.6}, {"top_k": 5}, {"top_p": 0.7}, {"top_p": 0.999999999},
       {"temperature": 1.4, "top_k": 40, "top_p": 0.9}]  # fmt: skip


LOGITS = [(1, torch.float32, 1.0), (300, torch.bfloat16, 3.0), (300, torch.float16, 0.02)]
TIED, EVERY = LOGITS[1], ({}, {"temperature": 0.0}, HOW[-1])  # by default every way for TIED, for others these
MANY = [(7, torch.float32, 2.0), (4097, torch.float32, 3.0), (9000, torch.bfloat16, 0.3)]


@pytest.mark.parametrize(("vocab", "dtype", "scale", "how"), [
    pytest.param(*logits, how, marks=[pytest.mark.slow] * (logits in MANY or (logits != TIED and how not in EVERY)))
    for logits in (*LOGITS, *MANY) for how in HOW], ids=str)  # fmt: skip
def test_sampling_follows_the_definition(vocab, dtype, scale, how):
    """In bf16 and with small logits many are equal."""
    rows, draw = 5, torch.Generator().manual_seed(vocab)
    logits = (torch.randn(rows, vocab, generator=draw) * scale - 1).to(dtype)
    key, position = _keys(rows), torch.arange(rows)
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | how
    token, logp = sampling.sample_tokens(logits, key, position, **options)
    assert torch.equal(token, _drawn(logits, key, position, **options))
    expected = logits.double().log_softmax(-1).gather(-1, token[:, None])[:, 0]
    torch.testing.assert_close(logp.double(), expected, rtol=1e-5, atol=1e-5)
    if dtype == torch.float32:  # no ties, which PyTorch's topk ranks in any order
        assert torch.equal(plain_sampling.sample_tokens(logits, key, position, **options)[0], token)


def test_sampling_over_several_chunks(monkeypatch):
    """As over the several thousand tokens of a chunk."""
    monkeypatch.setattr(sampling, "CHUNK", 128)
    logits, key, position = (torch.randn(3, 300) * 2).bfloat16(), _keys(3), torch.arange(3)
    for how in ({}, {"temperature": 0.0}, {"temperature": 0.6, "top_p": 0.8}, {"top_k": 9}, {"top_k": 200}):
        options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | how
        token, logp = sampling.sample_tokens(logits, key, position, **options)
        assert torch.equal(token, _drawn(logits, key, position, **options))
        expected = logits.float().log_softmax(-1).gather(-1, token[:, None])[:, 0]
        torch.testing.assert_close(logp, expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=6, deadline=None)
@given(vocab=st.integers(1, 40), top_k=st.integers(0, 41), top_p=st.sampled_from([0.01, 0.5, 0.99, 1.0]),
       seed=st.integers(0, 1 << 20))
def test_sampling_of_few_tokens(vocab, top_k, top_p, seed):
    """Whole numbers: many equal logits, both zeros, nothing but ties."""
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randint(-2, 2, (3, vocab), generator=draw).bfloat16()
    logits[logits == 0] = torch.where(torch.rand(logits.shape, generator=draw) < 0.5, 0.0, -0.0)[logits == 0].bfloat16()
    key, position = _keys(3, seed), torch.full((3,), seed)
    options = {"temperature": 1.0, "top_k": top_k if top_k < vocab else 0, "top_p": top_p}
    assert torch.equal(sampling.sample_tokens(logits, key, position, **options)[0],
                       _drawn(logits, key, position, **options))


def test_tokens_of_probability_zero_are_never_drawn(monkeypatch):
    monkeypatch.setattr(sampling, "CHUNK", 256)
    logits, key = torch.full((6, 300), -math.inf, dtype=torch.bfloat16), _keys(6)
    logits[:, 17] = logits[:, 280] = 0.0
    for how in ({}, {"top_k": 5}, {"top_p": 0.9}, {"temperature": 0.0}):
        options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | how
        token, logp = sampling.sample_tokens(logits, key, torch.zeros(6, dtype=torch.int64), **options)
        assert set(token.tolist()) == ({17, 280} if how != {"temperature": 0.0} else {17})
        torch.testing.assert_close(logp, torch.full((6,), -math.log(2)))


@pytest.mark.parametrize("stops", [[], [3], [3, 5, 9]])
def test_rows_advance_as_in_pytorch(stops):
    state, length = torch.arange(4 * 40).view(4, 40), torch.arange(40, dtype=torch.int32) % 7 - 1
    found, stops = [], torch.tensor(stops, dtype=torch.int64)
    for advance in (sampling.advance_rows, plain_sampling._advance_on_cpu):
        ours = state.clone(), length.clone(), torch.full((2, 40), 7.0)
        token, logp = torch.arange(37) % 11, torch.linspace(-3, 0, 37)
        advance(*ours, token, logp, stops, 100, None, None, None)
        row, position = torch.tensor([38, 0, 5]), torch.tensor([100, 3, 50])
        for most in (1, 6):
            first = torch.zeros(2, 3)
            advance(*ours[:2], first, token[2:5], logp[2:5], stops, most, row + most // 6, position, -position)
            found.append(first)
        found.append(ours)
    torch.testing.assert_close(found[:3], found[3:], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_layers_are_those_of_transformers(dtype):
    tolerance = {torch.float32: 2e-6, torch.float16: 2e-3}[dtype]
    close = {"rtol": tolerance, "atol": tolerance}
    for shape in ((5, 3, 24), (1, 7, 1100)):
        x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
        torch.testing.assert_close(layers.rms_norm(x, weight, 1e-5), plain_layers.rms_norm_reference(x, weight, 1e-5),
                                   **close)
    gate, up = torch.randn(1, 4, 2100).to(dtype).chunk(2, -1)
    torch.testing.assert_close(layers.swiglu(gate, up), F.silu(gate) * up, **close)
    for heads, kv_heads, size in ((4, 2, 16), (33, 1, 80)):
        q, k = (torch.randn(1, 6, n, size).to(dtype).transpose(1, 2) for n in (heads, kv_heads))
        cos, sin = torch.randn(2, 1, 6, size).to(dtype)
        for a, b in zip(layers.rotary(q, k, cos, sin), (q, k), strict=True):
            torch.testing.assert_close(a, plain_layers.rotary_reference(b, cos, sin), **close)
