"""What fits, known beforehand: formulas against counted bytes, hardware, the cheapest setting, --plan, recipes."""

import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training import Log, recipe_of, stage_in

from strop.kernels import Group, PackedGroups
from strop.trainer.cli import load_recipe
from strop.trainer.config import Lora, Model, Sft
from strop.trainer.errors import UserError
from strop.trainer.main import main
from strop.trainer.models.folders import find_base
from strop.trainer.models.loading import ModelFolder
from strop.trainer.planning import estimates, memory
from strop.trainer.planning.hardware import GB, GPUS, hardware_of
from strop.trainer.planning.memory import Setting
from strop.trainer.planning.models import CONFIGS, known_shape
from strop.trainer.planning.shape import KNOWN_TYPES, Shape, read_shape, shape_of
from strop.trainer.run.console import Console
from strop.trainer.sampling import in_process
from strop.trainer.training.local import Engine
from strop.trainer.training.logprobs import Scorer

CPU = torch.device("cpu")
# as the models' cards and papers give them
PUBLISHED = {"HuggingFaceTB/SmolLM2-135M": 134_515_008, "Qwen/Qwen2.5-0.5B": 494_032_768,
             "Qwen/Qwen2.5-1.5B": 1_543_714_304, "Qwen/Qwen2.5-7B": 7_615_616_512, "Qwen/Qwen2.5-14B": 14_770_033_664,
             "Qwen/Qwen2.5-32B": 32_763_876_352, "meta-llama/Llama-3.2-1B": 1_235_814_400,
             "meta-llama/Llama-3.2-3B": 3_212_749_824, "meta-llama/Llama-3.1-8B": 8_030_261_248,
             "meta-llama/Llama-3.1-70B": 70_553_706_496}


# -- sizes ------------------------------------------------------------------------------------------------------------


def test_known_models_have_their_published_sizes():
    assert {name: known_shape(name).parameters for name in PUBLISHED} == PUBLISHED
    assert known_shape("Qwen/Qwen2.5-7B-Instruct@main") == known_shape("Qwen/Qwen2.5-7B")
    assert known_shape("someone/else") is None


@pytest.mark.parametrize("kind", sorted(KNOWN_TYPES))
def test_parameters_are_those_of_transformers(kind):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 300, "head_dim": 12, "max_position_embeddings": 64,
             "pad_token_id": 0}
    config = AutoConfig.for_model(kind, **sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = shape_of(config.to_dict())
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    linear = [m.weight.numel() for m in model.get_decoder().modules() if isinstance(m, torch.nn.Linear)]
    assert shape.linear == sum(linear)


def test_a_gguf_header_is_enough():
    base = find_base(Model(), Console(enabled=False), convert=False)
    assert read_shape(base.gguf) == known_shape("HuggingFaceTB/SmolLM2-135M")


@pytest.mark.parametrize("config, said", [
    ({"model_type": "mamba"}, "model_type=mamba: there is no memory formula"),
    ({}, "model_type=missing"),
    ({"model_type": "llama", "hidden_size": "64"}, "hidden_size=64: must be a whole number"),
    ({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 0}, "num_attention_heads=0"),
])
def test_a_config_that_does_not_say_is_refused(config, said):
    with pytest.raises(UserError) as error:
        shape_of(config)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + b"\3\0\0\0" + b"\xff" * 16, b"x" * 100])
def test_a_broken_gguf_is_refused(tmp_path, content):
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    with pytest.raises(UserError, match="cannot be read"):
        read_shape(file)


# -- formulas against counted bytes -----------------------------------------------------------------------------------


