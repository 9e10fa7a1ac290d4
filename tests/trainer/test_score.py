import sys
from pathlib import Path

import pyarrow as pa
import pytest
from stagecalls import judging, score

from strop.trainer.config import Recipe
from strop.trainer.data.samples import read_scored
from strop.trainer.errors import UserError
from strop.trainer.run.tables import read_table, write_table

sys.path.insert(0, str(Path(__file__).parent))
from rounds import prompts_of, round_of, sample_of
from training import stage_in

SAMPLES = {"b": [("b", 1), ("a", 0), ("b", 0, "length")], "a": [("a", 1), ("x", 0), ("", 0)], "c": [("B", 0), ("a", 0)]}


def recipe_of(*scorers, **keys):
    source = {"name": "s", "path": "x"} | ({"scorers": scorers} if scorers else {"verifier": "exact"})
    return Recipe.model_validate({"data": {"sources": [source]}} | keys)


def run(tmp_path, samples=SAMPLES, prompts=None, name="score", scorers=(), **keys):
    """({(prompt, sample, scorer): row}, stage)"""
    stage = stage_in(tmp_path / name, name)
    prompts = prompts or prompts_of(tmp_path / f"{name}-prompts", ["a", "b", "c"])
    sample = tmp_path / f"{name}-sample"
    sample = sample if sample.exists() else sample_of(sample, samples)
    score(stage, recipe_of(*scorers, **keys), prompts=prompts, sample=sample)
    rows = read_table(stage.dir / "scores.parquet").to_pylist()
    return {(r["prompt_id"], r["sample_index"], r["scorer"]): r for r in rows}, stage


def test_every_sample_is_scored_against_its_own_prompt(tmp_path):
    """Shards of two prompts, so the last is a remainder; samples and prompts lie in different orders."""
    found, stage = run(tmp_path)
    assert {k[:2]: r["value"] for k, r in found.items()} == {
        ("a", 0): 1, ("a", 1): 0, ("a", 2): 0, ("b", 0): 1, ("b", 1): 0, ("b", 2): 1, ("c", 0): 0, ("c", 1): 0}
    assert stage.counts == {"completions": 8, "mean/exact": 3 / 8, "cut_share": 1 / 8}
    assert found["a", 0, "exact"]["detail"] == "a" and found["a", 2, "exact"]["detail"] is None


def test_same_bytes_whatever_the_shards(tmp_path):
    run(tmp_path, name="one")
    run(tmp_path, dict(reversed(SAMPLES.items())), name="two")
    assert (tmp_path / "one/scores.parquet").read_bytes() == (tmp_path / "two/scores.parquet").read_bytes()


@pytest.mark.parametrize("samples,match", [({"z": [("z", 1)]}, "prompt z is not in"), ({}, "holds no samples")])
def test_samples_that_do_not_fit(tmp_path, samples, match):
    with pytest.raises(UserError, match=match):
        run(tmp_path, samples)


def scored(sample, score, recipe=None):
    recipe = recipe or recipe_of()
    return read_scored(sample, score, {"a": "s", "b": "s", "c": "s"}, judging(recipe), Path("prompts"))


def test_a_sample_without_score_is_found(tmp_path):
    """As when a remainder shard was never scored."""
    sample, folder = round_of(tmp_path, SAMPLES)
    assert [r["correct"] for r in scored(sample, folder)] == [True, False, False, True, False, False, False, False]
    table = read_table(folder / "scores.parquet")
    write_table(folder / "scores.parquet", table.slice(0, 7))
    with pytest.raises(UserError, match=r"1 of 8 samples lack a score \(prompt c, sample 1"):
        scored(sample, folder)
    write_table(folder / "scores.parquet", pa.concat_tables([table, table.slice(0, 1)]).slice(0, 8))
    assert len(scored(sample, folder)) == 8


def test_a_sample_of_another_prompt_is_found(tmp_path):
    sample, folder = round_of(tmp_path, {"z": [("z", 1)]})
    with pytest.raises(UserError, match="prompt z is not among the training prompts of prompts"):
        scored(sample, folder)


