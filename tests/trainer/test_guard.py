"""The checks of completions during training: what stops a stage, what it keeps, and that a kill changes nothing."""

import pyarrow as pa
import pytest
from rounds import prompts_of
from stagecalls import dpo, reference, sft
from training import Log, largest_difference, recipe_of, select_of, stage_in

from strop.trainer.run.files import read_json
from strop.trainer.run.tables import write_table
from strop.trainer.training.guard import Guard

GOOD = {"cut_share": 0.0, "mean_length": 5.0, "kl": 0.1}
BAD = GOOD | {"cut_share": 0.5}


@pytest.fixture
def held_out(tmp_path):
    return prompts_of(tmp_path / "prompts", [f"{i:02}" for i in range(20)], split="validation")


def train(kind, folder, model, prompts, log=None, **keys):
    """A stage of 6 steps with a check every second one; `keys` are of its section."""
    keys = {"batch_size": 4, "lr": 1e-3, "epochs": 2, "eval_steps": 2, "eval_prompts": 4, "snapshots": 2} | keys
    recipe = recipe_of(**{kind: keys}, evaluate={"max_new_tokens": 8})
    select = select_of(folder.parent / "select", 12)
    stage = stage_in(folder, f"round-00/{kind}", log)
    how = {"select": select, "evaluate": recipe.evaluate, "prompts": prompts}
    if kind == "sft":
        sft(stage, recipe, start=model, **how)
    else:
        table = stage_in(folder.parent / f"{folder.name}-reference", "round-00/reference")
        reference(table, recipe, select=select, model=model)
        dpo(stage, recipe, policy=model, reference=table.dir, same_weights=True, **how)
    return stage


def scripted(monkeypatch, found: dict[int, dict]) -> None:
    monkeypatch.setattr(Guard, "_measure", lambda guard: dict(found.get(guard.engine.step_index, GOOD)))


def content(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*"))
            if p.is_file() and "work" not in p.parts and p.name != "drops.parquet"}


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_runaway_ends_the_stage_with_the_last_good_weights(tmp_path, tiny_model, held_out, monkeypatch, kind):
    scripted(monkeypatch, {4: BAD})
    whole = train(kind, tmp_path / "whole", tiny_model, None, ema_decay=0.5)
    log, warned = Log(), []
    monkeypatch.setattr("strop.trainer.run.console.Console.warn", lambda console, text: warned.append(text))
    stage = train(kind, tmp_path / "stopped", tiny_model, held_out, log, ema_decay=0.5)
    assert [p.name for p in (stage.dir / "snapshots").iterdir()] == ["step-000002"]
    assert largest_difference(stage.dir / "model", whole.dir / "snapshots" / "step-000002") == 0.0
    assert largest_difference(stage.dir / "ema", stage.dir / "model") > 0.0
    assert largest_difference(stage.dir / "ema", whole.dir / "ema") > 0.0
    counts = stage.counts
    assert (counts["steps"], counts["stopped_at_step"], counts["kept_step"]) == (4, 4, 2)
    assert [(r.get("eval/cut_share"), r.get("eval/stopped")) for r in log.rows] == [
        (None, None), (0.0, 0.0), (None, None), (0.5, 1.0)]
    why = read_json(stage.dir / "guard.json")["why"]
    assert why.startswith("50% of 4 greedy completions of validation prompts do not stop") and f"{kind}.max_cut" in why
    assert any("stopped at step 4 of 6" in w and "the weights of step 2 are kept" in w for w in warned)


def test_a_runaway_at_the_first_check_keeps_the_start_weights(tmp_path, tiny_model, held_out, monkeypatch):
    scripted(monkeypatch, {2: BAD})
    stage = train("dpo", tmp_path / "stopped", tiny_model, held_out)
    assert largest_difference(stage.dir / "model", tiny_model) == 0.0
    assert stage.counts["kept_step"] == 0 and not list((stage.dir / "snapshots").glob("*"))


def test_a_runaway_of_the_last_step_counts_too(tmp_path, tiny_model, held_out, monkeypatch):
    scripted(monkeypatch, {6: BAD})
    stage = train("sft", tmp_path / "stopped", tiny_model, held_out)
    assert stage.counts["kept_step"] == 4
    assert largest_difference(stage.dir / "model", stage.dir / "snapshots" / "step-000004") == 0.0


