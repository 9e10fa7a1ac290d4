"""The sampling engine: same tokens as transformers, true log-probs, and no dependence on what else is in the batch."""

import math
from collections import Counter

import pytest
import torch
import transformers

from strop.kernels import decoder
from strop.trainer.errors import UserError
from strop.trainer.models.loading import ModelFolder
from strop.trainer.sampling.in_process import Batch, Completion, Generator, lent, load_for_generation
from strop.trainer.sampling.kv_cache import Prefill
from strop.trainer.sampling.on_device import DeviceEngine

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
         "pad_token_id": 0, "initializer_range": 0.5, "tie_word_embeddings": False}
SLIDING = {"head_dim": 8, "sliding_window": 7}
FAMILIES = {
    "Llama": {}, "Qwen2": {}, "Olmo2": {}, "Qwen3": {"head_dim": 16}, "Mistral": {"sliding_window": 7},
    "Gemma2": {**SLIDING, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 10.0},
    "Gemma3": {**SLIDING, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
}
STOP = {2, 10, 11, 12, 13}


def tiny(family: str):
    torch.manual_seed(1)
    config = getattr(transformers, "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config")
    return getattr(transformers, f"{family}ForCausalLM")(config(**SIZES, **FAMILIES[family])).float().eval()


def make_prompts(*lengths: int) -> list[list[int]]:
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(14, 97, (n,), generator=draw).tolist() for n in lengths]


def flat(samples: list[list[Completion]]) -> list[tuple]:
    return [(tuple(c.tokens), c.finish) for of_prompt in samples for c in of_prompt]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def on_the_device(model) -> Generator:
    """With the GPU's batches, on the CPU."""
    generator = Generator(model)
    generator.engine = DeviceEngine(model, torch.device("cpu"))
    return generator


@pytest.fixture(scope="module")
def llama() -> Generator:
    return Generator(tiny("Llama"))