def test_a_sample_that_stands_twice_is_found(tmp_path):
    sample, folder = round_of(tmp_path, SAMPLES)
    table = read_table(sample / "shard-00000.parquet")
    write_table(sample / "shard-00007.parquet", table.slice(0, 1))
    with pytest.raises(UserError, match="prompt b has sample 0 twice"):
        scored(sample, folder)


# ---- from values to a score

TWO = {"a": [("x", {"exact": 1.0, "short": -3.0}), ("y", {"exact": 0.0, "short": 2.0}),
             ("z", {"exact": 1.0, "short": None})]}


@pytest.mark.parametrize("keys,scores,correct", [
    ({}, [-5, 4, None], [False, True, False]),
    ({"score": {"correct_by": "exact"}}, [-5, 4, None], [True, False, True]),
    ({"score": {"correct_at": -6}}, [-5, 4, None], [True, True, False]),
    ({"select": {"by": "exact"}}, [1, 0, 1], [False, True, False])])
def test_the_sum_by_weight_or_a_named_scorer(tmp_path, keys, scores, correct):
    sample, folder = round_of(tmp_path, TWO)
    recipe = recipe_of({"rule": "exact"}, {"rule": "number", "name": "short", "weight": 2.0}, **keys)
    rows = scored(sample, folder, recipe)
    assert [r["score"] for r in rows] == scores and [r["correct"] for r in rows] == correct


def test_the_scorer_that_decides_is_named():
    judge = judging(recipe_of({"rule": "exact"}, {"rule": "number", "name": "short", "weight": 0.1}))
    worse = {"exact": (0, None), "short": (2, None)}
    assert judge.decided("s", {"exact": (1, None), "short": (-3, None)}, worse) == "exact"
    assert judge.decided("s", {"exact": (1, None), "short": (90, None)}, worse) == "short"


# ---- resuming and ranks

GRADE = """
from pathlib import Path

def grade(prompt, completion, row):
    with open({log!r}, "a") as f:
        f.write(completion + "|")
    if completion == {bad!r}:
        raise ValueError("cannot be graded")
    return len(completion)
"""


def test_a_killed_stage_continues_at_the_next_shard(tmp_path, monkeypatch):
    monkeypatch.setattr("strop.trainer.scoring.table.SHARD", 2)
    file, log = tmp_path / "mine.py", tmp_path / "log"
    file.write_text(GRADE.format(log=str(log), bad="B"))
    mine = {"python": f"{file}:grade"}
    with pytest.raises(UserError, match=r"mine\.py:8: ValueError: cannot be graded; prompt c, sample 0 \(score"):
        run(tmp_path, scorers=[mine])
    first = log.read_text()
    assert first == "a|x||b|a|B|a|"  # equal completions of a prompt once
    file.write_text(GRADE.format(log=str(log), bad="-"))
    found, _ = run(tmp_path, scorers=[mine])
    assert log.read_text() == first + "B|a|" and len(found) == 8
    assert {r["value"] for r in found.values()} == {0, 1}


def test_two_ranks_write_what_one_does(tmp_path, monkeypatch):
    from strop.trainer.run.world import World

    monkeypatch.setattr("strop.trainer.scoring.table.SHARD", 2)
    run(tmp_path, name="one")
    prompts, sample = prompts_of(tmp_path / "p", ["a", "b", "c"]), sample_of(tmp_path / "s", SAMPLES)
    for rank in (1, 0):
        stage = stage_in(tmp_path / "two", "score")
        world = World(rank, 2)
        object.__setattr__(world, "barrier", lambda: None)
        stage.world = world
        score(stage, recipe_of(), prompts=prompts, sample=sample)
        assert (tmp_path / "two/scores.parquet").exists() == (rank == 0)
    assert (tmp_path / "one/scores.parquet").read_bytes() == (tmp_path / "two/scores.parquet").read_bytes()
