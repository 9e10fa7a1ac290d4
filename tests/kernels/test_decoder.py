"""csrc/cpu_decoder.cpp: a decoder's step in one call, against the model of transformers whose weights it has."""

import pytest
import torch
import transformers

from strop.kernels import _cpu, decoder
from strop.kernels.integrations.decoder import decoder_of

pytestmark = pytest.mark.skipif(not decoder.available(), reason="needs the library and instructions for pairs of bf16")

SIZES = {"vocab_size": 101, "hidden_size": 80, "intermediate_size": 56, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "head_dim": 48,
         "initializer_range": 0.2, "tie_word_embeddings": False, "pad_token_id": 0}
FAMILIES = {
    "Llama": {}, "Qwen2": {"hidden_size": 128, "head_dim": 32, "tie_word_embeddings": True},
    "Qwen3": {"head_dim": 64, "num_key_value_heads": 1, "intermediate_size": 64},
    "Mistral": {"sliding_window": 9, "head_dim": 32},
}
PROMPTS = (5, 33, 1)  # tokens
ROWS = (1, 0, 1, 2, 1)  # groups of completions
LENGTH = 36  # of a completion: two chunks


def tiny(family: str, **sizes):
    torch.manual_seed(2)
    config = getattr(transformers, f"{family}Config")(**SIZES | FAMILIES[family] | sizes)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, x in model.named_parameters():
            if name.endswith(("bias", "norm.weight")):
                x.add_(0.3 * torch.randn_like(x))
    return model.to(torch.bfloat16)


class Caches:
    def __init__(self, of, groups: int, rows: int, length: int):
        shape = (groups, of.key_heads, length, of.size)
        self.chunks = torch.tensor([[0, 16], [16, 32]])
        self.prompt = [[torch.zeros(shape).bfloat16() for _ in range(of.layers)] for _ in range(2)]
        self.own = [[torch.zeros(rows * of.key_heads * 48, of.size).bfloat16() for _ in range(of.layers)]
                    for _ in range(2)]


def step(model, of, caches, ids, group, seen, length, keep):
    position = seen + length * (length >= 0) if (length >= 0).all() else seen - 1
    cos, sin = model.model.rotary_emb(of.embedding, position[None])
    return of(ids, cos[0], sin[0], *caches.prompt, *caches.own, caches.chunks, group, seen, length, keep).clone()


def sequences():
    draw = torch.Generator().manual_seed(5)
    prompts = [torch.randint(101, (n,), generator=draw) for n in PROMPTS]
    return prompts, torch.randint(101, (len(ROWS), LENGTH), generator=draw)


def prefill(model, of, caches, prompts):
    lengths = torch.tensor([len(p) for p in prompts])
    seen = torch.cat([torch.arange(1, n + 1) for n in lengths])
    group = torch.arange(len(prompts)).repeat_interleave(lengths)
    return step(model, of, caches, torch.cat(prompts), group, seen, torch.full_like(seen, -1), torch.arange(len(seen)))


def decode(model, of, caches, rows: list[int], completions, at: int, keep=None):
    group = torch.tensor([ROWS[r] for r in rows])
    keep = torch.arange(len(rows)) if keep is None else keep
    return step(model, of, caches, completions[rows, at].contiguous(), group, torch.tensor(PROMPTS)[group],
                torch.full_like(group, at), keep)