def bytes_of(tensors) -> int:
    """Bytes of the distinct storages."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(found.values())


def rows(n: int, prompt: int = 5, completion: int = 11) -> list[Group]:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 90, (n, prompt + completion), generator=draw).tolist()
    return [Group(row[:prompt], [row[prompt:]]) for row in ids]


def engine_in(folder: Path, model: Path, dtype: str, lora: int = 0, **section) -> Engine:
    recipe = recipe_of(dtype=dtype)
    return Engine(ModelFolder(model), Sft(**section), stage_in(folder, "sft", Log()), 4, compute=recipe,
                  lora=Lora(rank=lora), seed=0)


@pytest.mark.parametrize("dtype, lora, several, section", [
    ("bfloat16", 0, True, {}), ("bfloat16", 0, False, {"ema_decay": 0.9}), ("float32", 0, True, {"bema": True}),
    ("bfloat16", 4, True, {}), ("bfloat16", 0, True, {"moments": "int8", "masters": "split"}),
    ("bfloat16", 32, True, {"moments": "int8"}), ("float32", 0, True, {"moments": "bfloat16"}),
    ("bfloat16", 0, False, {"optimizer": "muon", "masters": "split", "moments": "bfloat16"})], ids=str)
def test_states_are_the_bytes_of_an_engine(tmp_path, tiny_model, dtype, lora, several, section):
    """Every tensor that stays between steps, counted after a step of one or two microbatches."""
    if lora:
        pytest.importorskip("peft")
    engine = engine_in(tmp_path, tiny_model, dtype, lora, **section)
    for i in range(1 + several):
        if i:
            engine.weights.fold()
        groups = PackedGroups.pack(rows(2))
        (-Scorer(engine.model)(groups).sum()).backward()
    engine.step()
    optimizer = [v for state in engine.weights.moments() for v in state.values()]
    masters = engine.weights.lows if section.get("masters") else engine.masters
    parts = {"weights": engine.model.parameters(), "masters": masters, "moments": optimizer,
             "gradient sums": engine.weights.sums or [], "averages": [*(engine.ema or []), *(engine.start or [])]}
    counted = {name: bytes_of(tensors) for name, tensors in parts.items()}
    if dtype == "float32":
        counted["masters"] = 0  # the weights themselves
    averages = 2 if section.get("bema") else int("ema_decay" in section)
    setting = Setting(device="cpu", width=2 if dtype == "bfloat16" else 4, several=several, lora_rank=lora,
                      averages=averages, moments=section.get("moments", "float32"), split="masters" in section,
                      muon="optimizer" in section)
    assert memory.states(read_shape(tiny_model), setting)[0] == counted


@pytest.mark.parametrize("dtype, lora", [("bfloat16", 0), ("float32", 0), ("bfloat16", 4)])
def test_activations_are_the_bytes_that_autograd_saves(tmp_path, tiny_model, dtype, lora):
    """Distinct storages that a forward pass through the body saves, without parameters; 5 % are ids, tables of the
    attention's layout and rotary angles."""
    if lora:
        pytest.importorskip("peft")
    engine = engine_in(tmp_path, tiny_model, dtype, lora)
    groups, saved = PackedGroups.pack(rows(32)), []
    own = {p.untyped_storage().data_ptr() for p in engine.model.parameters()}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = Scorer(engine.model).hidden(groups)
    counted = bytes_of([*saved, hidden])
    shape, width = read_shape(tiny_model), 2 if dtype == "bfloat16" else 4
    fused = any(type(m).forward.__name__ == "_norm_forward" for m in engine.model.modules())
    setting = Setting(device="cpu", width=width, max_tokens=groups.num_tokens, lora_rank=lora, fused=fused)
    expected = memory.activations(shape, setting)
    assert expected == pytest.approx(counted, rel=0.05)


