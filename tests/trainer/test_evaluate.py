"""The evaluate stage: what counts as correct, ranks, resume, and the paired bootstrap."""

import json

import numpy as np
import pyarrow as pa
import pytest
import torch
from stagecalls import measure

from strop.trainer.config import Recipe
from strop.trainer.models.loading import ModelFolder
from strop.trainer.reports.statistics import paired_bootstrap
from strop.trainer.run.console import Console
from strop.trainer.run.files import read_json
from strop.trainer.run.store import Stage
from strop.trainer.run.tables import read_table, write_table
from strop.trainer.run.world import World
from strop.trainer.sampling import in_process as generate
from strop.trainer.scoring import table
from strop.trainer.scoring.base import Scored
from strop.trainer.stages import evaluate as module
from strop.trainer.stages.prompts import SCHEMA

STOP = set(range(3, 98, 5))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def recipe(correct_at=0.99) -> Recipe:
    sources = [{"name": s, "path": "none.jsonl", "verifier": "exact"} for s in ("even", "odd")]
    return Recipe.model_validate({"dtype": "float32", "data": {"sources": sources}, "score": {"correct_at": correct_at},
                                  "evaluate": {"max_new_tokens": 10, "batch_size": 8}})


def prompt_row(i: int, split: str, text: str) -> dict:
    return {"prompt_id": f"p{i:03}", "source": "odd" if i % 2 else "even", "split": split, "answer": str(i),
            "conversational": False, "metadata": json.dumps({"i": i}),
            "messages": [{"role": "user", "content": text}]}


@pytest.fixture
def prompts(tmp_path):
    rows = [prompt_row(i, ("train", "validation", "test", "test")[i % 4], f"what is {i * 13}") for i in range(40)]
    write_table(tmp_path / "prompts.parquet", pa.Table.from_pylist(rows, schema=SCHEMA))
    return tmp_path


class Thirds:
    """Half a point to every third prompt, a full one to the rest."""

    def score(self, items, advance):
        assert all(str(item.row["i"]) == item.answer == item.row["answer"] for item in items)
        return [Scored(0.5 if item.row["i"] % 3 == 0 else 1.0, item.completion) for item in items]

    def close(self):
        pass


@pytest.fixture
def verdicts(monkeypatch):
    """Replaces the scorer. Many tokens end a turn, since a random model hardly ever draws the one that does."""
    monkeypatch.setattr(table, "open_scorer", lambda *_: Thirds())
    monkeypatch.setattr(module, "stop_ids", lambda tokenizer, folder: STOP)


def make_stage(folder, rank=0, size=1) -> Stage:
    folder.mkdir(exist_ok=True)
    world = World(rank, size)
    object.__setattr__(world, "barrier", lambda: None)  # ranks run one after the other here
    return Stage("baseline", folder, world, Console(enabled=False), None)


