"""Which stages a change of the recipe makes stale: every key, against a table written by hand."""

import json
import re
import shutil
from typing import get_args, get_origin

import pytest
import torch
from conftest import CHATML, write_recipe
from keytable import (
    HELD_OUT,
    NOTHING,
    SAMPLE,
    STAGES,
    TABLE,
    Also,
)
from test_reward import reward_folder

from strop.trainer.cli import load_recipe
from strop.trainer.config import Recipe, Section
from strop.trainer.engines import Revise, sections_of, tag_of
from strop.trainer.main import main
from strop.trainer.method_recipes import RECIPES, has_key
from strop.trainer.methods.running import planned
from strop.trainer.models import folders
from strop.trainer.run.console import Console
from strop.trainer.run.files import read_json
from strop.trainer.scorers import ServedJudge, VllmJudge

UPSTREAM = "its inputs are re-run"

REWARD = {f"reward.{key}": (value, {"reward"}) for key, value in {
    "epochs": 2.0, "batch_size": 3, "max_tokens": 4096, "max_length": 400, "lr": 0.5, "schedule": "linear",
    "warmup_ratio": 0.2, "min_lr_ratio": 0.1, "optimizer": "muon", "moments": "int8", "weight_decay": 0.1,
    "betas": [0.9, 0.99], "eps": 1e-6, "grad_clip": 2.0,
    "activation_checkpointing": True, "activation_offload": Also(True, {"reward.activation_checkpointing": True}),
    "compile": True, "snapshots": 2, "ema_decay": 0.25, "bema": True,
    "bema_bias_power": Also(0.3, {"reward.bema": True}), "bema_ema_power": Also(0.4, {"reward.bema": True}),
    "bema_lag": Also(5, {"reward.bema": True}), "pairs": "all", "margin": 1.0,
    "label_smoothing": 0.1, "centering": 0.01, "held_out": 0.2}.items()} | {
    "reward.checkpoint_steps": (3, NOTHING),
    "reward.masters": (Also("split", {"dtype": "bfloat16"}), {"sample", "reward"})}