def test_the_cache_is_the_bytes_of_the_samplers(tiny_model):
    model = in_process.load_for_generation(ModelFolder(tiny_model), torch.float32, CPU)
    kept, make = [], in_process.PromptKV

    def keeping(*args):
        kept.append(make(*args))
        return kept[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(in_process, "PromptKV", keeping)
        prompts = [list(range(3, 3 + n)) for n in (40, 33, 17, 25)]
        in_process.Generator(model).generate(prompts, k=8, max_new_tokens=70, batch_size=16)
    cache = kept[0]
    counted = sum(t.numel() * t.element_size() for buffers in (cache.prompt_k, cache.prompt_v, cache.completion_k,
                                                              cache.completion_v) for t in buffers.values())
    shape = read_shape(tiny_model)
    expected = memory.kv_cache(shape, 4, prompts=4, k=8, rows=16, prompt=40, new_tokens=70)
    growing = 2 * shape.kv_heads * shape.head_size * 4 * 16 * 80
    assert expected - growing == counted


# -- fitting ----------------------------------------------------------------------------------------------------------

SETTINGS = st.builds(
    Setting, engine=st.sampled_from(memory.ENGINES), ranks=st.integers(1, 64), zero=st.integers(1, 3),
    offload=st.sampled_from(["", "cpu"]), device=st.just("cuda"), width=st.sampled_from([2, 4]),
    max_tokens=st.integers(64, 1 << 15), several=st.booleans(), checkpointing=st.booleans(),
    offload_activations=st.booleans(), sequence=st.sampled_from([1, 2, 4]),
    lora_rank=st.sampled_from([0, 8]), averages=st.integers(0, 2), scores=st.booleans(),
    moments=st.sampled_from(["float32", "bfloat16", "int8"]), split=st.booleans(), muon=st.booleans()).map(
        lambda s: replace(s, checkpointing=s.checkpointing or s.offload_activations))
SHAPES = st.sampled_from(sorted(CONFIGS)).map(known_shape)


@settings(max_examples=150, deadline=None)
@given(SHAPES, SETTINGS)
def test_more_takes_more(shape: Shape, s: Setting):
    """Memory grows with microbatches and averages; checkpointing, ranks of a sharded engine, ranks that share rows and
    offload save some, and so do cheaper forms of the optimizer's state."""
    if s.offload if s.engine == "local" else not estimates.shards(s, s.engine):
        return
    plain = replace(s, moments="float32", split=False, muon=False)
    assert memory.training(shape, s).on_device <= memory.training(shape, plain).on_device
    need = memory.training(shape, s)
    assert min(*need.device.values(), *need.host.values(), need.once) >= 0
    larger = memory.training(shape, replace(s, max_tokens=2 * s.max_tokens)).on_device
    assert larger > need.on_device - memory.KEPT["cuda"]  # of more tokens the head keeps no logits
    assert memory.training(shape, replace(s, averages=s.averages + 1)).on_device >= need.on_device
    if not s.checkpointing:
        assert memory.training(shape, replace(s, checkpointing=True)).on_device <= need.on_device
    for shared in (2, 4, 8):
        if s.sequence == 1 and shape.heads % shared == 0:
            assert memory.training(shape, replace(s, sequence=shared)).on_device <= need.on_device + memory.KEPT["cuda"]
    if s.checkpointing and not s.offload_activations:
        away = memory.training(shape, replace(s, offload_activations=True))
        assert away.on_device <= need.on_device and away.on_host > need.on_host
    if s.engine != "local" and s.ranks > 1:
        assert memory.training(shape, replace(s, ranks=2 * s.ranks)).on_device <= need.on_device
    if s.offload == "" and s.engine != "local":
        away = memory.training(shape, replace(s, offload="cpu"))
        assert away.on_device <= need.on_device and away.on_host >= need.on_host


@settings(max_examples=60, deadline=None)
@given(SHAPES, SETTINGS.filter(lambda s: s.engine == "local" and not s.offload), st.sampled_from(
    ["1x24GB", "1x80GB", "8x80GB", "8x8x80GB", "2x16GB+64GB"]))
def test_the_cheapest_setting_fits_and_all_cheaper_ones_do_not(shape: Shape, s: Setting, text: str):
    on = hardware_of(text)
    s = replace(s, ranks=on.ranks, sequence=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimates, "engines", lambda: list(memory.ENGINES))
        tried = list(estimates.candidates(s, 512, memory.ENGINES))
        fit = [shape.heads % c.sequence == 0 and estimates.fits_on(memory.training(shape, c), on) for c in tried]
        found = estimates.cheapest(shape, s, on, "sft", 512)
    assert tried[0] == s
    if not any(fit):
        assert found == ()
        return
    assert found == estimates.changes(s, tried[fit.index(True)], "sft")


def test_long_rows_go_to_the_host_and_to_several_ranks():
    """Rows that must not be cut: the inputs of layers go to the host, then ranks share a row, as many as its heads
    allow."""
    llama, eight = known_shape("meta-llama/Llama-3.1-8B"), hardware_of("8x80GB")
    long = ("engine.kind=fsdp", "sft.activation_checkpointing=true", "sft.activation_offload=true")
    for tokens, more in ((1 << 17, ()), (1 << 18, ("engine.sequence_parallel=2",)),
                         (1 << 20, ("engine.sequence_parallel=8",))):
        found = estimates.cheapest(llama, Setting(ranks=8, max_tokens=tokens), eight, "sft", tokens)
        assert set(found) == {*long, *more} and len(found) == len(long) + len(more)
    assert not estimates.cheapest(replace(llama, heads=9), Setting(ranks=8, max_tokens=1 << 20), eight, "sft", 1 << 20)


def test_ranks_that_share_a_row_have_their_part_of_its_activations():
    llama = known_shape("meta-llama/Llama-3.1-8B")
    alone = Setting(engine="fsdp", ranks=8, max_tokens=1 << 17, checkpointing=True)
    whole, part = (memory.activations(llama, s) for s in (alone, replace(alone, sequence=8)))
    output = 2 * llama.heads * llama.head_size  # attention's, by heads and by tokens
    assert part == whole / 8 + (1 << 14) * output
    inputs = llama.layers * 2 * llama.hidden * (1 << 14)
    away = memory.training(llama, replace(alone, sequence=8, offload_activations=True))
    assert away.host["activations"] == inputs
    assert memory.activations(llama, replace(alone, sequence=8, offload_activations=True)) == part - inputs * 30 / 32
    section = Sft(max_tokens=1 << 17, batch_size=8, activation_checkpointing=True)
    share = estimates.setting_of(section, llama, ranks=8, device="cuda", width=2, sequence=8)
    assert share.tokens == 1 << 14 and share.several  # all eight rows of a step are this group's


def test_an_engine_can_ask_whether_a_section_fits():
    llama, section = known_shape("meta-llama/Llama-3.1-8B"), Sft(max_tokens=4096, activation_checkpointing=True)
    assert not estimates.fits(llama, section, 8, 80 * GB)
    assert estimates.fits(llama, section, 8, 80 * GB, engine="fsdp")
    assert estimates.fits(llama, section, 1, 30 * GB, engine="fsdp", offload="cpu")
    assert estimates.fits(llama, section, 1, 24 * GB, lora_rank=16)
    assert not estimates.fits(llama, section, 1, 20 * GB, lora_rank=16)
    small = known_shape("HuggingFaceTB/SmolLM2-135M")
    assert estimates.fits(small, section, 2, 6 * GB, device="cpu", width=4)


def test_the_order_of_cost():
    """On 8 x 80 GB: sharding first, then checkpointing, smaller microbatches, offload, LoRA; long rows are above."""
    eight, one = hardware_of("8x80GB"), hardware_of("1x24GB")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimates, "engines", lambda: list(memory.ENGINES))

        def keys(name, on, **s):
            return estimates.cheapest(known_shape(name), Setting(ranks=on.ranks, **s), on, "sft", 512)

        llama = "meta-llama/Llama-3.1-8B"
        assert keys(llama, eight, max_tokens=4096) == ("engine.kind=fsdp",)
        # what fsdp cannot train is left out
        assert keys(llama, eight, max_tokens=4096, split=True, moments="int8") == (
            "engine.kind=fsdp", "sft.masters=float32")
        assert keys(llama, eight, max_tokens=65536) == ("engine.kind=fsdp", "sft.activation_checkpointing=true")
        assert keys("Qwen/Qwen2.5-0.5B", one, max_tokens=16384) == ("sft.activation_checkpointing=true",)
        big = keys("Qwen/Qwen2.5-0.5B", one, max_tokens=1 << 18)
        assert big[0] == "sft.activation_checkpointing=true" and big[1].startswith("sft.max_tokens=")
        away = {"name": "Qwen/Qwen2.5-1.5B", "on": one, "max_tokens": 4096, "checkpointing": True}
        assert keys(**away) == ("engine.kind=deepspeed", "engine.zero_stage=2", "engine.offload_optimizer=cpu")
        weights_too = keys("Qwen/Qwen2.5-14B", one, max_tokens=4096, checkpointing=True)
        assert weights_too == ("engine.kind=deepspeed", "engine.zero_stage=3", "engine.offload_optimizer=cpu",
                               "engine.offload_param=cpu")
        patch.setattr(estimates, "engines", lambda: ["local", "fsdp"])  # DeepSpeed is not installed
        assert keys(**away) == ("engine.kind=fsdp", "engine.cpu_offload=true")
        small = hardware_of("1x24GB+32GB")  # too little for masters and moments on the host
        assert keys("Qwen/Qwen2.5-1.5B", small, max_tokens=4096) == ("lora.rank=16",)