@pytest.fixture(scope="module", params=[Generator, on_the_device], ids=["host", "device"])
def either(request) -> Generator:
    return request.param(tiny("Llama"))


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_transformers(family):
    model = tiny(family)
    model.set_attn_implementation("eager")  # the one that knows Gemma 2's soft-cap
    prompts = make_prompts(5, 17, 1, 9, 23, 12, 3)
    model.generation_config.eos_token_id = None
    free = [model.generate(torch.tensor([p]), do_sample=False, max_new_tokens=20, pad_token_id=0)[0, len(p):].tolist()
            for p in prompts]
    stop = {free[0][3], free[1][12], free[4][0]}
    expected = [tokens[: next((i + 1 for i, t in enumerate(tokens) if t in stop), 20)] for tokens in free]
    assert len({len(tokens) for tokens in expected}) > 3  # rows end at different times and are refilled
    got = Generator(model).generate(prompts, k=2, max_new_tokens=20, temperature=0.0, stop_ids=stop, batch_size=4)
    for samples, tokens in zip(got, expected, strict=True):
        for completion in samples:
            assert completion.tokens == tokens
            assert completion.finish == ("stop" if tokens[-1] in stop else "length")


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Gemma3"])
@pytest.mark.parametrize("sampling", [{"temperature": 1.0}, {"temperature": 0.7, "top_k": 20, "top_p": 0.9}])
def test_logp_is_the_teacher_forced_one(family, sampling):
    model = tiny(family)
    prompts = make_prompts(4, 11, 30)
    got = Generator(model).generate(prompts, k=3, max_new_tokens=24, stop_ids=STOP, batch_size=5, **sampling)
    model.set_attn_implementation("eager")
    for prompt, samples in zip(prompts, got, strict=True):
        for c in samples:
            with torch.no_grad():
                logp = model(torch.tensor([prompt + c.tokens])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            expected = logp.gather(-1, torch.tensor(c.tokens)[:, None]).sum().item()
            assert c.logp == pytest.approx(expected, abs=1e-4 * len(c.tokens))


def test_same_call_same_completions_whatever_came_before(either):
    prompts = make_prompts(5, 9, 3, 12)
    how = {"k": 4, "seed": 7, "max_new_tokens": 16, "stop_ids": STOP, "batch_size": 6}
    first = either.generate(prompts, **how)
    either.generate(make_prompts(40, 2), k=3, seed=1, max_new_tokens=30)
    assert either.generate(prompts, **how) == first
    fresh = Generator(tiny("Llama")) if either.engine is None else on_the_device(tiny("Llama"))
    assert fresh.generate(prompts, **how) == first
    assert flat(either.generate(prompts, **how | {"batch_size": 128})) == flat(first)
    assert flat(either.generate(prompts, **how | {"seed": 8})) != flat(first)


def test_neighbours_refills_and_batch_size_change_no_token(llama):
    prompts = make_prompts(5, 9, 3, 12, 20)
    ids = ["a", "b", "c", "d", "e"]
    how = {"k": 4, "seed": 7, "max_new_tokens": 16, "stop_ids": STOP}
    whole = llama.generate(prompts, ids=ids, batch_size=128, **how)
    assert flat(llama.generate(prompts, ids=ids, batch_size=3, **how)) == flat(whole)
    assert flat(llama.generate(prompts[::-1], ids=ids[::-1], batch_size=7, **how)[::-1]) == flat(whole)
    assert flat(llama.generate([prompts[2]], ids=["c"], batch_size=1, **how)) == flat([whole[2]])
    assert flat([whole[0][:2]]) == flat(llama.generate(prompts[:1], ids=ids[:1], **how | {"k": 2}))


# of layers, full and with windows and caps; the others by default in batches of the one size
@pytest.mark.parametrize(("family", "batch_size"), [
    *((family, 128) for family in ("Llama", "Gemma2", "Gemma3")), ("Llama", 2),
    *(pytest.param(family, n, marks=pytest.mark.slow) for family in FAMILIES for n in (2, 128))])
def test_a_beginning_in_common_is_computed_once(family, batch_size, monkeypatch):
    system, ask, tell, *ends = make_prompts(30, 9, 11, 3, 1, 6, 12, 2)
    prompts = [system + kind + end for end in ends for kind in (ask, tell)]
    prompts += [system, system + ask, prompts[0], prompts[0][:20], ends[3], prompts[2] + prompts[2]]
    generator = Generator(tiny(family))
    how = {"max_new_tokens": 12, "temperature": 0.0, "stop_ids": STOP}
    alone = [generator.generate([p], **how)[0][0].tokens for p in prompts]
    computed = []
    run = Batch.forward
    monkeypatch.setattr(Batch, "forward", lambda self, step, **kwargs: (
        computed.append(step.tokens.numel() if isinstance(step, Prefill) else 0), run(self, step, **kwargs))[1])
    got = generator.generate(prompts, k=2, batch_size=batch_size, **how)
    assert [[c.tokens for c in samples] for samples in got] == [[tokens] * 2 for tokens in alone]
    assert sum(computed) < 0.5 * sum(map(len, prompts))


def test_beginnings_that_differ_are_not_waited_for(llama, monkeypatch):
    prompts = make_prompts(*[15] * 20)  # alike in no token, or in too few
    prefills = []
    run = Batch.prefill
    monkeypatch.setattr(Batch, "prefill", lambda self: (prefills.append(1), run(self))[1])
    for shared in ([], [5] * 9):
        prefills.clear()
        llama.generate([shared + p for p in prompts], max_new_tokens=1)
        assert len(prefills) == 1


def test_many_small_groups_and_one_large(llama):
    prompts = make_prompts(*[4] * 20, 50)
    how = {"max_new_tokens": 6, "temperature": 0.0, "stop_ids": STOP}
    alone = [llama.generate([p], **how)[0][0].tokens for p in prompts]
    for k, batch_size in ((1, 2), (1, 128), (5, 16)):
        got = llama.generate(prompts, k=k, batch_size=batch_size, **how)
        assert [[c.tokens for c in samples] for samples in got] == [[tokens] * k for tokens in alone]


def test_stop_token_is_kept_and_length_cuts(llama):
    prompts = make_prompts(5, 9, 3, 12)
    free = llama.generate(prompts, k=8, max_new_tokens=10)
    assert {(len(c.tokens), c.finish) for samples in free for c in samples} == {(10, "length")}
    chosen = {c.tokens[4] for samples in free for c in samples[:2]}
    stopped = llama.generate(prompts, k=8, max_new_tokens=10, stop_ids=chosen)
    for before, after in zip(flat(free), flat(stopped), strict=True):
        end = next((i + 1 for i, t in enumerate(before[0]) if t in chosen), None)
        assert after == ((before[0][:end], "stop") if end else before)
    assert "stop" in {finish for _, finish in flat(stopped)}


def test_first_tokens_follow_the_models_distribution(llama):
    prompt, n = make_prompts(6)[0], 4000
    got = llama.generate([prompt], k=n, max_new_tokens=1, batch_size=1000, temperature=1.5)
    seen = Counter(c.tokens[0] for c in got[0])
    with torch.no_grad():
        p = (llama.model(input_ids=torch.tensor([prompt]), kv_step=Plain()).logits[0, -1] / 1.5).softmax(-1)
    common = (p * n > 20).nonzero()[:, 0].tolist()
    assert len(common) > 5
    for t in common:
        assert abs(seen[t] - n * p[t]) < 4.5 * math.sqrt(n * p[t] * (1 - p[t]))


class Plain:
    """Attention without a cache, from its definition."""

    def attend(self, layer, q, k, v, scaling, softcap, window):
        k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], 0) for x in (k, v))
        ahead = torch.ones(q.shape[1], q.shape[1]).triu(1).bool()
        return ((q @ k.transpose(-1, -2) * scaling).masked_fill(ahead, -9e9).softmax(-1) @ v).transpose(0, 1)