def files(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


def test_correct_means_stopped_by_itself_and_scored(tiny_model, prompts, verdicts, tmp_path):
    stage = make_stage(tmp_path / "out")
    measure(stage, recipe(), prompts=prompts, candidates={"base": tiny_model, "sft": tiny_model})
    rows = read_table(stage.dir / "results.parquet").to_pylist()
    assert len(rows) == 60 and len({(r["candidate"], r["prompt_id"]) for r in rows}) == 60
    assert {r["finish"] for r in rows} == {"stop", "length"}
    for r in rows:
        half = int(r["prompt_id"][1:]) % 3 == 0
        assert r["score"] == (0.5 if half else 1.0)
        assert r["correct"] == (r["finish"] == "stop" and not half)
        assert r["completion_tokens"] == 10 or r["finish"] == "stop"
    summary = read_json(stage.dir / "summary.json")
    assert summary["base"] == summary["sft"] and set(summary["base"]) == {"validation", "test"}
    test = [r for r in rows if (r["candidate"], r["split"]) == ("base", "test")]
    found = summary["base"]["test"]
    assert found["n"] == len(test) == 20
    assert found["pass_rate"] == sum(r["correct"] for r in test) / 20 == stage.counts["base/test"] > 0
    assert found["cut_share"] == sum(r["finish"] == "length" for r in test) / 20
    assert found["mean_length"] == sum(r["completion_tokens"] for r in test) / 20
    assert sum(part["n"] * part["pass_rate"] for part in found["by_source"].values()) == pytest.approx(
        20 * found["pass_rate"])
    assert set(found["by_source"]) == {"even", "odd"}


def test_a_lower_bar_lets_half_points_pass(tiny_model, prompts, verdicts, tmp_path):
    stage = make_stage(tmp_path / "out")
    measure(stage, recipe(correct_at=0.5), prompts=prompts, candidates={"base": tiny_model})
    assert all(r["correct"] == (r["finish"] == "stop") for r in read_table(stage.dir / "results.parquet").to_pylist())


def test_completions_are_the_greedy_ones(tiny_model, prompts, verdicts, tmp_path):
    from strop.trainer.data.chat import encode_prompt

    stage = make_stage(tmp_path / "out")
    measure(stage, recipe(), prompts=prompts, candidates={"base": tiny_model})
    tokenizer = ModelFolder(tiny_model).tokenizer()
    model = generate.load_for_generation(ModelFolder(tiny_model), torch.float32, torch.device("cpu"))
    messages = {r["prompt_id"]: r["messages"] for r in read_table(prompts / "prompts.parquet").to_pylist()}
    for r in read_table(stage.dir / "results.parquet").to_pylist()[:12]:
        tokens = encode_prompt(tokenizer, messages[r["prompt_id"]])
        out = model.generate(torch.tensor([tokens]), do_sample=False, max_new_tokens=10, pad_token_id=0,
                             eos_token_id=sorted(STOP))[0, len(tokens):]
        assert (len(out), tokenizer.decode(out, skip_special_tokens=True)) == (r["completion_tokens"], r["completion"])


def test_two_ranks_and_a_resumed_run_give_the_same_files(tiny_model, prompts, verdicts, tmp_path, monkeypatch):
    candidates = {"base": tiny_model, "sft": tiny_model}
    measure(make_stage(tmp_path / "one"), recipe(), prompts=prompts, candidates=candidates)
    for rank in (1, 0, 1, 0):  # the second time the completions are there
        measure(make_stage(tmp_path / "two", rank, 2), recipe(), prompts=prompts, candidates=candidates)
        assert (tmp_path / "two-held-out" / "completions.parquet").exists() or rank == 1
    for name in ("one", "one-held-out"):
        assert files(tmp_path / name) == files(tmp_path / name.replace("one", "two"))

    original, calls = generate.Generator.generate, []

    def dies_on_sixth_shard(*args, **kwargs):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(generate.Generator, "generate", dies_on_sixth_shard)
    stage = make_stage(tmp_path / "killed")
    with pytest.raises(KeyboardInterrupt):
        measure(stage, recipe(), prompts=prompts, candidates=candidates)
    measure(stage, recipe(), prompts=prompts, candidates=candidates)
    assert len(calls) == 6 + 3  # four shards a candidate: five were done, three are left
    for name in ("one", "one-held-out"):
        assert files(tmp_path / name) == files(tmp_path / name.replace("one", "killed"))


def test_overlong_held_out_prompts_are_dropped_and_counted(tiny_model, verdicts, tmp_path):
    rows = [prompt_row(i, "test", "x" * (600 if i == 4 else 5)) for i in range(6)]
    write_table(tmp_path / "prompts.parquet", pa.Table.from_pylist(rows, schema=SCHEMA))
    stage = make_stage(tmp_path / "out")
    measure(stage, recipe(), prompts=tmp_path, candidates={"base": tiny_model})
    assert [(d["prompt_id"], d["reason"]) for d in read_table(tmp_path / "out-held-out/drops.parquet").to_pylist()] == [
        ("p004", "overlong")]
    assert read_json(stage.dir / "summary.json")["base"]["test"]["n"] == 5


def test_bootstrap_of_a_known_difference():
    new, old = np.array([1, 1, 1, 0, 1, 0.0] * 50), np.array([0, 1, 0, 0, 1, 1.0] * 50)
    gain, low, high = paired_bootstrap(new, old, 10_000, 0)
    assert gain == pytest.approx(1 / 6)
    spread = 1.96 * (new - old).std() / np.sqrt(300)
    assert (low, high) == pytest.approx((gain - spread, gain + spread), abs=0.01)
    assert paired_bootstrap(old, new, 10_000, 0)[0] == -gain
    assert paired_bootstrap(new, old, 10_000, 0) == (gain, low, high)
    assert paired_bootstrap(new, new, 100, 0) == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="same prompts"):
        paired_bootstrap(new, old[1:], 100, 0)


def test_bootstrap_interval_covers_the_truth_as_often_as_it_says():
    rng, covered, runs = np.random.default_rng(5), 0, 400
    for run in range(runs):
        old = rng.random(200) < 0.3
        new = np.where(old, rng.random(200) < 0.9, rng.random(200) < 0.2)  # true gain: 0.7 * 0.2 - 0.3 * 0.1 = 0.11
        _, low, high = paired_bootstrap(new.astype(float), old.astype(float), 1000, run)
        covered += low <= 0.11 <= high
    assert 0.92 <= covered / runs <= 0.98
