"""The comparison with TRL: what both sides get, and how seeds and prompts become intervals."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from benchmarks import docs, field, field_sides
from benchmarks.field_sides import IGNORED, Job, trl_rows
from strop.trainer.cli import load_recipe
from strop.trainer.errors import UserError
from strop.trainer.run.tables import write_table


def results(seconds: float) -> list[dict]:
    return [{"sft_seconds": seconds * s, "dpo_seconds": 2.0, "peak_bytes": 3 << 30, "steps": [4, 2],
             "losses": [1.0, 0.6]} for s in (1, 2)]


@pytest.fixture
def case():
    """Two seeds, four prompts: SFT is right on one; TRL's DPO on one or two, Strop's on three, and on all."""
    right = {"base": 0, "trl 0 sft": 1, "trl 1 sft": 1, "trl 0 dpo": 1, "trl 1 dpo": 2}
    for side, n in (("strop", 3), ("strop-more", 4)):
        right |= {f"{side} {seed} {task}": 1 if task == "sft" else n for seed in (0, 1) for task in ("sft", "dpo")}
    correct = {name: {f"p{i}": i < n for i in range(4)} for name, n in right.items()}
    found = field.summary(correct, {"trl": results(10), "strop": results(1), "strop-more": results(9)})
    return found | {"recipe": "r", "model": "m", "seeds": 2, "dtype": "float32", "rows": 9, "pairs": 5,
                    "ways": ["fp32 padded", "fp32 padded"]}


def test_rates_are_of_the_mean_over_seeds_and_gains_are_paired(case):
    sides = case["sides"]
    assert {side: found["pass_rate"]["value"] for side, found in sides.items()} == {
        "trl": 0.375, "strop": 0.75, "strop-more": 1.0}
    assert sides["strop"]["over_trl"]["value"] == 0.375 and sides["trl"]["over_trl"] == {
        "value": 0.0, "low": 0.0, "high": 0.0}
    draws = np.random.default_rng(0).choice([0.0, 0.5, 1.0, 0.0], (20_000, 4)).mean(1)
    low, high = np.quantile(draws, [0.025, 0.975])
    assert (sides["strop"]["over_trl"]["low"], sides["strop"]["over_trl"]["high"]) == pytest.approx((low, high))
    start, trl, same, more = field.lines(case)
    assert start[2] == "0.0 (0.0 to 0.0)" and trl[4] == "10 to 20 + 2" and same[3].startswith("+37.5 (+")
    assert (more[2], more[5], more[6]) == ("100.0 (100.0 to 100.0)", "4 + 2", "3.0")
    assert {len(row) for row in field.lines(case)} == {len(field.HEADER)}


def test_the_page_shows_what_was_measured(case, tmp_path, monkeypatch):
    monkeypatch.setattr(docs.measure, "RESULTS", tmp_path)
    assert docs.field_section() == "**H100**: not yet measured."
    (tmp_path / "a-cpu").mkdir()
    (tmp_path / "a-cpu/field.json").write_text(json.dumps(
        {"date": "2026-01-01", "environment": {"device": "A CPU"}, "cases": {"r m": case}}))
    text = docs.field_section()
    assert "**A CPU**, 2026-01-01: recipe `r`, m, float32, 9 rows and 5 pairs, 4 test prompts, 2 seeds" in text
    assert "| TRL | 25.0" in text and text.endswith("**H100**: not yet measured.")


def test_trl_gets_the_same_tokens_and_the_same_loss(tmp_path):
    write_table(tmp_path / "sft.parquet", pa.Table.from_pylist([
        {"prompt_tokens": [5, 6], "completion_tokens": [7, 8, 2], "loss_mask": [True, False, True]}]))
    write_table(tmp_path / "pairs.parquet", pa.Table.from_pylist([
        {"prompt_tokens": [5], "chosen_tokens": [7, 2], "rejected_tokens": [8, 2]}]))
    assert trl_rows("sft", tmp_path) == [{"input_ids": [5, 6, 7, 8, 2], "labels": [IGNORED, IGNORED, 7, IGNORED, 2]}]
    assert trl_rows("dpo", tmp_path) == [{"prompt_ids": [5], "chosen_ids": [7, 2], "rejected_ids": [8, 2]}]


@pytest.mark.parametrize(("keys", "words"), [
    ({"lora.rank": 8}, "lora.rank=8: both sides must train alike; set lora.rank=0"),
    ({"dpo.loss": "ipo"}, "dpo.loss=ipo: both sides must train alike; set dpo.loss=sigmoid"),
    ({"sft.min_lr_ratio": 0.1}, "set sft.min_lr_ratio=0.0"), ({"dpo.enabled": False}, "set dpo.enabled=true")])
def test_what_trl_cannot_do_is_refused(keys, words):
    field_sides.check_recipe(load_recipe("quickstart"))
    with pytest.raises(UserError, match=words):
        field_sides.check_recipe(load_recipe("quickstart", keys))


def test_sides_that_train_differently_are_refused():
    field.check_losses([1.0, 0.69], [1.05, 0.7])
    with pytest.raises(SystemExit, match=r"mean loss of DPO 0\.6900 by Strop, 0\.5000 by TRL"):
        field.check_losses([1.0, 0.69], [1.0, 0.5])
    assert field.fastest({"a": 2.0, "b": 1.0, "c, failed": "why"}) == "b"
    with pytest.raises(SystemExit, match="TRL does not run here"):
        field.fastest({"c, failed": "why"})


def test_a_phase_runs_once_and_again_if_its_job_changes(tmp_path, monkeypatch):
    ran = []

    def worker(command, **how):
        ran.append(command[-3])
        Path(command[-1]).write_text(json.dumps({"n": len(ran)}))
        return field.subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(field.subprocess, "run", worker)
    run, job = field.Phases(tmp_path / "run", tmp_path / "work"), Job({}, name="strop-1")
    half, other = (tmp_path / "run/round-00" / name for name in ("strop-1-sft.partial", "strop-10-sft"))
    for folder in (half, other):
        folder.mkdir(parents=True)
    assert run("strop", job) == run("strop", job) == {"n": 1} and ran == ["strop"]
    assert not half.exists() and other.exists()
    assert run("strop", replace(job, seed=3)) == {"n": 2}