# -- hardware ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, nodes, per_node, memory_gb, host_gb", [
    ("8x80GB", 1, 8, 80, None), ("1x24GB", 1, 1, 24, None), ("80GB", 1, 1, 80, None), ("8x8x80GB", 8, 8, 80, None),
    ("8xH100", 1, 8, 80, None), ("h200", 1, 1, 141, None), ("2xA100-40GB", 1, 2, 40, None),
    ("8x80gb+1TB", 1, 8, 80, 1000), ("4x4xL4+256GB", 4, 4, 24, 256), ("1x79.2GiB", 1, 1, 85.04, None)])
def test_hardware_reads(text, nodes, per_node, memory_gb, host_gb):
    on = hardware_of(text)
    assert (on.nodes, on.per_node) == (nodes, per_node) and on.ranks == nodes * per_node
    assert on.memory == pytest.approx(memory_gb * GB, rel=1e-3)
    assert on.host == (None if host_gb is None else host_gb * GB)
    assert (on.flops is None) == (not any(name.lower() in text.lower() for name in GPUS))


@pytest.mark.parametrize("text", [
    "", "8", "8x", "x80GB", "8x80", "0x80GB", "8x0GB", "8x80MB", "8x80GB+", "8xH101", "-1x80GB", "8 x 80GB", "8*80GB",
    "9999999x9999999x80GB", "8x999999TB", "1e3x80GB", "8x80GB+1GBB", "2x3x4x80GB", "nonsense", "8x80GB+0GB"])
