"""What the sampler's decode step costs: waits for the device, memory of the KV cache, rounding of scores."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from strop.kernels.attention import cached as attention_cached
from strop.trainer.sampling.in_process import Batch, Generator, attend_with_cache
from strop.trainer.sampling.kv_cache import Decode, PromptKV, fill_places, product

CPU = torch.device("cpu")
CONFIG = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048, "pad_token_id": 0}
PROMPTS = [list(range(10, 10 + n)) for n in (40, 7, 23, 40, 12)]


class Waits(TorchDispatchMode):
    """Counts what a GPU's host would wait for: blocking copies, masks and values read; use it under no_grad."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[1] if func is torch.ops.aten.copy_.default else args[0]
            blocking = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
            self.count += blocking and source.device.type != out.device.type
        elif func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default) and args[0].is_meta:
            indices = [i for i in args[1] if i is not None]
            self.count += any(i.device != args[0].device or i.dtype == torch.bool for i in indices)
        return out


class HostLists(TorchFunctionMode):
    """Counts into `waits` what becomes a tensor on the device by a blocking copy, unseen by a dispatch mode."""

    def __init__(self, waits: Waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and args[0].is_meta:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            self.waits.count += any(isinstance(i, list) for i in index)
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu").type == "meta":
            self.waits.count += 1
        return func(*args, **kwargs)


def batch_on_meta(monkeypatch, waits: Waits, **options) -> Batch:
    """A batch whose tensors have no values; every token drawn is 5."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**CONFIG)).eval()
    attend_with_cache(model)

    def read(x: torch.Tensor) -> list:
        if x.device.type != "meta":
            return tolist(x)
        waits.count += 1
        return torch.full(x.shape, 5.0).numpy().tolist()

    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", read)
    keys = [[100 * i + s for s in range(3)] for i in range(len(PROMPTS))]
    return Batch(model, torch.device("meta"), PROMPTS, keys, **{"max_new_tokens": 60, "batch_size": 9} | options)


SAMPLING = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}


def test_a_decode_step_waits_once(monkeypatch):
    waits = Waits()
    batch = batch_on_meta(monkeypatch, waits)
    with torch.no_grad(), waits, HostLists(waits):
        fresh = fill_places(batch)
        batch.draw(fresh, batch.first_logits(fresh), SAMPLING, frozenset())
        for _ in range(40):
            before = waits.count
            batch.compact()
            batch.draw(list(range(batch.active)), batch.step(), SAMPLING, frozenset())
            assert waits.count == before + 1


def test_prefill_and_moving_rows_do_not_wait(monkeypatch):
    waits = Waits()
    batch = batch_on_meta(monkeypatch, waits, batch_size=15)
    with torch.no_grad(), waits, HostLists(waits):
        fresh = fill_places(batch)
        logits = batch.first_logits(fresh)
        assert waits.count == 0
        batch.draw(fresh, logits, SAMPLING, frozenset())
        for r in (0, 3, 4):
            batch.retire(r, batch.rows[r])
        before = waits.count
        assert batch.compact() == 12 and None not in batch.rows[:12]
        assert waits.count == before


def test_kv_memory_follows_the_completions(monkeypatch):
    """A limit of 4096 tokens that nobody reaches takes no memory."""
    held = []
    attend = Decode.attend

    def counted(step, layer, *arguments):
        out = attend(step, layer, *arguments)
        held.append(step.cache.completion_k[layer].shape[0] // (step.cache.rows * 2))
        return out

    monkeypatch.setattr(Decode, "attend", counted)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG | {"max_position_embeddings": 8192})).eval()
    generator = Generator(model)
    prompts = PROMPTS[:2]
    generator.generate(prompts, k=2, max_new_tokens=4096, stop_ids=set(range(150)), batch_size=4)
    assert max(held) <= 64, "a few tokens each"
    held.clear()
    short = generator.generate(prompts, k=2, max_new_tokens=100, batch_size=4, ids=["a", "b"])
    assert max(held) == 112 and sorted(set(held)) == [32, 64, 112]
    # the cache's size is not part of the result
    monkeypatch.setattr(PromptKV, "allocate", lambda cache, *a: (allocate(cache, *a), cache.grow(a[0], 100)))
    again = generator.generate(prompts, k=2, max_new_tokens=100, batch_size=4, ids=["a", "b"])
    assert short == again


allocate = PromptKV.allocate


@pytest.mark.parametrize("size", [32, 48])
def test_scores_keep_more_than_bf16_before_the_softmax(size: int, monkeypatch):
    """Large scores close to each other: in bf16 they would be off by up to 1 at 256."""
    monkeypatch.setattr(attention_cached, "takes", lambda *_: False)
    draw = torch.Generator().manual_seed(0)
    direction = torch.randn(size, generator=draw)
    direction /= direction.norm()
    keys = 12 * direction + 0.02 * torch.randn(1, 41, size, generator=draw)
    values, q = torch.randn(1, 41, size, generator=draw), 20 * direction.expand(1, 1, size)

    def attended(dtype: torch.dtype) -> torch.Tensor:
        cache = PromptKV(1, 48, 1, 16, CPU)
        k, v = keys.bfloat16().to(dtype), values.bfloat16().to(dtype)
        cache.allocate(0, k, v)
        cache.prompt_k[0][0, :, :40], cache.prompt_v[0][0, :, :40] = k[:, :40], v[:, :40]
        one, zero = torch.ones(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        step = Decode(cache, zero, zero, zero, 40 * one, zero[None], zero, 40, 1)
        return step.attend(0, q.bfloat16().to(dtype), k[:, 40:], v[:, 40:], 1.0, None, None).double()

    truth = attended(torch.float64)
    assert (attended(torch.bfloat16) - truth).norm() <= 0.02 * truth.norm()
    rounded = (q.bfloat16() @ keys.bfloat16().mT).double().softmax(-1) @ values.bfloat16().double()
    assert (rounded - truth.mT.reshape(rounded.shape)).norm() > 0.05 * truth.norm(), "the test can fail"


def test_products_on_a_gpu_are_fp32():
    with FakeTensorMode():
        keys = torch.empty(5, 2, 64, 16, device="cuda", dtype=torch.bfloat16).narrow(2, 0, 48)
        q = torch.empty(5, 2, 12, 16, device="cuda", dtype=torch.bfloat16)
        found = product(q, keys.transpose(-1, -2))
    assert found.dtype == torch.float32 and found.shape == (5, 2, 12, 48) and found.is_cuda
