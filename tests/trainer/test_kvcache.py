"""The sampler's cache: with csrc/'s operator, and of PyTorch's operators."""

import pytest
import torch

from strop.kernels import _cpu
from strop.kernels.attention import cached as attention_cached
from strop.trainer.sampling.kv_cache import CachedPrefix, Decode, Prefill, PromptKV

CPU = torch.device("cpu")
HOW = {"plain": (None, None), "soft-cap": (5.0, None), "window": (None, 25), "both": (3.0, 40)}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.skipif(not _cpu.load(), reason="csrc/cpu*.cpp was not built")
def test_the_operator_is_what_pytorchs_operators_give(how, monkeypatch):
    """Two prefills, the second with beginnings that are copied, then a step of their completions."""
    softcap, window = HOW[how]
    prompts = [list(range(n)) for n in (60, 3, 50, 70, 33)]

    def steps(cache):
        yield Prefill(cache, [CachedPrefix(prompts[0], 1, 0, 0), CachedPrefix(prompts[1], 0, 0, 0)], CPU)
        yield Prefill(cache, [CachedPrefix(prompts[2], 2, 49, 1), CachedPrefix(prompts[3], 4, 60, 1),
                              CachedPrefix(prompts[4], 3, 0, 0)], CPU)
        group, lengths = torch.tensor([4, 0, 2, 2, 1, 3]), torch.tensor([3, 60, 50, 33, 70])
        members = torch.tensor([[1, 0], [4, 0], [2, 3], [5, 0], [0, 0]])
        place = torch.tensor([8, 0, 4, 5, 2, 6])
        for t in range(40):
            length = torch.tensor([t, t // 2, 0, t, t // 3, 39])
            yield Decode(cache, torch.zeros(6, dtype=torch.int64), group, length, lengths, members, place, 80, 48)

    def run(dtype, takes):
        monkeypatch.setattr(attention_cached, "takes", lambda *_: takes)
        torch.manual_seed(0)
        cache, found = PromptKV(5, 80, 8, 48, CPU), []
        for step in steps(cache):
            q, k, v = (torch.randn(step.tokens.numel(), n, 32).bfloat16().to(dtype).transpose(0, 1) for n in (6, 2, 2))
            found.append(step.attend(0, q, k, v, 0.3, softcap, window))
        return [x.double() for x in found]

    assert attention_cached.takes(*[torch.zeros(1, 1, 32).bfloat16()] * 3)
    truth, plain, ours = run(torch.float64, False), run(torch.bfloat16, False), run(torch.bfloat16, True)
    for exact, other, our in zip(truth, plain, ours, strict=True):
        assert (our - exact).norm() <= 2 * (other - exact).norm()
