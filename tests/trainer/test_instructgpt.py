"""Method instructgpt: its stages are the paper's, and the comparison's numbers are those of its tables."""

import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from statistics import fmean

import pytest
import torch
from test_keys import own_reasons
from test_methods import TRAINING, recipe
from test_methods import model as stopping  # noqa: F401 - a fixture
from transformers import AutoModelForCausalLM

from strop.trainer.cli import load_recipe
from strop.trainer.errors import UserError
from strop.trainer.methods.running import plan, train
from strop.trainer.reports.best_of import kl_bound
from strop.trainer.reports.charts import Line, line_chart
from strop.trainer.reports.comparison import figure
from strop.trainer.run.console import Console
from strop.trainer.run.files import read_json
from strop.trainer.stages.compare import KL_TOKENS, first_tokens, wins_over


def data_of(folder, model) -> dict:
    data = recipe(folder, model, "instructgpt", reward={k: v for k, v in TRAINING.items() if k != "eval_steps"},
                  annotate={"prompts": 12, "k": 4, "max_new_tokens": 16},
                  online=TRAINING | {"steps": 3, "max_new_tokens": 12, "lr": 1e-2},
                  compare={"prompts": 6, "k": 16, "max_new_tokens": 12})
    data["data"] |= {"test": 8}
    data["data"]["preferences"].pop()  # of a second round
    del data["dpo"]
    return data


@pytest.fixture(scope="module")
def run(stopping, tmp_path_factory):  # noqa: F811
    folder, threads = tmp_path_factory.mktemp("instructgpt"), torch.get_num_threads()
    record = train(data_of(folder, stopping), console=Console(enabled=False))
    torch.set_num_threads(threads)
    return record


def test_its_stages_are_the_papers(run):
    made = {s["stage"].removeprefix("round-00/"): {k: v.removeprefix("round-00/") for k, v in s["inputs"].items()}
            for s in run.stages}
    assert made["sft"]["start"] == "outside" and made["answers"]["weights"] == "sft/model"
    assert made["reward"].items() >= {"start": "sft/model", "select": "preferences", "history.0.0": "answers"}.items()
    assert made["online"].items() >= {"policy": "sft/model", "reference": "sft/model",
                                      "files.reward": "reward/model"}.items()
    assert made["compared-rewards"].items() >= {"sample": "compared", "files.reward": "reward/model"}.items()
    assert made["comparison"].items() >= {"start": "sft/model", "policies.online": "online/model"}.items()
    rollouts = run.table("round-00/online/rollouts", "step-000001").to_pylist()
    assert {score["scorer"] for row in rollouts for score in row["scores"]} == {"reward"}
    assert {row["score"] for row in rollouts if len(row["scores"]) == 1} == {
        row["scores"][0]["value"] for row in rollouts}
    tests = {r["prompt_id"] for r in run.table("prompts", "prompts").to_pylist() if r["split"] == "test"}
    compared = run.table("round-00/compared").to_pylist()
    writers = defaultdict(set)
    for row in compared:
        writers[row["writer"]].add(row["prompt_id"])
    assert writers["sft"] == writers["online"] <= tests and len(writers["sft"]) == 6 and len(compared) == 6 * 16