def test_progress_counts_every_token_and_completion(either):
    steps = []
    got = either.generate(make_prompts(5, 9, 3), k=4, max_new_tokens=16, stop_ids=STOP, batch_size=5,
                         on_progress=lambda ended, drawn: steps.append((ended, drawn)))
    assert sum(ended for ended, _ in steps) == 12
    assert sum(drawn for _, drawn in steps) == sum(len(tokens) for tokens, _ in flat(got))
    assert max(drawn for _, drawn in steps) == 5


def test_what_cannot_be_sampled_is_refused(llama):
    with pytest.raises(ValueError, match="prompt 1 has 0 tokens"):
        llama.generate([[5], []], max_new_tokens=4)
    with pytest.raises(ValueError, match=r"prompt 0 has 120 tokens.*at most 112"):
        llama.generate([[5] * 120], max_new_tokens=16)
    assert llama.generate([], max_new_tokens=4) == []
    mamba = transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1))
    with pytest.raises(UserError, match="MambaForCausalLM"):
        Generator(mamba).generate([[1, 2]], max_new_tokens=2)


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])  # Qwen2's projections have biases
def test_rearranged_weights_compute_the_same(family, tmp_path):
    tiny(family).save_pretrained(tmp_path)
    tokens, cpu = torch.tensor(make_prompts(30)), torch.device("cpu")
    with torch.no_grad():
        exact = ModelFolder(tmp_path).load(torch.float32, cpu, "sdpa")(tokens).logits
        plain = ModelFolder(tmp_path).load(torch.bfloat16, cpu, "sdpa")(tokens).logits
        packed = load_for_generation(ModelFolder(tmp_path), torch.bfloat16, cpu)(tokens).logits
    assert (packed - exact).norm() <= 1.5 * (plain - exact).norm()


@pytest.mark.skipif(not decoder.available(), reason="needs instructions for pairs of bf16")
def test_the_cpus_decoder_writes_what_the_model_does(tmp_path):
    torch.manual_seed(1)
    sizes = SIZES | {"head_dim": 32, "initializer_range": 0.1}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(tmp_path)
    cpu, prompts = torch.device("cpu"), make_prompts(5, 17, 1, 17)
    prompts.append([*prompts[1][:16], 20])  # begins as another
    how = {"k": 3, "max_new_tokens": 40, "stop_ids": STOP}
    generator = Generator(load_for_generation(ModelFolder(tmp_path), torch.bfloat16, cpu))
    assert generator.decoder
    got = generator.generate(prompts, batch_size=4, **how)
    assert generator.generate(prompts, batch_size=128, **how) == got  # with the same log-probs
    model = ModelFolder(tmp_path).load(torch.bfloat16, cpu, "sdpa")
    with lent(model) as borrowed:
        assert borrowed.decoder and borrowed.generate(prompts, **how) == got
    exact = ModelFolder(tmp_path).load(torch.float32, cpu, "sdpa")
    ours, theirs = [], []
    for prompt, samples in zip(prompts, got, strict=True):
        for c in samples:
            ids, of = torch.tensor([prompt + c.tokens]), torch.tensor(c.tokens)[:, None]
            with torch.no_grad():
                logp, plain = (x(ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1).gather(-1, of).sum()
                               for x in (exact, model))
            ours.append(c.logp - logp)
            theirs.append(plain - logp)
    assert torch.stack(ours).norm() <= 1.5 * torch.stack(theirs).norm()