def test_nonsense_is_refused_in_one_line(text, tiny_recipe, capsys):
    assert main([str(tiny_recipe), "--plan", "--on", text]) == 1
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 1 and shown[0].startswith("error: --on"), shown


def test_on_is_read_by_a_plan_only(tiny_recipe, capsys):
    assert main([str(tiny_recipe), "--on", "8x80GB"]) == 1
    assert "add --plan" in capsys.readouterr().err
    assert main([str(tiny_recipe), "--plan", "--on"]) == 1


# -- the plan ---------------------------------------------------------------------------------------------------------


def test_a_plan_says_what_it_needs(tiny_recipe, capsys):
    assert main([str(tiny_recipe), "--plan"]) == 0
    here = capsys.readouterr().out
    assert "needs on 1 x rank of this CPU" in here and "unknown" not in here.split("needs on")[1]
    assert main([str(tiny_recipe), "--plan", "--on=8x80GB"]) == 0
    shown = capsys.readouterr().out.split("needs on 8 x 80 GB")[1]
    assert "unknown: 8 x 80 GB names no GPU whose speed is listed" in shown and "does not fit" not in shown
    for stage in ("round-*/sample", "round-*/sft", "round-*/reference", "round-*/dpo", "round-*/merge", "final"):
        assert stage in shown
    assert main([str(tiny_recipe), "--plan", "--on", "8xH100"]) == 0
    assert "about 0:" in capsys.readouterr().out


def test_a_remedy_is_a_recipe_that_loads(tiny_recipe, capsys):
    """What a plan advises for compiled layers turns compiling off where it must."""
    keys = [str(tiny_recipe), "--plan", "--on", "8x80GB", "model.path=meta-llama/Llama-3.1-8B", "sft.compile=true"]
    assert main([*keys, "engine.kind=local"]) == 0
    advice = re.search(r"sft does not fit: .*that fits: (.*)", capsys.readouterr().out)[1].split()
    assert "engine.kind=fsdp" in advice and "sft.compile=false" in advice
    assert main([*keys, *advice]) == 0 and "sft does not fit" not in capsys.readouterr().out


def test_every_writer_of_several_is_estimated(tiny_recipe, capsys):
    text = tiny_recipe.read_text()
    tiny_recipe.write_text(text.replace(", batch_size: 32}", ", models: [{name: one}, {name: two, weights: start}]}"))
    assert main([str(tiny_recipe), "--plan", "--on", "1x24GB"]) == 0
    needs = capsys.readouterr().out.split("needs on")[1]
    assert "round-*/sample-one" in needs and "round-*/sample-two" in needs


def test_a_model_of_unknown_size_is_said_to_be_one(tiny_recipe, capsys):
    assert main([str(tiny_recipe), "--plan", "model.path=someone/unknown"]) == 0
    assert "needs: unknown: model.path=someone/unknown" in capsys.readouterr().out


def test_the_formulas_load_no_torch():
    code = "import sys, strop.trainer.planning.estimates; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


REAL = {"llama-8b": "8xH100", "llama-70b": "8x8xH100", "qwen-7b-lora": "1xRTX4090", "qwen-1.5b": "1xRTX4090"}


@pytest.mark.parametrize("name", REAL)
def test_recipes_at_real_size_plan_on_their_hardware(name, capsys, tmp_path):
    assert main([name, f"output_dir={tmp_path}", "--plan", "--on", REAL[name]]) == 0
    shown = capsys.readouterr().out
    needs = shown[shown.index("needs on"):]
    assert "unknown" not in needs
    if name == "qwen-7b-lora":
        assert "does not fit" not in needs
    assert math.isfinite(load_recipe(name).sft.lr)