@pytest.mark.parametrize("found", [{4: BAD}, {2: BAD}, {}], ids=["stopped", "stopped at once", "never"])
@pytest.mark.parametrize("checkpoint_steps", [1, 3])
def test_killed_and_resumed_decides_and_ends_as_if_never_killed(tmp_path, tiny_model, held_out, monkeypatch, found,
                                                                checkpoint_steps):
    if found:
        scripted(monkeypatch, found)
    keys = {"checkpoint_steps": checkpoint_steps, "ema_decay": 0.5}
    whole = train("sft", tmp_path / "whole", tiny_model, held_out, **keys)
    for stop_at in range(1, min(4, whole.counts["steps"]) + 1):
        killed = tmp_path / f"killed-{stop_at}"
        with pytest.raises(KeyboardInterrupt):
            train("sft", killed, tiny_model, held_out, Log(stop_at=stop_at), **keys)
        again = train("sft", killed, tiny_model, held_out, **keys)
        assert content(again.dir) == content(whole.dir), stop_at
        assert {k: v for k, v in again.counts.items() if "dropped" not in k} == {
            k: v for k, v in whole.counts.items() if "dropped" not in k}, stop_at


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_checks_change_nothing_else(tmp_path, tiny_model, held_out, kind):
    log = Log()
    checked = train(kind, tmp_path / "checked", tiny_model, held_out, log, max_length_ratio=9.0)
    plain = train(kind, tmp_path / "plain", tiny_model, None)
    assert largest_difference(checked.dir / "model", plain.dir / "model") == 0.0
    assert sum("eval/kl" in r for r in log.rows) == 3 and 0 < log.rows[-1]["eval/kl"] < 1
    checks = read_json(checked.dir / "guard.json")["checks"]
    assert [c["step"] for c in checks] == [0, 2, 4, 6] and abs(checks[0]["kl"]) < 1e-6
    assert not (plain.dir / "guard.json").exists()


def select_that_never_stops(folder):
    """Completions without an end of turn, as cut ones."""
    rows = [{"row_id": f"r{i}", "source": "s", "prompt_id": f"p{i}", "sample_index": 0, "score": 1.0, "weight": 1.0,
             "prompt_tokens": [5, 6, 7], "completion_tokens": [40, 40, 40], "loss_mask": [True] * 3,
             "origin": "round-00"} for i in range(12)]
    folder.mkdir()
    write_table(folder / "sft.parquet", pa.Table.from_pylist(rows))
    return folder


def test_weights_that_forget_to_stop_are_found(tmp_path, tiny_model, held_out):
    """With real completions: first a model that always stops, then one that is taught not to."""
    stops = [{"row_id": f"r{i}", "source": "s", "prompt_id": f"p{i}", "sample_index": 0, "score": 1.0, "weight": 1.0,
              "prompt_tokens": [5 + i, 6, 7], "completion_tokens": [40, 2], "loss_mask": [True] * 2,
              "origin": "round-00"} for i in range(24)]
    (tmp_path / "stops").mkdir()
    write_table(tmp_path / "stops" / "sft.parquet", pa.Table.from_pylist(stops))
    keys = {"batch_size": 4, "lr": 1e-2, "epochs": 8, "eval_steps": 4, "max_length_ratio": 99.0}
    recipe = recipe_of(sft=keys, evaluate={"max_new_tokens": 12})
    how = {"evaluate": recipe.evaluate, "prompts": held_out}
    good = stage_in(tmp_path / "good", "round-00/sft")
    sft(good, recipe, select=tmp_path / "stops", start=tiny_model, **how)
    assert "stopped_at_step" not in good.counts
    assert read_json(good.dir / "guard.json")["checks"][-1]["cut_share"] == 0.0
    bad = stage_in(tmp_path / "bad", "round-00/sft")
    sft(bad, recipe, select=select_that_never_stops(tmp_path / "never"), start=good.dir / "model", **how)
    assert "do not stop within evaluate.max_new_tokens=12, 0% at the start" in read_json(bad.dir / "guard.json")["why"]
    assert bad.counts["steps"] < 24


def guard_of(section, checks, learned):
    guard = Guard.__new__(Guard)
    guard.section, guard.checks, guard.learned, guard.prompts = section, checks, learned, [[1]] * 16
    guard.max_new_tokens, guard.name = 64, "dpo"
    return guard


def test_limits():
    section = recipe_of(dpo={"max_cut_rise": 0.25, "max_length_ratio": 2.0, "max_kl": 1.0}).dpo
    start = {"cut_share": 0.1, "mean_length": 10.0, "kl": 0.0}
    guard = guard_of(section, [start], {"cut_share": 0.0, "mean_length": 4.0})
    for found, word in (({"cut_share": 0.35}, ""), ({"cut_share": 0.36}, "do not stop"), ({"mean_length": 20.0}, ""),
                        ({"mean_length": 20.1}, "have 20.1 tokens"), ({"kl": 1.0}, ""), ({"kl": 1.01}, "KL"),
                        ({"kl": float("nan")}, "KL")):
        why = guard._why(start | found)
        assert (word in why) if word else not why, (found, why)
    # what the data teaches is no runaway, nor are a few tokens
    taught = guard_of(section, [start], {"cut_share": 0.5, "mean_length": 30.0})
    assert not taught._why(start | {"cut_share": 0.7, "mean_length": 55.0})
    brief = guard_of(section, [start | {"mean_length": 1.0}], {"cut_share": 0.0, "mean_length": 1.0})
    assert not brief._why(start | {"mean_length": 8.0}) and brief._why(start | {"mean_length": 9.5})
    assert not guard_of(recipe_of().sft, [start], guard.learned)._why(start | {"kl": 9.0})


def test_no_prompts_or_eval_steps_0_is_no_guard(tmp_path, tiny_model, held_out):
    assert not (train("sft", tmp_path / "off", tiny_model, held_out, eval_steps=0).dir / "guard.json").exists()
    only_train = prompts_of(tmp_path / "other", ["a"], split="train")
    assert not (train("sft", tmp_path / "none", tiny_model, only_train).dir / "guard.json").exists()