@pytest.mark.parametrize("has_unit", [True, False], ids=["matrix unit", "vectors"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_error_is_that_of_the_model(family, has_unit, monkeypatch):
    if has_unit and not _cpu.HAS_MATRIX_UNIT:
        pytest.skip("needs a matrix unit")
    model = tiny(family)
    of = decoder_of(model)
    monkeypatch.setattr(_cpu, "HAS_MATRIX_UNIT", has_unit)
    prompts, completions = sequences()
    caches = Caches(of, len(prompts), len(ROWS), max(PROMPTS))
    of_prompts = prefill(model, of, caches, prompts).split(PROMPTS)
    every = list(range(len(ROWS)))
    of_rows = torch.stack([decode(model, of, caches, every, completions, at) for at in range(LENGTH)], 1)
    exact = tiny(family).double()
    for rows, got in ((prompts, of_prompts), ([torch.cat((prompts[g], completions[r])) for r, g in enumerate(ROWS)],
                                              [torch.cat((of_prompts[g], of_rows[r])) for r, g in enumerate(ROWS)])):
        for ids, found in zip(rows, got, strict=True):
            expected = exact(ids[None]).logits[0]
            plain = (model(ids[None]).logits[0] - expected).norm(dim=-1)
            assert (found - expected).norm() <= 1.5 * plain.norm()
            assert ((found - expected).norm(dim=-1) <= 3 * plain.mean() + plain).all()  # no token is off


@torch.no_grad()
def test_bits_of_a_row_depend_on_no_other_row_and_no_thread():
    model = tiny("Llama")
    of, (prompts, completions) = decoder_of(model), sequences()

    def run(rows: list[int], together: bool) -> list[torch.Tensor]:
        caches = Caches(of, len(prompts), len(rows), max(PROMPTS))
        if together:
            prefill(model, of, caches, prompts)
        else:
            for g, prompt in enumerate(prompts):
                seen = torch.arange(1, len(prompt) + 1)
                step(model, of, caches, prompt, torch.full_like(seen, g), seen, torch.full_like(seen, -1), seen[:0])
        return [decode(model, of, caches, rows, completions, at) for at in range(3)]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        whole = run(list(range(len(ROWS))), True)
        torch.set_num_threads(1)
        for rows in ([3], [4, 1]):
            assert all(torch.equal(few, every[rows]) for few, every in zip(run(rows, False), whole, strict=True))
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def test_many_rows_are_blocked():
    """A product's rows come in blocks of 1 MiB."""
    model, n = tiny("Qwen2", hidden_size=576, num_hidden_layers=1, max_position_embeddings=4096), 1200
    of = decoder_of(model)
    ids = torch.randint(101, (n,), generator=torch.Generator().manual_seed(1))
    seen, last = torch.arange(1, n + 1), torch.tensor([n - 1, 0])
    caches = Caches(of, 1, 1, n)
    found = step(model, of, caches, ids, torch.zeros_like(seen), seen, torch.full_like(seen, -1), last)
    expected = model(ids[None]).logits[0, last]
    assert (found - expected).norm() <= 0.03 * expected.norm()
    assert not step(model, of, caches, ids[:0], seen[:0], seen[:0], seen[:0], seen[:0]).numel()


def test_weights_lie_in_panels():
    weight = torch.arange(40 * 70).view(40, 70).bfloat16()
    packed = decoder.pack(weight).view(2, 3, 2, 16, 16, 2)  # panel, step, half, pair, output, of the pair
    padded = torch.zeros(64, 96).bfloat16()
    padded[:40, :70] = weight
    for panel, step_, half, pair, output, which in ((0, 0, 0, 0, 0, 0), (1, 2, 0, 3, 7, 1), (0, 1, 1, 15, 15, 1)):
        assert packed[panel, step_, half, pair, output, which] == \
            padded[panel * 32 + half * 16 + output, step_ * 32 + pair * 2 + which]


def test_what_is_not_supported_keeps_the_models_own_path():
    assert decoder_of(tiny("Llama").float()) is None
    assert decoder_of(tiny("Llama", head_dim=24)) is None
    assert decoder_of(tiny("Llama", hidden_act="gelu")) is None
    assert decoder_of(tiny("Llama", mlp_bias=True)) is None
    gemma = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SIZES)).to(torch.bfloat16)
    assert decoder_of(gemma) is None
    adapted = tiny("Llama")
    adapted.model.layers[1].mlp.up_proj = torch.nn.Sequential(adapted.model.layers[1].mlp.up_proj)
    assert decoder_of(adapted) is None


@torch.no_grad()
def test_wrong_places_are_refused():
    model = tiny("Llama")
    of, (prompts, completions) = decoder_of(model), sequences()
    caches = Caches(of, len(prompts), 2, max(PROMPTS))
    with pytest.raises(RuntimeError, match="outside of the cache"):
        decode(model, of, caches, [0, 1, 2], completions, 0)
    with pytest.raises(RuntimeError, match="outside of the cache"):
        prefill(model, of, Caches(of, len(prompts), 1, 20), prompts)
    with pytest.raises(RuntimeError, match="keep has no such token"):
        decode(model, of, caches, [0, 1], completions, 0, keep=torch.tensor([2]))
    completions[0, 0] = 101
    with pytest.raises(RuntimeError, match="id"):
        decode(model, of, caches, [0, 1], completions, 0)
