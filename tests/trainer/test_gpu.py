"""Training and sampling on a GPU: what a step computes equals the CPU's, and neither waits for the device."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from strop.kernels import Group, preference_loss
from strop.kernels.integrations.transformers import _norm_forward
from strop.trainer.config import Lora, Recipe, Sft
from strop.trainer.models.loading import ModelFolder
from strop.trainer.run.console import Console
from strop.trainer.run.world import World
from strop.trainer.sampling.in_process import Generator, load_for_generation
from strop.trainer.training.batch import Example, collate
from strop.trainer.training.local import Engine
from strop.trainer.training.logprobs import Scorer
from strop.trainer.training.policy import load_policy
from strop.trainer.training.probe import probe

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

PROMPTS = [[3 + (7 * i + j) % 60 for j in range(5 + i)] for i in range(6)]


def _recipe(dtype: str, **keys) -> Recipe:
    data = {"sft": [{"name": "none", "path": "none"}]}
    return Recipe.model_validate({"dtype": dtype, "data": data} | keys)


def _engine(folder, device: str, dtype: str = "float32", **keys) -> Engine:
    section = {"lr": 1e-3, "schedule": "constant", "warmup_ratio": 0.0}
    recipe = _recipe(dtype, **({"sft": section, "dpo": section} | keys))
    stage = SimpleNamespace(world=World(device=torch.device(device)), console=Console(enabled=False))
    return Engine(ModelFolder(folder), recipe.dpo, stage, 8, compute=recipe, lora=recipe.lora, seed=0)


EXAMPLES = [Example(str(i), Group(p, [[5, 6, 7, 8 + i], [9, 10 + i]])) for i, p in enumerate(PROMPTS)]


def _step(engine: Engine, groups) -> torch.Tensor:
    logp = Scorer(engine.model)(groups)
    loss, _ = preference_loss(logp, torch.full_like(logp, -4.0), segments=groups.target_segment,
                              num_segments=groups.num_completions, pair_denominator=len(EXAMPLES), beta=0.1)
    loss.backward()
    engine.step()
    return loss.detach()


def test_dpo_steps_equal_those_on_the_cpu(tiny_model):
    losses = []
    for device in ("cpu", "cuda"):
        engine = _engine(tiny_model, device)
        groups = collate(EXAMPLES, list(range(len(EXAMPLES))), torch.device(device))
        losses.append(torch.stack([_step(engine, groups) for _ in range(4)]).cpu())
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("keys", [{}, {"lora": {"rank": 4}}], ids=["full", "lora"])
def test_bf16_steps_do_not_wait(tiny_model, keys):
    if keys:
        pytest.importorskip("peft")
    engine = _engine(tiny_model, "cuda", "bfloat16", **keys)
    groups = collate(EXAMPLES, list(range(len(EXAMPLES))), torch.device("cuda"))
    first = _step(engine, groups)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        last = [_step(engine, groups) for _ in range(3)][-1]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert last.isfinite() and last < first


def test_layers_are_ligers(tiny_model):
    pytest.importorskip("liger_kernel")
    model = ModelFolder(tiny_model).load(torch.bfloat16, torch.device("cuda"))
    code = {type(module).forward.__globals__["__name__"] for module in model.modules()}
    assert any(name.startswith("liger_kernel") for name in code)


def test_offloaded_inputs_change_no_bits_and_leave_the_device(tiny_model, tmp_path):
    """Many layers and tokens, several passes: a copy that came too late would change gradients."""
    config = AutoConfig.from_pretrained(tiny_model)
    config.update({"num_hidden_layers": 12, "hidden_size": 256, "intermediate_size": 512, "head_dim": 64,
                   "initializer_range": 0.05, "max_position_embeddings": 8192})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "deep")
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 90, (4, 4096), generator=draw).tolist()
    rows = [Example(str(i), Group(row[:64], [row[64:]])) for i, row in enumerate(ids)]
    groups = collate(rows, [0, 1, 2, 3], torch.device("cuda"))
    found, peaks = [], []
    for offloads in (False, True):
        section = Sft(activation_checkpointing=True, activation_offload=offloads)
        model = load_policy(ModelFolder(tmp_path / "deep"), section, torch.device("cuda"), compute=_recipe("bfloat16"),
                            lora=Lora(), seed=0, reward=False)
        for _ in range(4):
            model.zero_grad()
            torch.cuda.reset_peak_memory_stats()
            Scorer(model)(groups).sum().backward()
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated())
        found.append([p.grad.cpu() for p in model.parameters()])
        del model
    assert all(map(torch.equal, *found))
    assert peaks[0] - peaks[1] > 8 * groups.num_tokens * 256 * 2  # of twelve layers' inputs


def test_the_probe_accepts_the_model(tiny_model):
    for dtype in (torch.float32, torch.bfloat16):
        assert probe(ModelFolder(tiny_model).load(dtype, torch.device("cuda")), Console(enabled=False))


SHARED = [3 + 11 * j % 60 for j in range(300)]
LONG = [SHARED + prompt for prompt in PROMPTS[:3]] + [SHARED[:32], SHARED[:67], PROMPTS[5]]


@pytest.mark.parametrize(("prompts", "tokens"), [(PROMPTS, 40), (LONG, 90)], ids=["short", "pages"])
def test_greedy_completions_equal_those_on_the_cpu(tiny_model, prompts, tokens):
    found = []
    for device in ("cpu", "cuda"):
        model = load_for_generation(ModelFolder(tiny_model), torch.float32, torch.device(device))
        found.append(Generator(model).generate(prompts, k=2, max_new_tokens=tokens, temperature=0.0, batch_size=8))
    for ours, theirs in zip(*found, strict=True):
        assert [c.tokens for c in ours] == [c.tokens for c in theirs]
        assert [c.logp for c in ours] == pytest.approx([c.logp for c in theirs], rel=1e-3)


HOW = {"k": 4, "max_new_tokens": 40, "stop_ids": {5, 9}, "batch_size": 12}


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "top_k": 30, "top_p": 0.9}], ids=str)
def test_steps_are_captured_and_replayed(tiny_model, sampling):
    """The same completions as launched kernel by kernel, in bf16, on every call."""
    model = load_for_generation(ModelFolder(tiny_model), torch.bfloat16, torch.device("cuda"))
    assert all(type(layer.self_attn.q_proj).__name__ == type(layer.mlp.up_proj).__name__ == "_Part"
               and type(layer.input_layernorm).forward is _norm_forward for layer in model.model.layers)
    captured, eager = Generator(model), Generator(model)
    eager.engine.graphs.capturing = False
    first = captured.generate(PROMPTS, **HOW, **sampling)
    assert captured.engine.graphs.held and captured.engine.graphs.capturing
    assert captured.generate(PROMPTS, **HOW, **sampling) == first == eager.generate(PROMPTS, **HOW, **sampling)


def test_launches_of_a_token(tiny_model):
    """By the host, graphs counted as one."""
    generator = Generator(load_for_generation(ModelFolder(tiny_model), torch.bfloat16, torch.device("cuda")))
    generator.generate(PROMPTS, k=2, max_new_tokens=60, batch_size=12)
    counts = []
    for tokens in (20, 60):
        generator.generate(PROMPTS, k=2, max_new_tokens=tokens, batch_size=12)  # captures
        with torch.profiler.profile() as prof:
            generator.generate(PROMPTS, k=2, max_new_tokens=tokens, batch_size=12)
        names = ("LaunchKernel", "GraphLaunch", "MemcpyAsync", "MemsetAsync")
        counts.append(sum(event.name.endswith(names) or "LaunchKernel" in event.name for event in prof.events()))
    assert counts[1] - counts[0] <= 20 * 40


def test_a_decode_step_waits_once(tiny_model):
    """For the drawn tokens."""
    model = load_for_generation(ModelFolder(tiny_model), torch.bfloat16, torch.device("cuda"))
    generator = Generator(model)
    generator.generate(PROMPTS, k=2, max_new_tokens=4, batch_size=12)
    counts = []
    for tokens in (12, 28):
        with torch.profiler.profile() as prof:
            generator.generate(PROMPTS, k=2, max_new_tokens=tokens, batch_size=12)
        counts.append(sum("StreamSynchronize" in event.name for event in prof.events()))
    assert counts[1] - counts[0] <= 16