# the keys of online, in a run of method committee with that stage alone
ONLINE = {f"online.{key}": (value, {"online", "final"}) for key, value in {
    "epochs": 3, "batch_size": 3, "max_tokens": 4096, "max_length": 400, "lr": 0.5, "schedule": "linear",
    "warmup_ratio": 0.2, "min_lr_ratio": 0.1, "optimizer": "muon", "moments": "int8", "weight_decay": 0.1,
    "betas": [0.9, 0.99], "eps": 1e-6, "grad_clip": 2.0,
    "activation_checkpointing": True, "activation_offload": Also(True, {"online.activation_checkpointing": True}),
    "compile": True, "snapshots": 2, "ema_decay": 0.25, "bema": True, "eval_steps": 3,
    "bema_bias_power": Also(0.3, {"online.bema": True}), "bema_ema_power": Also(0.4, {"online.bema": True}),
    "bema_lag": Also(5, {"online.bema": True}), "eval_prompts": 5, "max_cut_rise": 0.5, "max_length_ratio": 3.0,
    "max_kl": 0.5, "steps": 3, "k": 3, "loss": Also("rloo", {"online.epochs": 1}), "beta": 0.0, "mirror_weight": 2.0,
    "anchor": Also("ema", {"online.ema_decay": 0.5}), "missing_eos_penalty": 0.5, "max_new_tokens": 9,
    "decode_batch": 16,
    "temperature": Also(0.5, {"online.loss": "ipo", "online.epochs": 1})}.items()} | {
    "online.checkpoint_steps": (3, NOTHING), "online.masters": (Also("split", {"dtype": "bfloat16"}), {
        "baseline-held-out", "sample-start", "online", "held-out", "final"}),
    "online.enabled": (False, {"held-out", "final"})}


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    """A finished run of one round with a source of prompts, ready data of both kinds and a chat template; not to be
    changed. Beside it lies what the table's values name."""
    folder, threads = tmp_path_factory.mktemp("keys"), torch.get_num_threads()
    path = write_recipe(folder, tiny_model)
    rows = {"sft": {"prompt": "ab", "completion": "cd"},
            "preferences": {"prompt": "ab", "chosen": "cd", "rejected": "ef", "margin": 1.0}}
    for kind, row in rows.items():
        (folder / f"{kind}.jsonl").write_text(json.dumps(row) + "\n")
        (folder / f"other-{kind}.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"prompt": "gh"}) + "\n")
    (folder / "other.jsonl").write_text((folder / "prompts.jsonl").read_text() + '{"prompt": "say 0", "answer": "0"}\n')
    (folder / "chat.jinja").write_text(CHATML)
    (folder / "other.jinja").write_text(CHATML + "{# other #}")
    shutil.copytree(tiny_model, folder / "other-model")
    reward_folder(tiny_model, folder / "reward-model")
    (folder / "other-model" / "special_tokens_map.json").write_text('{"pad_token": "<|im_end|>"}')
    text = path.read_text().replace("rounds: 2", "rounds: 1\ndevice: cpu")
    text = text.replace(f"model: {{path: {tiny_model}}}",
                        f"model: {{path: {tiny_model}, chat_template: {folder / 'chat.jinja'}}}")
    ready = "".join(f"  {kind}: [{{name: {kind}, path: {folder / kind}.jsonl}}]\n" for kind in rows)
    text = text.replace("  sources:\n", ready + "  sources:\n")
    text = text.replace("      verifier: regex\n      verifier_args: {pattern: \"[0-9]\"}\n", f"""\
      scorers:
        - {{python: {folder / "mine.py"}:grade, weight: 0.001}}
        - {{rule: regex, args: {{pattern: "[0-9]"}}}}
""")
    (folder / "mine.py").write_text("def grade(completion):\n    return len(completion)\n\n\nother = grade\n")
    path.write_text(text.replace("evaluate: {max_new_tokens: 8", "evaluate: {max_new_tokens: 1"))
    assert main([str(path)]) == 0
    torch.set_num_threads(threads)
    assert read_json(folder / "runs/tiny/promotions.json")[0]["promoted"] == "merge"
    return path


@pytest.fixture(autouse=True)
def quick_plans(monkeypatch):
    """Plans look at no weights: they are the same in hundreds of plans."""
    monkeypatch.setattr(folders, "check_model", lambda *_, **__: None)


def plan(path, overrides=None) -> list[dict]:
    """The plan of the recipe with these keys; for another run directory, in a copy of the run."""
    recipe = load_recipe(path, overrides)
    there, new = path.parent / "runs" / "tiny", path.parent / recipe.output_dir / recipe.name
    if new != there:
        shutil.copytree(there, new, dirs_exist_ok=True)
    return planned(recipe, Console(enabled=False))[1].plan


def own_reasons(entries: list[dict]) -> dict[str, list[str]]:
    """Stale stage -> why, without what follows from stages before it."""
    found = {e["stage"].split("/")[-1]: [why for why in e["why"].split("; ") if why != UPSTREAM]
             for e in entries if e["state"] == "stale"}
    return {stage: why for stage, why in found.items() if why}


def stale(entries: list[dict]) -> set[str]:
    return {e["stage"] for e in entries if e["state"] == "stale"}


def closure(entries: list[dict]) -> set[str]:
    """What must be stale in this plan: stages that are so by themselves, and what is made from stages that will run."""
    own, running = own_reasons(entries), set()
    for e in entries:
        made_from = any(f"{origin}/".startswith(f"{stage}/") for origin in e["inputs"].values() for stage in running)
        if e["stage"].split("/")[-1] in own or e["state"] == "to run" or made_from:
            running.add(e["stage"])
    return {e["stage"] for e in entries if e["stage"] in running and e["state"] != "to run"}


def fields(section: type[Section], prefix: str = "", every: bool = False):
    """Every key below a section, N for any entry of a list; with `every` also those of other engines."""
    for name, info in section.model_fields.items():
        inner = sections_of(info.annotation)
        for one in inner if every else inner[:1]:
            yield from fields(one, f"{prefix}{name}{'.N.' if get_origin(info.annotation) is list else '.'}", every)
        if not inner:
            yield prefix + name


def test_every_key_has_its_entry():
    keys = {key for recipe in RECIPES.values() for key in fields(recipe)
            if has_key(recipe, [part for part in key.split(".") if part != "N"])}
    keys -= {key for key in keys for section, like in LIKE.items() if key.replace(f"{section}.", f"{like}.", 1) in keys
             and key.startswith(f"{section}.")}
    assert all(len(get_args(recipe.model_fields["method"].annotation)) == 1 for recipe in RECIPES.values())
    unsaid = keys - TABLE.keys() - REWARD.keys() - ONLINE.keys()
    known = OTHER_METHODS | {"method", "sample.engine", "evaluate.engine", "write_prompts.engine", "reward.enabled",
             "data.sources.N.scorers.N.judge.models.N.engine"}
    assert unsaid == known, "say which stages these make stale"
    assert TABLE.keys() | REWARD.keys() | ONLINE.keys() <= keys, "these keys are no longer there"


# sections of other methods that are those of another one, with the keys below besides
LIKE = {"annotate": "sample", "compare": "sample", "code": "sft", "rpo": "dpo"}
# keys of other methods, which test_methods.py changes
OTHER_METHODS = {"average.reward.N.lr", "average.reward.N.seed", "average.sft.N.lr", "average.sft.N.seed",
                 "average.dpo.N.lr", "average.dpo.N.seed", "average.reward.N.mix", "average.sft.N.mix",
                 "average.dpo.N.mix", "safety.sources", "safety.preferences", "safety.threshold",
                 "code.sources", "code.replay", *(f"revise.{key}" for key in Revise.model_fields)}


def test_sections_that_are_like_others_count_like_them():
    for recipe in RECIPES.values():
        for section, like in LIKE.items():
            for one in sections_of(recipe.model_fields[section].annotation) if section in recipe.model_fields else ():
                other = next(s for s in sections_of(Recipe.model_fields[like].annotation) if issubclass(one, s))
                assert all(one.model_fields[key].json_schema_extra == info.json_schema_extra
                           for key, info in other.model_fields.items())


SERVER = {"engine": "openai", "base_url": "http://localhost:1/v1", "model": "m"}
# section -> (its data, {key: (another value, whether it counts)}) of the engines that the table above does not have
ENGINES = {
    "vllm": ({"engine": "vllm"}, {
        "python": ("other/bin/python", False), "tensor_parallel_size": (2, False), "memory": (0.5, False),
        "engine_args": ({"enforce_eager": True}, True)}),
    "openai": (SERVER, {
        "base_url": ("http://localhost:2/v1", True), "model": ("n", True), "key_env": ("A_KEY", False),
        "request": ({"min_p": 0.1}, True), "concurrency": (2, False), "timeout": (2.0, False), "retries": (2, False),
        "requests_per_minute": (2, False), "tokens_per_minute": (2, False), "budget": (2, False),
        "prompt_price": (2.0, False), "completion_price": (2.0, False)}),
    "models": ({"models": [{"name": "a"}, {"name": "b"} | SERVER]}, {
        "models": ([{"name": "a"}, {"name": "c"} | SERVER], True)}),
}
OF_WRITER = {"name": ("b", True), "share": (2.0, True), "weights": ("start", True), "path": ("elsewhere", False)}


@pytest.mark.parametrize(("section", "stages"), [("sample", SAMPLE), ("evaluate", HELD_OUT),
                                                 ("write_prompts", {"final"})])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_key_of_an_engine_counts_if_it_can_change_what_is_written(run, section, stages, engine):
    members = sections_of(Recipe.model_fields[section].annotation)
    classes = [c for c in members if tag_of(c) == engine]
    data, table = ENGINES[engine]
    if engine == "models" and classes:
        for writer in sections_of(classes[0].model_fields["models"].annotation):
            start = {"name": "a"} | ENGINES.get(tag_of(writer), ({}, {}))[0]
            keys = {"batch_size": (3, True)} | ENGINES.get(tag_of(writer), ({}, {}))[1] | OF_WRITER
            assert writer.model_fields.keys() - keys.keys() == {"engine"}
            for name in writer.model_fields.keys() - {"engine"}:
                value, counts = keys[name]
                assert (writer(**start).key() != writer(**start | {name: value}).key()) == counts, name
    for one in classes:
        shared = {name for c in members for name in c.model_fields} - {n for n in table}
        assert one.model_fields.keys() - table.keys() <= shared, "say in ENGINES whether these keys count"
        for name, (value, counts) in table.items():
            assert (one(**data).key() != one(**data | {name: value}).key()) == counts, name
        recipe = load_recipe(run).model_dump(mode="json")
        keep = {name: value for name, value in recipe[section].items() if name in one.model_fields and name != "engine"}
        why = own_reasons(planned(load_recipe(recipe | {section: keep | data}), Console(enabled=False))[1].plan)
        assert why.keys() == stages


def test_a_key_of_a_judge_on_a_server_counts_if_it_can_change_verdicts():
    keys = ENGINES["openai"][1] | {"max_new_tokens": (2, True), "name": ("j", True)}
    refused = {"budget", "prompt_price", "completion_price"}
    assert ServedJudge.model_fields.keys() - keys.keys() == {"engine"}
    for name in keys.keys() - refused:
        value, counts = keys[name]
        assert (ServedJudge(**SERVER).key() != ServedJudge(**SERVER | {name: value}).key()) == counts, name


def test_a_key_of_a_judge_on_vllm_counts_if_it_can_change_verdicts():
    keys = ENGINES["vllm"][1] | {"max_tokens": (2, True), "name": ("j", True), "path": ("elsewhere", True)}
    assert VllmJudge.model_fields.keys() - keys.keys() == {"engine"}
    for name, (value, counts) in keys.items():
        assert (VllmJudge().key() != VllmJudge(**{name: value}).key()) == counts, name


@pytest.mark.parametrize("key", TABLE)
def test_a_key_makes_stale_what_depends_on_it_and_nothing_else(run, key):
    value, expected = TABLE[key]
    others = json.dumps(value.others if isinstance(value, Also) else {})
    others = json.loads(others.replace("{folder}", str(run.parent)))
    value = value.value if isinstance(value, Also) else value
    value = value.replace("{folder}", str(run.parent)) if isinstance(value, str) else value
    dotted = key.replace(".N.", ".0.")
    before, after = (load_recipe(run, o).model_dump(mode="json") for o in ({}, {dotted: value} | others))
    for part in dotted.split("."):
        before, after = (tree and tree[int(part) if part.isdigit() else part] for tree in (before, after))
    assert before != after == value, "the table's value is the one that the run has"
    entries = plan(run, {dotted: value} | others)
    own = own_reasons(entries)
    assert own.keys() == expected, own
    assert stale(entries) == closure(entries)


@pytest.fixture(scope="module")
def reward_run(run, tiny_model):
    """A finished run of method reward, with ready pairs and samples; not to be changed."""
    folder, threads = run.parent / "reward", torch.get_num_threads()
    folder.mkdir()
    rows = [{"prompt": f"say {i}", "chosen": f"{i}", "rejected": "no"} for i in range(9)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "rm.yaml"
    path.write_text(f"""\
name: rm
method: reward
output_dir: {folder / 'runs'}
dtype: float32
threads: 1
device: cpu
model: {{path: {tiny_model}}}
data:
  validation: 5
  test: 5
  preferences: [{{name: pairs, path: {folder / 'pairs.jsonl'}, near_duplicates: false}}]
  sources:
    - {{name: digits, path: {run.parent / 'prompts.jsonl'}, verifier: regex, verifier_args: {{pattern: "[0-9]"}}}}
sample: {{prompts: 20, k: 6, max_new_tokens: 16}}
log: {{tensorboard: false}}
""")
    assert main([str(path)]) == 0
    torch.set_num_threads(threads)
    return path


def check_stale(run, key: str, value, expected: set[str]) -> None:
    """Another value of `key` makes the expected stages stale by themselves, and what is made from them."""
    others = value.others if isinstance(value, Also) else {}
    value = value.value if isinstance(value, Also) else value
    entries = planned(load_recipe(run, {key: value} | others), Console(enabled=False))[1].plan
    assert own_reasons(entries).keys() == expected
    assert stale(entries) == closure(entries)


@pytest.mark.parametrize("key", REWARD)
def test_a_key_of_the_reward_model_makes_it_stale(reward_run, key):
    check_stale(reward_run, key, *REWARD[key])


@pytest.fixture(scope="module")
def online_run(run, tiny_model):
    """A finished run of method committee that trains online only; not to be changed."""
    folder, threads = run.parent / "online", torch.get_num_threads()
    folder.mkdir()
    path = write_recipe(folder, tiny_model)
    text = path.read_text().replace("rounds: 2", "method: committee\nrounds: 1\ndevice: cpu")
    text = re.sub("(?m)^(sft|dpo): .*", r"\1: {enabled: false}", text)
    path.write_text(text + "online: {steps: 2, batch_size: 2, max_new_tokens: 8}\n")
    assert main([str(path)]) == 0
    torch.set_num_threads(threads)
    return path


@pytest.mark.parametrize("key", ONLINE)
def test_a_key_of_online_training_makes_it_stale(online_run, key):
    check_stale(online_run, key, *ONLINE[key])


def test_nothing_is_stale_without_a_change(run):
    entries = plan(run)
    assert [e["stage"].split("/")[-1] for e in entries] == list(STAGES) and {e["state"] for e in entries} == {"done"}


def test_templated_prompts_change_what_ready_data_is_held_against(run):
    entries = {e["stage"]: e for e in plan(run, {"data.sources.0.templated": True})}
    assert entries["round-00/select"]["why"].startswith("sources.digits.templated: False -> True; ")
    assert entries["round-00/sample"]["why"] == UPSTREAM


def test_how_often_training_saves_changes_nothing(run):
    for stage in ("sft", "dpo"):
        assert not stale(plan(run, {f"{stage}.checkpoint_steps": 99, "log.interval": 5, "threads": 2}))


def test_a_template_and_weights_count_by_their_content_wherever_they_lie(run, tmp_path):
    shutil.copy(run.parent / "chat.jinja", tmp_path / "copy.jinja")
    assert not stale(plan(run, {"model.chat_template": str(tmp_path / "copy.jinja")}))
    shutil.copytree(load_recipe(run).model.path, tmp_path / "copy")
    entries = plan(run, {"model.path": str(tmp_path / "copy")})
    assert own_reasons(entries).keys() == {"final"} == stale(entries)  # its card names the model


def test_a_file_that_changes_counts_by_its_content(run):
    for name, stages in (("prompts.jsonl", {"prompts"}), ("sft.jsonl", {"select"}), ("preferences.jsonl", {"select"}),
                         ("mine.py", {"baseline", "score"})):  # nothing is sampled again
        path = run.parent / name
        text = path.read_text()
        path.write_text(text + text.splitlines()[0] + "\n")
        try:
            entries = plan(run)
            assert own_reasons(entries).keys() == stages and stale(entries) == closure(entries)
        finally:
            path.write_text(text)
        assert not stale(plan(run))


def test_the_plan_does_not_guess_what_an_evaluation_will_promote(run):
    """A run that was killed before its evaluation is planned, and what follows is not said to be done."""
    shutil.copytree(run.parent / "runs/tiny", run.parent / "runs/unmeasured")
    shutil.rmtree(run.parent / "runs/unmeasured/round-00/evaluate")
    _, store = planned(load_recipe(run, {"name": "unmeasured"}), Console(enabled=False))
    entries = {e["stage"].split("/")[-1]: e for e in store.plan}
    assert entries["evaluate"]["state"] == "to run" and entries["merge"]["state"] == "done"
    assert entries["final"]["state"] == "stale" and UPSTREAM in entries["final"]["why"]


def test_which_keys_of_written_prompts_count(run):
    section = load_recipe(run, {"write_prompts.enabled": True}).write_prompts
    keys = {key.rpartition(".")[2]: value for key, (value, _) in TABLE.items() if key.startswith("write_prompts.")}
    counts = {name for name, value in keys.items() if section.model_copy(update={name: value}).key() != section.key()}
    assert keys.keys() - counts == {"enabled", "path"}  # a stage that is asked for; and the content of the path counts