def test_the_comparison_is_that_of_its_tables(run):
    """Wins by enumeration, the KL from plain transformers' logits."""
    rows = run.table("round-00/compared").to_pylist()
    for name, stage in (("score", "compared-scores"), ("reward", "compared-rewards")):
        values = {(r["prompt_id"], r["sample_index"]): r["value"]
                  for r in run.table(f"round-00/{stage}", "scores").to_pylist()}
        for row in rows:
            row[name] = values[row["prompt_id"], row["sample_index"]]
    mine, theirs = ([r for r in rows if r["writer"] == writer] for writer in ("online", "sft"))
    found = {r["name"]: r for r in read_json(run.dir / "round-00/comparison/comparison.json")}
    assert list(found) == ["best of 1", "best of 2", "best of 4", "best of 8", "online"]
    by_prompt = defaultdict(list)
    for a in mine:
        by_prompt[a["prompt_id"]] += [(a["score"] > b["score"]) + 0.5 * (a["score"] == b["score"])
                                      for b in theirs if b["prompt_id"] == a["prompt_id"]]
    assert found["online"]["win_rate"] == pytest.approx(fmean(map(fmean, by_prompt.values())))
    best = {p: max((r for r in theirs if r["prompt_id"] == p), key=lambda r: r["reward"]) for p in by_prompt}
    assert found["best of 8"]["reward"] == pytest.approx(fmean(r["reward"] for r in best.values()))
    assert found["best of 1"]["score"] == pytest.approx(fmean(r["score"] for r in theirs))
    assert found["best of 1"]["win_rate"] == pytest.approx(0.5) and found["best of 4"]["kl"] == kl_bound(4)
    policy, start = (AutoModelForCausalLM.from_pretrained(run.dir / f"round-00/{s}/model", dtype=torch.float32)
                     for s in ("online", "sft"))
    nats = []
    for row in mine:
        ids = torch.tensor([row["prompt_tokens"] + row["completion_tokens"]])
        with torch.no_grad():
            p, q = (m(ids).logits[0, len(row["prompt_tokens"]) - 1:-1].log_softmax(-1) for m in (policy, start))
        nats.append((p.exp() * (p - q)).sum().item())
    assert found["online"]["kl"] == pytest.approx(fmean(nats), rel=1e-3) and fmean(nats) > 0.01
    text = (run.dir / "round-00/comparison/comparison.md").read_text()
    assert "| best of 4 | ≤ 0.636 |" in text and "| online |" in text
    drawn = ElementTree.parse(run.dir / "round-00/comparison/comparison.svg").getroot()
    assert len([e for e in drawn if e.tag.endswith("svg")]) == 3
    page = (run.dir / "report.html").read_text()
    assert 'id="compared"' in page and "bound n/(n+1)" in page and page.count("≤ 0.636") == 1


def test_keys_count_where_they_are_read(run, tmp_path):
    for key, value, stages in (("compare.k", 12, {"compared-sft", "compared-online"}), ("annotate.k", 3, {"answers"}),
                               ("online.beta", 0.5, {"online"}), ("reward.lr", 0.5, {"reward"})):
        assert own_reasons(plan(run.config, {key: value})).keys() == stages | {"final"}
    assert {s["state"] for s in plan(run.config)} == {"done"}
    for key, value, words in (("compare.temperature", 0.5, "compare.temperature is not read by method instructgpt"),
                              ("compare.k", 5, "compare.k=5: half of them are the SFT weights'"),
                              ("dpo.lr", 0.5, "dpo is not read by method instructgpt")):
        with pytest.raises(UserError, match=words):
            load_recipe(run.config, {key: value})


def test_wins_are_over_all_pairs_and_ties_count_half():
    rows = [{"prompt_id": p, "score": s} for p, s in (("a", 1.0), ("a", 0.0), ("b", 2.0), ("c", 1.0))]
    others = [{"prompt_id": p, "score": s} for p, s in (("a", 0.0), ("a", 0.0), ("b", 3.0), ("d", 0.0))]
    assert wins_over(rows, others) == [0.75, 0.0]


def test_the_kl_is_of_every_prompt_before_it_is_of_many_completions():
    rows = [{"prompt_id": p, "completion_tokens": [0] * (KL_TOKENS // 5), "i": i} for p in "abc" for i in range(3)]
    assert [(r["prompt_id"], r["i"]) for r in first_tokens(rows)] == [("a", 0), ("b", 0), ("c", 0), ("a", 1), ("b", 1)]
    assert first_tokens([{"prompt_id": "a", "completion_tokens": [0] * 2 * KL_TOKENS}])


def test_the_figure_has_the_bound_up_to_the_policys_kl():
    row = {"n": None, "name": "online", "kl": 3.0, "kl_error": 0.1, "score": 0.5, "score_error": 0.1, "reward": 1.0,
           "win_rate": 0.9, "win_error": 0.05}
    best = [{"n": n, "name": f"best of {n}", "kl": kl_bound(n), "kl_error": None, "score": 0.5, "score_error": 0.1,
             "reward": 1.0, "win_rate": None if n == 4 else 0.6, "win_error": 0.1} for n in (1, 2, 4)]
    text = figure([*best, row])
    assert text.count("bound n/(n+1)</title>") == 1 and text.count("<title>online</title>") == 3
    ElementTree.fromstring(text)
    half = line_chart([Line("x", [0.0, 0.4], [0.0, 1.0])], whole=False)
    assert ">0.2<" in half and ">0.2<" not in line_chart([Line("x", [0.0, 0.4], [0.0, 1.0])]).split("polyline")[1]
