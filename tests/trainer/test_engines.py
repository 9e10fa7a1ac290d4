"""Training engines on several ranks against the local one on one rank. Each job of ranks runs many checks, since a
start takes long; what they check is in sharded.py."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rounds import prompts_of
from test_rated import rated_of
from training import recipe_of, select_of
from transformers import AutoConfig, AutoModelForCausalLM

from strop.trainer.cli import load_recipe
from strop.trainer.errors import UserError
from strop.trainer.models.loading import ModelFolder
from strop.trainer.planning import estimates
from strop.trainer.planning.hardware import hardware_of
from strop.trainer.planning.models import CONFIGS, known_shape
from strop.trainer.sharding import Auto, DeepSpeed, Fsdp, Local
from strop.trainer.training import deepspeed, engines
from strop.trainer.training.fsdp import check_unshared
from strop.trainer.training.policy import layers_of
from strop.trainer.training.waits import Waits

HERE = Path(__file__).parent
CHECKS = ["sft_tied", "dpo_untied", "dpo_bf16", "lora_bf16", "reward_model", "one_row_a_step", "guarded", "resumed",
          "resumed_int8", "sliced", "waits"]


def folder_of(tiny_model, folder: Path) -> Path:
    """Two models, tied and untied, rows to train on, and prompts."""
    shutil.copytree(tiny_model, folder / "tied")
    config = AutoConfig.from_pretrained(tiny_model)
    config.tie_word_embeddings = False
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "untied")
    for file in tiny_model.glob("*token*"):
        shutil.copy(file, folder / "untied")
    shutil.copy(tiny_model / "chat_template.jinja", folder / "untied")
    for rows in (6, 14):
        select_of(folder / f"select-{rows}", rows)
    rated_of(folder / "select-rated")
    rated_of(folder / "select-14")
    prompts_of(folder / "prompts", [f"{i:02}" for i in range(5)], split="validation")
    return folder


# in a process of the launcher, which finds sharded.py beside itself; if it hangs, its ranks end with it
CODE = """
import os, pathlib, signal, sys, sharded
signal.alarm(570)
status = sharded.main({ranks}, pathlib.Path({folder!r}), {engine!r}, {checks!r})
sys.stdout.flush()
os._exit(status)
"""


def launch_forked(launcher, folder: Path, ranks: int, engine: dict, checks: list[str]) -> str:
    log, code = folder / "log", CODE.format(ranks=ranks, folder=str(folder), engine=engine, checks=checks)
    launcher.start(argv=[], log=str(log), code=code)
    launcher.wait()
    return log.read_text()


def launch(folder: Path, ranks: int, engine: dict, checks: list[str]) -> str:
    command = [sys.executable, str(HERE / "sharded.py"), str(ranks), str(folder), json.dumps(engine), *checks]
    done = subprocess.run(command, text=True, capture_output=True, timeout=570,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "CI": "true"})
    return f"{done.stdout}\n{done.stderr}"


def passed(folder: Path, check: str, output: str) -> None:
    failed = folder / f"{check}.failed"
    assert (folder / f"{check}.passed").exists(), failed.read_text() if failed.exists() else output[-5000:]


GRID = ["sft_tied", "sft_bf16", "dpo_untied", "dpo_bf16", "lora_bf16", "reward_model", "one_row_a_step", "bema_of_dpo",
        "guarded", "resumed", "resumed_int8", "smaller_moments"]


def model_in(folder: Path, name: str) -> Path:
    """A model folder without weights."""
    (folder / "config.json").write_text(json.dumps(CONFIGS[name]))
    return folder


def auto_on(monkeypatch, folder: Path, hardware: str, *, deepspeed: bool = True, others=(), options=None, lora: int = 0,
            **keys):
    """What engine.kind=auto becomes on named hardware. others: what other ranks choose."""
    on = hardware_of(hardware)
    monkeypatch.setattr(engines, "ranks_here", lambda world: on)
    monkeypatch.setattr(estimates, "deepspeed_fault", lambda: None if deepspeed else "DeepSpeed is not installed")
    world = SimpleNamespace(size=on.ranks, gather=lambda value: [value, *(others if isinstance(value, int) else ())])
    recipe = recipe_of(dtype="bfloat16", sft={"max_tokens": 4096, "batch_size": 64} | keys, lora={"rank": lora})
    return engines.settle(options or Auto(timeout=9), folder, recipe.sft, recipe.lora, torch.bfloat16, world)


LLAMA_1B, LLAMA_8B, QWEN_32B = "meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.1-8B", "Qwen/Qwen2.5-32B"
BOTH = {"offload_optimizer": "cpu", "offload_param": "cpu"}


@pytest.mark.parametrize(("name", "hardware", "keys", "expected"), [
    (LLAMA_1B, "1x80GB", {}, Local(timeout=9)),
    (LLAMA_8B, "8x80GB", {}, Fsdp(timeout=9)),
    (LLAMA_8B, "8x80GB", {"lora": 16}, Local(timeout=9)),
    (LLAMA_8B, "1x80GB", {}, DeepSpeed(timeout=9, offload_optimizer="cpu")),
    (LLAMA_8B, "2x24GB+400GB", {"activation_checkpointing": True},
     DeepSpeed(timeout=9, zero_stage=3, offload_optimizer="cpu")),
    (QWEN_32B, "1x80GB", {"activation_checkpointing": True}, DeepSpeed(timeout=9, zero_stage=3, **BOTH)),
    (LLAMA_8B, "1x80GB", {"deepspeed": False}, Fsdp(timeout=9, cpu_offload=True)),
    (LLAMA_8B, "1x80GB", {"moments": "int8"}, Fsdp(timeout=9, cpu_offload=True)),
    (LLAMA_8B, "2x24GB", {"options": Auto(timeout=9, sequence_parallel=2), "activation_checkpointing": True},
     Fsdp(timeout=9, sequence_parallel=2, cpu_offload=True)),
    (LLAMA_8B, "8x80GB", {"masters": "split"}, Local(timeout=9)),  # fsdp cannot
    (LLAMA_8B, "8x80GB", {"optimizer": "muon"}, Local(timeout=9)),
    (LLAMA_8B, "8x80GB", {"compile": True}, Local(timeout=9)),
    (LLAMA_8B, "8x80GB", {"moments": "int8"}, Fsdp(timeout=9)),
    (LLAMA_1B, "1x80GB", {"max_tokens": 1 << 20, "max_length": 4096}, Local(timeout=9)),  # microbatches can be halved
    (LLAMA_8B, "1x80GB+64GB", {}, Fsdp(timeout=9, cpu_offload=True))], ids=str)  # nothing fits: what takes least
def test_auto_takes_the_first_engine_that_fits(monkeypatch, tmp_path, name, hardware, keys, expected):
    assert auto_on(monkeypatch, model_in(tmp_path, name), hardware, **keys) == expected


def test_auto_is_the_same_on_every_rank(monkeypatch, tmp_path):
    """A rank whose device has less room decides for all; another kind asked for is left as it is."""
    folder = model_in(tmp_path, LLAMA_1B)
    assert auto_on(monkeypatch, folder, "2x80GB") == Local(timeout=9)
    assert auto_on(monkeypatch, folder, "2x80GB", others=[1]) == Fsdp(timeout=9)
    assert auto_on(monkeypatch, folder, "1x80GB", options=Fsdp()) == Fsdp()


@pytest.mark.parametrize(("name", "hardware"), [
    (LLAMA_1B, "1x80GB"), (LLAMA_8B, "8x80GB"), (LLAMA_8B, "1x80GB"), (QWEN_32B, "1x80GB"), (QWEN_32B, "1x24GB")])
def test_a_run_takes_the_engine_that_its_plan_says(monkeypatch, tmp_path, name, hardware):
    on, chosen = hardware_of(hardware), auto_on(monkeypatch, model_in(tmp_path, name), hardware)
    section = recipe_of(sft={"max_tokens": 4096, "batch_size": 64}).sft
    shape = known_shape(name)
    asked = estimates.setting_of(section, shape, ranks=on.ranks, device="cuda", width=2, engine="auto")
    planned = estimates.settled(shape, asked, on, section)
    assert planned.engine == chosen.kind and planned.max_tokens == asked.max_tokens
    assert bool(planned.offload) == ("cpu" in chosen.model_dump().values() or getattr(chosen, "cpu_offload", False))


def test_a_model_without_a_formula_is_sharded_where_20_bytes_a_parameter_do_not_fit(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    monkeypatch.setattr(engines, "count_of", lambda _: 2 * 10**9)
    assert auto_on(monkeypatch, tmp_path, "2x80GB") == Local(timeout=9)
    assert auto_on(monkeypatch, tmp_path, "2x80GB", bema=True) == Local(timeout=9)
    assert auto_on(monkeypatch, tmp_path, "2x40GB") == Fsdp(timeout=9)
    assert auto_on(monkeypatch, tmp_path, "2x40GB", lora=4) == auto_on(monkeypatch, tmp_path, "1x40GB") == Local(
        timeout=9)


@pytest.mark.parametrize(("engine", "said"), [
    ({"kind": "fdsp"}, "engine.kind=fdsp: input should be auto or local or fsdp or deepspeed"),
    ({"kind": "local", "cpu_offload": True}, "engine.cpu_offload=True: unknown key; kind=local has no"),
    ({"cpu_offload": True}, "engine.cpu_offload=True: unknown key; kind=auto has no such key, kind=fsdp has"),
    ({"zero_stage": 3}, "engine.zero_stage=3: unknown key; kind=auto has no such key, kind=deepspeed has"),
    ({"kind": "deepspeed", "offload_param": "cpu"}, "offload_param=cpu needs zero_stage=3, and zero_stage=2"),
])
def test_a_key_that_an_engine_does_not_read_is_refused(engine, said):
    with pytest.raises(UserError) as error:
        load_recipe({"data": {"sft": [{"name": "x", "path": "x"}]}, "engine": engine})
    assert said in str(error.value)


@pytest.mark.parametrize(("version", "said"), [
    (None, r"DeepSpeed is not installed: pip install 'strop\[deepspeed]'"), ("0.19.7", r"DeepSpeed 0.19.7 is too old"),
    ("0.19.8", None), ("0.20", None)])
def test_a_missing_deepspeed_is_one_line(monkeypatch, version, said):
    def find(name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", find)
    engines.check_engine(Fsdp(), online=False)
    with pytest.raises(UserError, match=said) if said else nullcontext():
        engines.check_engine(DeepSpeed(), online=False)


@pytest.mark.parametrize("options", [Fsdp(), DeepSpeed()])
def test_online_training_refuses_an_engine_that_it_does_not_use(monkeypatch, options):
    monkeypatch.setattr(engines, "deepspeed_fault", lambda: None)
    engines.check_engine(Local(), online=True)
    engines.check_engine(Auto(), online=True)
    with pytest.raises(UserError, match=rf"engine.kind={options.kind}: online training .*engine.kind=local"):
        engines.check_engine(options, online=True)


@pytest.mark.parametrize("in_one_pass", [True, False])
def test_deepspeeds_optimizer_is_adamw(monkeypatch, in_one_pass):
    monkeypatch.setattr(deepspeed.optimizer, "available", lambda params: in_one_pass)
    options = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.2}
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 50)) for _ in range(2))
    one, other = deepspeed.AdamW([ours], fused=True, **options), torch.optim.AdamW([theirs], **options)
    for number, lr in ((1, 0.0), (1, 0.1), (2, 0.05)):  # a step of lr 0 makes the state, and counts for nothing
        ours.grad = torch.linspace(2, -1, 50) ** number * (lr > 0)
        one.number = number
        one.param_groups[0]["lr"] = lr
        one.step()
        if lr:
            theirs.grad, other.param_groups[0]["lr"] = ours.grad, lr
            other.step()
    torch.testing.assert_close(ours, theirs)
    for moment in deepspeed.MOMENTS:
        torch.testing.assert_close(one.state[ours][moment], other.state[theirs][moment])


class Backend:
    """Collectives that another rank joins after 20 ms, at once or when waited for."""

    name = "slow"

    def all_reduce(self, tensor, async_op=False):
        return self if async_op else time.sleep(0.02)

    def wait(self):
        time.sleep(0.02)


def test_collectives_of_deepspeed_are_timed_in_a_step_only():
    waits = Waits(torch.device("cpu"))
    timed = deepspeed.Timed(Backend(), waits)
    assert timed.name == "slow" and timed.all_reduce(None) is None
    timed.all_reduce(None, async_op=True).wait()
    assert 0.04 <= waits.take() < 1
    waits.is_on = False
    timed.all_reduce(None)
    assert waits.take() == 0


def test_layers_that_share_weights_are_refused_by_fsdp(tiny_model):
    model = ModelFolder(tiny_model).load(torch.float32, torch.device("cpu"))
    layers = layers_of(model)
    assert [type(layer).__name__ for layer in layers] == ["LlamaDecoderLayer"] * 2
    check_unshared(model, layers)  # the tied head is outside the layers
    layers[0].mlp.up_proj.weight = layers[1].mlp.up_proj.weight
    with pytest.raises(UserError, match=r"engine.kind=fsdp: layers of LlamaForCausalLM share weights"):
        check_unshared(model, layers)


@pytest.fixture(scope="module")
def fsdp(launcher, tiny_model, tmp_path_factory):
    """(folder, output) of the checks of fsdp on two ranks."""
    folder = folder_of(tiny_model, tmp_path_factory.mktemp("fsdp"))
    return folder, launch_forked(launcher, folder, 2, {"kind": "fsdp"}, CHECKS)


@pytest.mark.parametrize("check", CHECKS)
def test_fsdp_on_two_ranks(fsdp, check):
    passed(fsdp[0], check, fsdp[1])


ENGINES = [
    {"kind": "local"}, {"kind": "fsdp"}, {"kind": "deepspeed", "zero_stage": 1}, {"kind": "deepspeed"},
    {"kind": "deepspeed", "zero_stage": 3}]
MORE = [
    {"kind": "fsdp", "cpu_offload": True},
    {"kind": "fsdp", "sync_each_microbatch": False, "reshard_after_forward": False},
    {"kind": "deepspeed", "offload_optimizer": "cpu"},
    {"kind": "deepspeed", "zero_stage": 3, "offload_optimizer": "cpu", "offload_param": "cpu"}]
# what a launch of ranks checks; each takes less than three minutes on two cores
PARTS = {"sft": ["sft_tied", "sft_bf16", "one_row_a_step", "lora_fp32", "lora_bf16"],
         "preferences": ["dpo_untied", "dpo_bf16", "bema_of_dpo", "unpaired", "reference_table", "reward_model"],
         "moments": ["resumed_int8", "smaller_moments"],
         "state": ["guarded", "resumed", "freed", "damaged", "full_disk", "overlaps", "waits", "times_out"]}


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(("ranks", "engine"), [(2, e) for e in ENGINES + MORE] + [(4, e) for e in ENGINES],
                         ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None)
def test_every_engine_equals_the_local_one(tiny_model, tmp_path, ranks, engine, part):
    if engine["kind"] == "deepspeed" and not find_spec("deepspeed"):
        pytest.skip("DeepSpeed is not installed: pip install 'strop[deepspeed]'")
    unfit = {"local": {"damaged", "full_disk"}, "fsdp": {"overlaps"},
             "deepspeed": {"overlaps", "resumed_int8", "smaller_moments"}}[engine["kind"]]
    checks = [check for check in PARTS[part] if check not in unfit]
    output = launch(folder_of(tiny_model, tmp_path), ranks, engine, checks)
    for check in checks:
        passed(tmp_path, check, output)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "engine"), [
    (2, {"kind": "local", "sequence_parallel": 2}), (2, {"kind": "fsdp", "sequence_parallel": 2}),
    (4, {"kind": "local", "sequence_parallel": 2}), (4, {"kind": "fsdp", "sequence_parallel": 2}),
    (4, {"kind": "local", "sequence_parallel": 4}), (4, {"kind": "fsdp", "sequence_parallel": 4, "cpu_offload": True})],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None)
def test_ranks_that_share_rows_equal_one_rank(tiny_model, tmp_path, ranks, engine):
    checks = [*(check for check in GRID if check != "dpo_untied"), "labels", "sliced", "times_out"]  # sliced has it
    output = launch(folder_of(tiny_model, tmp_path), ranks, engine, checks)
    for check in checks:
        passed(tmp_path, check, output)
