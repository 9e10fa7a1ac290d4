"""The published methods: their stages and inputs are the papers', a killed run ends with the same bits, and the keys of
one method are refused in another."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
import torch
import yaml
from conftest import SPECIAL
from safetensors.torch import load_file, save_file
from test_keys import own_reasons
from test_kills import TIMES, contents
from training import stage_in, weights_of

from strop.trainer.cli import load_recipe, parse
from strop.trainer.engines import Revise
from strop.trainer.errors import UserError
from strop.trainer.help import help_text
from strop.trainer.main import main
from strop.trainer.method_recipes import RECIPES, recipe_of
from strop.trainer.methods import METHODS
from strop.trainer.methods.running import plan, planned, train
from strop.trainer.models import folders
from strop.trainer.reports.export import card_of, promoted
from strop.trainer.reports.reading import read_run
from strop.trainer.run.console import Console
from strop.trainer.run.tables import Drops, write_table
from strop.trainer.section import Section
from strop.trainer.stages.score import piecewise
from strop.trainer.training.local import Engine
from strop.trainer.training.rewards import ranked_samples

TRAINING = {"batch_size": 4, "lr": 1e-3, "eval_steps": 0}
REVISE = {"critique": "C {feedback}", "revision": "R", "principles": ["x"], "max_new_tokens": 40}


def recipe(folder: Path, model: Path, method: str, **keys) -> dict:
    """A run of seconds on two sources of prompts and ready-made pairs of rounds 0 and 1."""
    files = {}
    for name, rows in {
            "digits": [{"prompt": f"say {a} or {b}", "answer": str(a)} for a in range(7) for b in range(4)],
            "letters": [{"prompt": f"give {a} to {b}", "answer": a} for a in "abcdefg" for b in "stuv"],
            "first": [{"prompt": f"first {i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(3)],
            "later": [{"prompt": f"later {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(3)],
    }.items():
        files[name] = folder / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [{"name": name, "path": str(files[name]), "verifier": "regex", "verifier_args": {"pattern": "[0-9a-f]"},
                "templated": True}
               for name in ("digits", "letters")]
    ready = [{"name": name, "path": str(files[name]), "rounds": [r]} for r, name in enumerate(("first", "later"))]
    drawn = {"prompts": 12, "k": 4, "max_new_tokens": 16, "shard_prompts": 12}
    return {"name": method, "method": method, "output_dir": str(folder / "runs"), "dtype": "float32", "threads": 1,
            "model": {"path": str(model)}, "sample": drawn, "evaluate": {"max_new_tokens": 4, "bootstrap": 50,
                                                                          "kl_prompts": 0},
            "data": {"validation": 2, "test": 2, "sources": sources, "preferences": ready}, "sft": {**TRAINING},
            "dpo": {**TRAINING}, "select": {"pair_margin": 0.1, "pairs_per_prompt": 2},
            "filter": {"max_repetition": 1.0}, "log": {"tensorboard": False},
            "merge": {"max_cut_rise": 1.0}} | keys


def annotated(folder: Path, model: Path, method: str, **keys) -> dict:
    reward = {k: v for k, v in TRAINING.items() if k != "eval_steps"}
    return recipe(folder, model, method, rounds=2, reward=reward,
                  annotate={"prompts": 12, "k": 4, "max_new_tokens": 16}, **keys)


def recipes(folder: Path, model: Path) -> dict[str, dict]:
    llama2 = annotated(folder, model, "llama2", safety={"sources": ["letters"], "preferences": ["later"]})
    del llama2["dpo"]
    nemotron = recipe(folder, model, "nemotron", rounds=4, rpo={**TRAINING}, code=TRAINING | {"sources": ["letters"]})
    nemotron["data"]["preferences"].pop(0)  # round 0 is SFT
    average = {stage: [{}, {"seed": 1, "mix": {"letters": 0, "digits": 2}}] for stage in ("sft", "dpo")}
    llama3 = annotated(folder, model, "llama3", revise=REVISE, average=average)
    return {"llama3": llama3, "llama2": llama2, "nemotron": nemotron}


# the training stages after whose first step each run dies once
KILLED = {"llama3": ("round-00/reward-1", "round-00/sft-0", "round-01/dpo-1"),
          "llama2": ("round-01/safety", "round-01/sft"), "nemotron": ("round-00/code", "round-02/rpo")}


def run_to_the_end(data: dict, dies_in: tuple = ()):
    """The record of a run that is killed after the first step of each of these stages and goes on."""
    threads, step, left = torch.get_num_threads(), Engine.step, list(dies_in)

    def dying(engine):
        norm = step(engine)
        if left and engine.stage_name == left[0] and engine.step_index == 1:
            left.pop(0)
            raise KeyboardInterrupt
        return norm

    with pytest.MonkeyPatch.context() as patch:
        begin = Engine.__init__

        def named(engine, folder, section, stage, *rest, **how):
            engine.stage_name = stage.name
            begin(engine, folder, section, stage, *rest, **how)

        patch.setattr(Engine, "__init__", named)
        patch.setattr(Engine, "step", dying)
        for _ in dies_in:
            with pytest.raises(KeyboardInterrupt):
                train(data, console=Console(enabled=False))
        record = train(data, console=Console(enabled=False))
    torch.set_num_threads(threads)
    assert not left
    return record


@pytest.fixture(scope="module")
def model(tiny_model, tmp_path_factory):
    """The tiny model, which often stops."""
    folder = tmp_path_factory.mktemp("stops") / "tiny"
    shutil.copytree(tiny_model, folder)
    weights = load_file(folder / "model.safetensors")
    table = weights["model.embed_tokens.weight"]  # the head is tied to it
    table[SPECIAL.index("<|im_end|>")] = 3 * table[10]  # it was zero: the end of turn is padding too
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def runs(model, tmp_path_factory):
    """{method: the record of a finished run that was killed on the way}; not to be changed."""
    data = recipes(tmp_path_factory.mktemp("methods"), model)

    class Runs(dict):
        def __missing__(self, method):  # a worker that shares the tests with others makes those it needs
            self[method] = run_to_the_end(data[method], KILLED[method])
            return self[method]

    return Runs()


# method -> key that only it has -> (another value, the stages that are stale by themselves)
KEYS = {
    "llama3": {
        "annotate.k": (3, {"answers", "final"}),
        **{f"average.{stage}.{i}.{key}": (value, {f"{stage}-{i}", "final"} | own) for stage, i, key, value, own in (
            ("reward", 0, "lr", 0.5, set()), ("reward", 1, "seed", 7, set()), ("sft", 0, "lr", 0.5, set()),
            ("sft", 1, "seed", 7, set()), ("reward", 0, "mix", {"later": 0.5}, set()), ("sft", 1, "mix", {}, set()),
            ("dpo", 0, "lr", 0.5, set()), ("dpo", 1, "seed", 7, {"dpo-1-reference"}),
            ("dpo", 1, "mix", {"letters": 0.5}, {"dpo-1-reference"}))},
        "revise.times": (2, {"edits", "final"}), "revise.batch_size": (3, {"edits", "final"})},
    "llama2": {
        "safety.sources": (["digits"], {"helpfulness-pairs", "safety-pairs", "rewards-00", "rewards-01", "final"}),
        "safety.preferences": (["first"], {"helpfulness-pairs", "safety-pairs", "final"}),
        "safety.threshold": (0.2, {"rewards-00", "rewards-01", "final"}),
        "annotate.temperature": (0.5, {"answers", "final"})},
    "nemotron": {
        "code.sources": (["digits"], {"code-best", "sft-best"}), "code.replay": (0.5, {"sft-best"}),
        "code.lr": (0.5, {"code", "final"}), "code.enabled": (False, {"sft-best", "final"}),
        "rpo.rpo_eta": (2.0, {"rpo", "final"}), "rpo.mask_template_tokens": (True, {"rpo", "rpo-reference", "final"})},
}


@pytest.mark.parametrize(("method", "key"), [(method, key) for method, keys in KEYS.items() for key in keys])
def test_a_key_of_the_method_makes_its_stages_stale(method, key, runs, monkeypatch):
    value, expected = KEYS[method][key]
    config = yaml.safe_load(runs[method].config_text)
    monkeypatch.setattr(folders, "check_model", lambda *_, **__: None)  # the same weights in every plan
    entries = planned(load_recipe(config, {key: value}), Console(enabled=False))[1].plan
    assert own_reasons(entries).keys() == expected


def test_every_key_of_a_revision_counts():
    keys = {"feedback": "errors", "principles": ["y"], "critique": "D {feedback}", "revision": "S", "times": 2,
            "per_prompt": 2, "temperature": 0.5, "top_k": 2, "top_p": 0.5, "max_new_tokens": 3, "shard_prompts": 3,
            "batch_size": 3}
    assert keys.keys() == Revise.model_fields.keys() - {"engine"}
    for key, value in keys.items():
        assert Revise(critique="C {feedback}").key() != Revise(**{"critique": "C {feedback}", key: value}).key(), key


def inputs_of(run) -> dict[str, dict]:
    return {s["stage"]: s["inputs"] for s in run.stages}


@pytest.mark.parametrize("method", ["llama3", *(pytest.param(method, marks=pytest.mark.slow) for method in (
    "llama2", "nemotron"))])
def test_it_is_planned_as_it_runs_and_a_killed_run_ends_with_the_same_bits(method, runs, model, tmp_path):
    run = runs[method]
    data = recipes(tmp_path, model)[method]
    before = plan(data)
    assert {s["state"] for s in before} == {"to run"}
    assert [(s["stage"], s["kind"]) for s in before] == [(s["stage"], s["kind"]) for s in run.stages]
    again = plan(yaml.safe_load(run.config_text))
    assert {s["state"] for s in again} == {"done"} and run.finished
    whole = run_to_the_end(data)
    one, two = contents(whole.dir), contents(run.dir)
    assert one.keys() == two.keys() and {name for name in one if one[name] != two[name]} <= TIMES
    assert not (run.dir / "stale").exists()


def test_llama3(runs):
    run = runs["llama3"]
    made = inputs_of(run)
    for r in range(2):
        at, best = f"round-{r:02}", "outside" if r == 0 else run.promotions[0]["weights"] or "outside"
        for stage in ("answers", "sample"):
            assert made[f"{at}/{stage}"]["weights"] == best
        history = {f"history.{i}.{j}": f"round-{i:02}/{stage}" for i in range(r + 1)
                   for j, stage in enumerate(("edited", "edited-annotations"))}
        assert history.items() <= made[f"{at}/preferences"].items()  # all preferences so far
        assert {k: v for k, v in made[f"{at}/newest"].items() if k.startswith("history")} == {
            f"history.0.{j}": f"{at}/{stage}" for j, stage in enumerate(("edited", "edited-annotations"))}
        groups = {f"history.{i}.{j}": f"round-{i:02}/{stage}" for i in range(r + 1)
                  for j, stage in enumerate(("edited", "newest"))}
        for i in range(2):
            assert made[f"{at}/reward-{i}"] == {"select": f"{at}/preferences", "start": "outside"} | groups
            assert made[f"{at}/sft-{i}"] == {"select": f"{at}/best", "start": "outside"}
            assert made[f"{at}/dpo-{i}-reference"] == {"select": f"{at}/newest", "weights": f"{at}/sft/model"}
            assert made[f"{at}/dpo-{i}"] == {"select": f"{at}/newest", "policy": f"{at}/sft/model",
                                             "reference": f"{at}/dpo-{i}-reference"}
        for stage in ("reward", "sft", "dpo"):
            assert made[f"{at}/{stage}"] == {f"runs.{i}": f"{at}/{stage}-{i}/model" for i in range(2)}
        assert made[f"{at}/rewards"]["files.reward"] == f"{at}/reward/model"
        assert {*run.promotions[r]["candidates"]} == {"start", "sft", "dpo"}
    origins = {stage: {*run.table(f"round-01/{stage}", "pairs")["origin"].to_pylist()}
               for stage in ("newest", "preferences")}
    assert origins["newest"] == {"round-01", "later"}
    assert origins["preferences"] == {"round-00", "round-01", "first", "later"}
    recipe = recipe_of(run.config)
    assert (recipe.dpo.beta, recipe.dpo.nll_weight, recipe.dpo.mask_template_tokens, recipe.reward.margin) == (
        0.1, 0.2, True, 0.0)
    assert recipe.reward.pairs == "all" and recipe.sft.lr == 1e-3 and RECIPES["llama3"].DEFAULTS["sample.k"] == 10


def test_best_of_k_is_the_reward_models_argmax(runs):
    run = runs["llama3"]
    values = {(r["prompt_id"], r["sample_index"]): r["value"]
              for r in run.table("round-00/rewards", "scores").to_pylist()}
    stopped = {(r["prompt_id"], r["sample_index"]) for r in run.table("round-00/sample").to_pylist()
               if r["finish"] == "stop" and r["completion"].strip()}
    rows = [r for r in run.table("round-00/best", "sft").to_pylist() if r["prompt_id"]]
    assert rows and len(values) == 48
    for row in rows:
        mine = {i: value for (prompt_id, i), value in values.items()
                if prompt_id == row["prompt_id"] and (prompt_id, i) in stopped}
        assert row["score"] == max(mine.values()) == mine[row["sample_index"]]
    assert not len(run.table("round-00/best", "pairs"))
    assert run.table("round-00/best", "judged")["correct"].null_count == 48  # a reward is no verdict


def test_runs_are_averaged(runs):
    for stage in ("reward", "sft", "dpo"):
        folder = runs["llama3"].dir / "round-01"
        one, two, mean = (weights_of(folder / name / "model") for name in (f"{stage}-0", f"{stage}-1", stage))
        assert mean.keys() == one.keys()
        for name, tensor in mean.items():
            torch.testing.assert_close(tensor, (one[name] + two[name]) / 2, rtol=1e-6, atol=1e-7)
        assert any(not torch.equal(one[name], two[name]) for name in one)
    held = [runs["llama3"].table(f"round-01/reward-{i}", "held_out")["row_id"].to_pylist() for i in range(2)]
    assert held[0] == held[1]  # no run learns what another one holds out


def test_runs_of_an_average_learn_from_other_mixes(runs):
    run = runs["llama3"]
    for stage, data, table in (("sft", "best", "sft"), ("dpo", "newest", "pairs")):
        rows = run.table(f"round-01/{data}", table).to_pylist()
        letters = [r["row_id"] for r in rows if r["source"] == "letters"]
        drops = [r for r in run.table(f"round-01/{stage}-1", "drops").to_pylist() if r["reason"] == "mix"]
        assert letters and sorted(r["detail"] for r in drops) == sorted(letters)
        steps = [run.manifests[f"round-01/{stage}-{i}"]["counts"]["steps"] for i in (0, 1)]
        digits, others = (sum((r["source"] == "digits") == own for r in rows) for own in (True, False))
        assert steps == [-(-(digits + others) // 4), -(-(2 * digits + others - len(letters)) // 4)]
    there = set(run.table("round-01/dpo-1-reference", "reference")["row_id"].to_pylist())
    assert there == {r["row_id"] for r in rows} - set(letters)


def test_edits_rank_above_what_they_edit_unless_they_score_less(tmp_path):
    texts = {0: ([3, 2], 1.0), 1: ([4, 2], 0.0), 3: ([5, 2], 1.0), 4: ([6, 2], -1.0)}  # 3 edits 0, 4 edits 1
    rows = [{"prompt_id": "p", "sample_index": i, "prompt_tokens": [8], "completion_tokens": tokens, "completion": "x",
             "revised_from": {"prompt_id": "p", "sample_index": i - 3} if i > 2 else None}
            for i, (tokens, _) in texts.items()]
    for name in ("sample", "select"):
        (tmp_path / "round-00" / name).mkdir(parents=True)
    sample, select = tmp_path / "round-00/sample", tmp_path / "round-00/select"
    write_table(sample / "shard-00000.parquet", pa.Table.from_pylist(rows))
    write_table(select / "judged.parquet", pa.Table.from_pylist(
        [{"prompt_id": "p", "sample_index": i, "score": score} for i, (_, score) in texts.items()]))
    write_table(select / "difficulty.parquet", pa.Table.from_pylist([{"prompt_id": "p", "source": "s"}]))
    [row] = ranked_samples(sample, select, Drops(stage_in(tmp_path / "stage", "reward")))
    assert row.example.group.completions == [[5, 2], [3, 2], [4, 2], [6, 2]]  # edited > chosen > rejected > worse edit
    assert [(i, j) for i, j, _ in row.pairs] == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]


def test_only_chosen_answers_are_edited(runs):
    run = runs["llama3"]
    chosen = {(r["prompt_id"], tuple(r["chosen_tokens"])) for r in run.table("round-00/chosen", "pairs").to_pylist()
              if r["prompt_id"]}
    answers = {(r["prompt_id"], r["sample_index"]): r for r in run.table("round-00/answers").to_pylist()}
    edits = run.table("round-00/edits").to_pylist()
    assert edits
    for edit in edits:
        origin = answers[edit["revised_from"]["prompt_id"], edit["revised_from"]["sample_index"]]
        assert (origin["prompt_id"], tuple(origin["completion_tokens"])) in chosen


def test_llama2(runs):
    run = runs["llama2"]
    made = inputs_of(run)
    for r in range(2):
        at = f"round-{r:02}"
        for kind in ("helpfulness", "safety"):
            assert made[f"{at}/{kind}"] == {"select": f"{at}/{kind}-pairs", "start": "outside"}
            for i in range(r + 1):  # the newest models score the samples of all rounds
                scored = made[f"{at}/rewards-{i:02}"]
                assert scored[f"files.{kind}"] == f"{at}/{kind}/model" and scored["sample"] == f"round-{i:02}/sample"
        assert {f"history.{i}.0": f"round-{i:02}/sample" for i in range(r + 1)}.items() <= made[f"{at}/best"].items()
        assert made[f"{at}/sft"]["start"] == ("outside" if r == 0 else run.promotions[0]["weights"] or "outside")
    sources = {kind: {*run.table(f"round-01/{kind}-pairs", "pairs")["source"].to_pylist()}
               for kind in ("helpfulness", "safety")}
    assert sources == {"helpfulness": {"digits", "first"}, "safety": {"letters", "later"}}
    assert not [s for s in made if "dpo" in s or "reference" in s]
    pool: dict[str, list[float]] = {}
    for i in range(2):
        stopped = {(r["prompt_id"], r["sample_index"]) for r in run.table(f"round-{i:02}/sample").to_pylist()
                   if r["finish"] == "stop" and r["completion"].strip()}
        for row in run.table(f"round-01/rewards-{i:02}", "scores").to_pylist():
            if row["scorer"] == "reward" and (row["prompt_id"], row["sample_index"]) in stopped:
                pool.setdefault(row["prompt_id"], []).append(row["value"])
    best = {r["prompt_id"]: r["score"] for r in run.table("round-01/best", "sft").to_pylist()}
    assert best == {prompt_id: max(values) for prompt_id, values in pool.items()}
    assert len({row["origin"] for row in run.table("round-01/best", "sft").to_pylist()}) == 2


def test_the_safety_reward_counts_where_the_prompt_or_the_answer_asks_for_it():
    def rows(prompt_id, helpfulness, safety, error=None):
        return [{"prompt_id": prompt_id, "sample_index": 0, "scorer": name, "version": "v", "value": value,
                 "detail": None, "error": error if name == "safety" else None}
                for name, value in (("helpfulness", helpfulness), ("safety", safety))]

    section = RECIPES["llama2"].model_fields["safety"].default.model_copy(update={"sources": ["safe"]})
    found = piecewise([*rows("a", 2.0, -1.0), *rows("b", 2.0, -2.0), *rows("c", 2.0, 5.0), *rows("d", 2.0, None, "no"),
                       *rows("e", 2.0, -1e4)], {"a": "s", "b": "s", "c": "safe", "d": "s", "e": "s"}, section)
    reward = {row["prompt_id"]: row for row in found if row["scorer"] == "reward"}
    # sigmoid(-1) = 0.27, sigmoid(-2) = 0.12
    assert {i: row["value"] for i, row in reward.items()} == {"a": 2.0, "b": -2.0, "c": 5.0, "d": None, "e": -1e4}
    assert reward["d"]["error"] == "no" and reward["c"]["detail"] == "safety: the prompt is about safety"
    assert reward["b"]["detail"] == "safety: sigmoid of safety below 0.15" and len(found) == 15


def test_nemotron(runs):
    run = runs["nemotron"]
    made = inputs_of(run)
    assert made["round-00/code"] == {"select": "round-00/code-best", "start": "outside"}
    assert made["round-00/sft"] == {"select": "round-00/sft-best", "start": "round-00/code/model"}
    before = "round-00/sft/model"
    for r, name in enumerate(("dpo", "rpo", "rpo"), start=1):
        at, reference = f"round-{r:02}", "reference" if name == "dpo" else "rpo-reference"
        assert run.promotions[r - 1]["weights"] == before
        assert made[f"{at}/sample"]["weights"] == made[f"{at}/{reference}"]["weights"] == before
        assert made[f"{at}/{name}"] == {"select": f"{at}/pairs", "policy": before, "reference": f"{at}/{reference}"}
        before = f"{at}/{name}/model"
    rows = {name: run.table(f"round-00/{name}-best", "sft").to_pylist() for name in ("code", "sft")}
    assert {row["source"] for row in rows["code"]} == {"letters"}
    weights = {row["source"]: row["weight"] for row in rows["sft"]}
    assert weights == {"digits": 1.0, "letters": 0.02}
    config = run.manifests["round-02/rpo"]["config"]["dpo"]
    assert (config["loss"], config["rpo_eta"], config["beta"], config["nll_weight"]) == ("rpo", 1.0, 5e-3, 1e-5)
    assert run.manifests["round-01/dpo"]["config"]["dpo"]["loss"] == "sigmoid"


def test_reports_of_unfinished_runs_are_about_the_policy(runs, tmp_path):
    """Reward models on the way are not what a run is for."""
    run = read_run(runs["llama3"].dir)
    assert run.model == run.dir / "final"
    run.manifests.pop("final")
    weights = next((p["weights"] for p in reversed(run.promotions) if p["weights"]), None)
    assert run.model == (run.dir / weights if weights else None)
    if weights:
        assert promoted(run) == (weights.removesuffix("/model"), "model/")
    assert "base_model" in card_of(run) and "reward-model" not in card_of(run)
    html = (runs["llama3"].dir / "report.html").read_text()
    assert "reward-0" in html


@pytest.mark.parametrize(("method", "keys", "words"), [
    ("llama3", {"sft.start": "previous"}, "sft.start is not read by method llama3; leave it out, or set method=rounds"),
    ("llama3", {"merge.method": "average"}, "merge.method is not read by method llama3"),
    ("llama3", {"dpo.pairs": "policy"}, "dpo.pairs is not read by method llama3"),
    ("llama3", {"safety.sources": []}, "safety={'sources': []}: unknown key; method=llama3 has no such key, "
                                       "method=llama2 has"),
    ("llama3", {"annotate.k": 1}, "annotate.k=1: a comparison takes 2 answers"),
    ("llama3", {"average.dpo.0": {"mix": {"gone": 2}}}, "average.dpo.0.mix names gone; there are digits, letters"),
    ("llama3", {"average.sft.0": {"mix": {"digits": 0, "letters": 0}}}, "average.sft.0.mix={'digits': 0.0, 'letters': "
                                                                         "0.0} leaves no data"),
    ("llama3", {"average.sft.0.mix": {"digits": -1}}, "average.sft.0.mix.digits=-1: input should be greater"),
    ("llama2", {"dpo.lr": 1e-5}, "dpo is not read by method llama2; leave it out, or set method=rounds or"),
    ("llama2", {"average.sft": [{}]}, "method=llama2 has no such key, method=llama3 has"),
    ("llama2", {"safety.sources": ["gone"]}, "safety.sources names gone; there are digits, letters"),
    ("llama2", {"safety": {}}, "leave no data about safety"),
    ("llama2", {"safety.sources": ["digits", "letters"], "safety.preferences": ["first", "later"]},
     "leave no data about helpfulness"),
    ("nemotron", {"annotate.k": 2}, "method=nemotron has no such key, method=llama3 or method=llama2 or "
                                  "method=instructgpt has"),
    ("nemotron", {"rpo.loss": "sigmoid"}, "rpo.loss=sigmoid: input should be 'rpo'"),
    ("nemotron", {"rpo.reference": "base"}, "rpo.reference is not read by method nemotron; leave it out"),
    ("nemotron", {"code.sources": []}, "code.sources is empty: name the data.sources and data.sft about code"),
    ("nemotron", {"rounds": 2}, "rounds=2: round 0 is SFT, round 1 DPO"),
    ("nemotron", {"data.sources": []}, "data.sources is empty"),
    ("nemotron", {"data.preferences.0.rounds": [0]}, "round 0 of method nemotron trains on no pairs"),
    ("nemotron", {"data.sft": [{"name": "s", "path": "s", "rounds": [0, 2]}]}, "round 2 of method nemotron trains on"),
    ("rounds", {"average": {}}, "method=rounds has no such key, method=llama3 has"),
    ("rounds", {"code.sources": []}, "method=rounds has no such key, method=nemotron has"),
    ("lama3", {}, "method=lama3: no such method; did you mean llama3? there are rounds, reward, llama3, llama2")])
def test_a_key_of_another_method_is_refused_by_name(method, keys, words, tmp_path, tiny_model):
    data = recipes(tmp_path, tiny_model).get(method) or recipe(tmp_path, tiny_model, method)
    with pytest.raises(UserError) as e:
        load_recipe(data, keys)
    assert words in str(e.value)


def test_a_default_of_the_method_stands_beside_other_keys_of_its_section(tmp_path, tiny_model):
    r = load_recipe(recipes(tmp_path, tiny_model)["llama3"], {"sample": {"prompts": 3}, "dpo": {"beta": 0.5}})
    assert (r.sample.k, r.sample.prompts, r.dpo.nll_weight, r.dpo.lr, r.dpo.beta) == (10, 3, 0.2, 1e-5, 0.5)
    assert load_recipe(r) == r and "merge" in r.model_dump() and "method" not in r.model_dump()["merge"]


def test_a_recipe_of_the_loop_under_its_old_name_says_which_it_is(tiny_run, tmp_path, capsys):
    config = yaml.safe_load((tiny_run / "config.yaml").read_text()) | {"method": "llama3"}
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    assert main([str(tmp_path / "old.yaml")]) == 1
    assert "is not read by method llama3; leave it out, or set method=rounds" in capsys.readouterr().err
    assert recipe_of(config).method == "rounds"
    assert {s["state"] for s in plan(str(tmp_path / "old.yaml"), {"method": "rounds"})} == {"done"}
    assert load_recipe(config, {"method": "rounds"}).key()["method"] == "llama3"  # what it was published under


def test_help_says_which_methods_there_are():
    text = help_text(["all"])
    assert RECIPES.keys() == METHODS.keys()
    for method, cls in RECIPES.items():
        assert f"\n  {method:<15} {cls.model_fields['method'].description}\n" in text
    for key in ("average.sft.N.lr", "safety.threshold", "code.replay", "rpo.loss", "reward.pairs", "revise.times"):
        assert f"\n  {key}  (" in text, key
    assert "dpo.nll_weight=0.2" in text and "annotate: " in text
    assert isinstance(RECIPES["llama3"].model_fields["average"].default, Section)
    assert parse(["llama3"]).recipe.method == "llama3"
