import math

import pytest
import torch

from strop.kernels import _cpu, draw_key, sample_tokens
from strop.kernels.sampling import _softmax_sums, _softmax_sums_reference, uniform

OPTIONS = [{}, {"temperature": 0.0}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.8}, {"top_k": 5, "top_p": 0.6}]


def _keys(n: int, seed: int = 0) -> torch.Tensor:
    return torch.tensor([draw_key(seed, "prompt", i) for i in range(n)])


def test_keys_are_stable_and_distinct():
    assert draw_key(0, "a", 1) == draw_key(0, "a", 1)
    keys = {draw_key(seed, prompt, i) for seed in range(3) for prompt in ("a", "b", "a1") for i in range(20)}
    assert len(keys) == 180
    assert all(-(1 << 63) <= key < 1 << 63 for key in keys)


def test_uniform_is_uniform_over_keys_and_over_positions():
    key, position = _keys(4096), torch.arange(4096)
    for u in (uniform(key, torch.zeros_like(key)), uniform(key[:1].expand(4096), position)):
        assert u.min() > 0 and u.max() < 1
        counts = torch.histc(u.float(), 16, 0, 1)
        assert ((counts - 256).square() / 256).sum() < 37.7  # chi-square, 15 degrees, p = 0.001
        assert abs(torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1]) < 0.06


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("vocab", [7, 600])
def test_draws_follow_the_distribution(options: dict, vocab: int):
    """Chi-square of 4096 draws against the exact distribution; the seven most likely tokens, the rest pooled."""
    torch.manual_seed(vocab)
    draws, logits = 4096, torch.randn(vocab) * 2
    token, logp = sample_tokens(logits.expand(draws, -1), _keys(draws), torch.full((draws,), 11), **options)
    torch.testing.assert_close(logp, logits.log_softmax(-1)[token])
    temperature = options.get("temperature", 1.0)
    if temperature == 0:
        assert (token == logits.argmax()).all()
        return
    p = (logits.double() / temperature).softmax(-1)
    p, order = p.sort(descending=True)
    p[options.get("top_k", vocab) :] = 0
    p /= p.sum()
    p[p.cumsum(0) - p >= options.get("top_p", 1.0)] = 0
    p /= p.sum()
    counts = torch.bincount(token, minlength=vocab)[order].double()
    assert counts[p == 0].sum() == 0
    pooled_p, pooled = (torch.cat([x[:6], x[6:].sum()[None]]) for x in (p, counts))
    live = pooled_p > 0
    chi_square = ((pooled - draws * pooled_p).square()[live] / (draws * pooled_p)[live]).sum()
    assert chi_square < 22.5  # 6 degrees of freedom, p = 0.001


@pytest.mark.parametrize("vocab", [1, 128, 1000, 1024])
@pytest.mark.parametrize("rows", [0, 1, 33])
def test_temperature_0_takes_the_first_of_the_likeliest(vocab: int, rows: int):
    torch.manual_seed(0)
    logits = torch.randn(rows, vocab).mul(4).round().bfloat16()  # many ties
    token, _ = sample_tokens(logits, _keys(rows), torch.zeros(rows, dtype=torch.int64), temperature=0.0)
    columns = torch.arange(vocab).expand_as(logits)
    first = columns.masked_fill(logits < logits.amax(-1, keepdim=True), vocab).amin(-1)
    assert torch.equal(token, first)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_draw_depends_on_its_own_row_only(options: dict, dtype: torch.dtype):
    torch.manual_seed(0)
    # Flat rows have a nucleus beyond the first guess, peaked ones within it; bf16 rows have many ties.
    logits = (torch.randn(12, 1000) * torch.linspace(0.1, 6, 12)[:, None]).to(dtype)
    key, position = _keys(12), torch.arange(12)
    token, logp = sample_tokens(logits, key, position, **options)
    order = torch.randperm(12)
    shuffled = sample_tokens(logits[order], key[order], position[order], **options)
    assert torch.equal(shuffled[0], token[order]) and torch.equal(shuffled[1], logp[order])
    for i in range(12):
        alone = sample_tokens(logits[i : i + 1], key[i : i + 1], position[i : i + 1], **options)
        assert alone[0] == token[i] and alone[1] == logp[i]


def test_tokens_of_probability_zero_are_never_drawn():
    logits = torch.full((2000, 300), -math.inf)
    logits[:, 17] = 0.0
    logits[:, 290] = 0.0
    for options in ({}, {"top_k": 5}, {"top_p": 0.9}):
        token, logp = sample_tokens(logits, _keys(2000), torch.zeros(2000, dtype=torch.int64), **options)
        assert set(token.tolist()) == {17, 290}
        torch.testing.assert_close(logp, torch.full((2000,), -math.log(2)))


@pytest.mark.parametrize("options", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}], ids=str)
def test_numbers_out_of_range_raise(options: dict):
    with pytest.raises(ValueError, match="temperature and top_k"):
        sample_tokens(torch.zeros(1, 3), _keys(1), torch.zeros(1, dtype=torch.int64), **options)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "vocab"), [(0, 300), (1, 1), (3, 256), (5, 1001)])
def test_sums_of_the_softmax_are_those_of_fp64(rows, vocab, dtype, temperature):
    wide = 5 * torch.randn(rows, vocab + 3, generator=torch.Generator().manual_seed(vocab)) + 100
    logits = wide.to(dtype)[:, 1 : vocab + 1]  # rows that are not adjacent
    logits[:, 1::7] = -torch.inf
    if not _cpu.takes(logits):
        pytest.skip("needs the library")
    shifted = torch.nn.functional.pad(
        logits.double() - logits.double().amax(-1, keepdim=True), (0, -vocab % 256), value=-torch.inf)
    sums = (shifted / temperature).exp().unflatten(-1, (-1, 256)).sum(-1)
    for highest, lse, found in (_softmax_sums(logits, temperature), _softmax_sums_reference(logits, temperature)):
        assert torch.equal(highest, logits.amax(-1).float())
        torch.testing.assert_close(lse.double(), logits.double().logsumexp(-1), rtol=1e-7, atol=1e-5)
        torch.testing.assert_close(found.double(), sums, rtol=2e-6, atol=1e-12)
