import sys
from pathlib import Path

import pyarrow as pa
import pytest
from stagecalls import score

from strop.trainer.config import Recipe
from strop.trainer.data.samples import read_scored
from strop.trainer.errors import UserError
from strop.trainer.run.tables import read_table, write_table

sys.path.insert(0, str(Path(__file__).parent))
from rounds import prompts_of, round_of, sample_of
from training import stage_in

SAMPLES = {"b": [("b", 1), ("a", 0), ("b", 0, "length")], "a": [("a", 1), ("x", 0), ("", 0)], "c": [("B", 0), ("a", 0)]}


def run(tmp_path, samples=SAMPLES, prompts=None, name="score", **keys):
    stage = stage_in(tmp_path / name, name)
    recipe = Recipe.model_validate({"data": {"sft": [{"name": "x", "path": "x"}]}} | keys)
    prompts = prompts or prompts_of(tmp_path / f"{name}-prompts", ["a", "b", "c"])
    score(stage, recipe, prompts=prompts, sample=sample_of(tmp_path / f"{name}-sample", samples))
    return {(r["prompt_id"], r["sample_index"]): r for r in read_table(stage.dir / "scores.parquet").to_pylist()}, stage


def test_every_sample_is_scored_against_its_own_prompt(tmp_path):
    """Shards of two prompts, so the last is a remainder; samples and prompts lie in different orders."""
    found, stage = run(tmp_path)
    assert {k: (r["score"], r["correct"]) for k, r in found.items()} == {
        ("a", 0): (1, True), ("a", 1): (0, False), ("a", 2): (0, False), ("b", 0): (1, True), ("b", 1): (0, False),
        ("b", 2): (1, False),  # right, but cut by length
        ("c", 0): (0, False), ("c", 1): (0, False)}
    assert stage.counts == {"completions": 8, "mean_score": 3 / 8, "pass_rate": 2 / 8, "solved_prompts": 2,
                            "cut_share": 1 / 8}
    assert found["a", 0]["extracted"] == "a" and found["a", 2]["extracted"] is None


def test_same_bytes_whatever_the_shards(tmp_path):
    run(tmp_path, name="one")
    run(tmp_path, dict(reversed(SAMPLES.items())), name="two")
    assert (tmp_path / "one/scores.parquet").read_bytes() == (tmp_path / "two/scores.parquet").read_bytes()


def test_correct_at(tmp_path):
    prompts = prompts_of(tmp_path / "p", ["1"], verifier="regex", verifier_args='{"pattern": "x"}')
    found, _ = run(tmp_path, {"1": [("x", 1), ("y", 0)]}, prompts, score={"correct_at": 0.0})
    assert [r["correct"] for r in found.values()] == [True, True]


@pytest.mark.parametrize("samples,match", [({"z": [("z", 1)]}, "prompt z is not in"), ({}, "holds no samples")])
def test_samples_that_do_not_fit(tmp_path, samples, match):
    with pytest.raises(UserError, match=match):
        run(tmp_path, samples)


def test_a_sample_without_score_is_found(tmp_path):
    """As when a remainder shard was never scored."""
    sample, scored = round_of(tmp_path, SAMPLES)
    assert len(read_scored(sample, scored)) == 8
    table = read_table(scored / "scores.parquet")
    write_table(scored / "scores.parquet", table.slice(0, 7))
    with pytest.raises(UserError, match=r"1 of 8 samples have no score \(prompt c, sample 1"):
        read_scored(sample, scored)
    write_table(scored / "scores.parquet", pa.concat_tables([table, table.slice(0, 1)]).slice(0, 8))
    assert len(read_scored(sample, scored)) == 8


def test_a_sample_that_stands_twice_is_found(tmp_path):
    sample, scored = round_of(tmp_path, SAMPLES)
    table = read_table(sample / "shard-00000.parquet")
    write_table(sample / "shard-00007.parquet", table.slice(0, 1))
    with pytest.raises(UserError, match="prompt b has sample 0 twice"):
        read_scored(sample, scored)
