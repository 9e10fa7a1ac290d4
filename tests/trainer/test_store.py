import json
import os
from pathlib import Path

import pyarrow as pa
import pytest

from strop.trainer.config import Sft
from strop.trainer.errors import UserError
from strop.trainer.run.artifacts import external
from strop.trainer.run.console import Console
from strop.trainer.run.files import read_json, write_json
from strop.trainer.run.store import PLAN, Stage, Store
from strop.trainer.run.tables import Drops, read_table, write_table
from strop.trainer.run.world import World


def store(path, **keys):
    return Store(path, World(), Console(enabled=False), **keys)


def staged(store, name, function, config=None, kind="test", **inputs):
    return store.stage(name, function, config=config or {}, inputs=inputs, kind=kind)


def writer(text="x"):
    def run(stage, **given):
        inputs = [value for value in given.values() if isinstance(value, Path)]
        (stage.dir / "out.txt").write_text(text + "".join(p.joinpath("out.txt").read_text() for p in inputs))
        stage.counts["rows"] = 1

    return run


def test_done_is_kept_and_a_changed_key_runs_what_follows(tmp_path):
    calls = []

    def make(text):
        def run(stage, **given):
            calls.append(stage.name)
            writer(text)(stage, **given)
        return run

    def both(a, b, text="x"):
        s = store(tmp_path)
        first = staged(s, "round-00/a", make(text), {"lr": a})
        return staged(s, "round-00/b", make("y"), {"k": b}, a=first)

    both(1, 1)
    assert calls == ["round-00/a", "round-00/b"]
    both(1, 1)
    assert len(calls) == 2
    both(1, 2)
    assert calls[2:] == ["round-00/b"]
    both(2, 2)  # a is re-run, with the same content, so b stays fresh
    assert calls[3:] == ["round-00/a"]
    both(3, 2, text="z")
    assert calls[4:] == ["round-00/a", "round-00/b"]
    assert len(list((tmp_path / "stale").iterdir())) == 4


def test_plan_tells_state_and_reason_and_writes_nothing(tmp_path):
    def plan(lr):
        s = store(tmp_path, planning=True)
        staged(s, "b", writer(), a=staged(s, "a", writer(), {"sft": {"lr": lr}}))
        return [(entry["stage"], entry["state"], entry["why"]) for entry in s.plan]

    assert plan(1) == [("a", "to run", ""), ("b", "to run", "")] and not list(tmp_path.iterdir())
    s = store(tmp_path)
    staged(s, "b", writer(), a=staged(s, "a", writer(), {"sft": {"lr": 1}}))
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    assert plan(1) == [("a", "done", ""), ("b", "done", "")]
    assert plan(2) == [("a", "stale", "sft.lr: 1 -> 2"), ("b", "stale", "its inputs are re-run")]
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_plan_json_has_every_stage_while_it_runs_and_afterwards(tmp_path):
    seen, prompts = [], tmp_path / "prompts.jsonl"
    prompts.write_text("{}")

    def looks(stage, **given):
        seen.append([(e["stage"], e["state"]) for e in read_json(tmp_path / "run" / PLAN)["stages"]])
        writer()(stage)

    def both(s):
        first = s.stage("prompts", looks, config={}, inputs={"digits": external(prompts)}, kind="prompts")
        return s.stage("round-00/sft", looks, config={"k": 2}, kind="training", title="SFT", round=0,
                       inputs={"round": 0, "select": first, "old": [{"weights": first}]})

    planned, s = store(tmp_path / "run", planning=True), store(tmp_path / "run")
    both(planned)
    s.plan, s.about = planned.plan, {"name": "mine"}
    s.lock()
    both(s)
    assert seen == [[("prompts", "running"), ("round-00/sft", "to run")],
                    [("prompts", "done"), ("round-00/sft", "running")]]
    assert read_json(tmp_path / "run" / PLAN) == {"name": "mine", "stages": [
        {"stage": "prompts", "kind": "prompts", "title": "prompts", "round": None, "inputs": {"digits": "outside"},
         "state": "done", "why": ""},
        {"stage": "round-00/sft", "kind": "training", "title": "SFT", "round": 0, "state": "done", "why": "",
         "inputs": {"select": "prompts", "old.0.weights": "prompts"}}]}
    assert read_json(tmp_path / "run/round-00/sft/manifest.json")["kind"] == "training"


def test_a_key_is_that_of_sections_and_not_of_what_cannot_change_a_result(tmp_path):
    def state(section):
        s = store(tmp_path, planning=True)
        staged(s, "a", writer(), {"sft": section})
        return s.plan[0]["state"], s.plan[0]["why"]

    staged(store(tmp_path), "a", writer(), {"sft": Sft(lr=1.0)})
    assert state(Sft(lr=1.0, checkpoint_steps=7)) == ("done", "")
    assert state(Sft(lr=2.0)) == ("stale", "sft.lr: 1.0 -> 2.0")
    assert state(Sft(lr=1.0).only(*Sft.model_fields)) == ("done", "")  # a part that holds all is the whole


def test_a_part_of_a_section_hides_the_rest():
    part = Sft(lr=1.0).only("lr", "checkpoint_steps")
    assert part.lr == 1.0 and part.key() == {"lr": 1.0}
    with pytest.raises(AttributeError, match="this part of Sft has no field epochs"):
        part.epochs  # noqa: B018


def test_a_failed_stage_is_not_done_and_goes_on_where_it_was(tmp_path):
    seen = []

    def fails(stage, **given):
        seen.append((stage.dir / "shard-0").exists())
        (stage.dir / "shard-0").write_text("kept")
        if len(seen) == 1:
            raise RuntimeError("killed")
        (stage.work / "scratch").write_text("not part of it")

    with pytest.raises(RuntimeError):
        staged(store(tmp_path), "a", fails)
    assert not (tmp_path / "a").exists()
    artifact = staged(store(tmp_path), "a", fails)
    assert seen == [False, True] and sorted(artifact.files) == ["shard-0"] and not (tmp_path / "a" / "work").exists()


def test_a_partial_of_another_config_is_not_gone_on_with(tmp_path):
    def fails(stage, **given):
        (stage.dir / "shard-0").write_text("old")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        staged(store(tmp_path), "a", fails, {"seed": 1})

    def checks(stage, **given):
        assert not (stage.dir / "shard-0").exists()

    staged(store(tmp_path), "a", checks, {"seed": 2})


def test_damage_is_found_before_an_artifact_is_used(tmp_path):
    first = staged(store(tmp_path), "a", writer())
    (first.path / "out.txt").write_text("y")
    s = store(tmp_path)
    with pytest.raises(UserError, match=r"out\.txt: damaged.*delete the folder"):
        staged(s, "b", writer(), a=staged(s, "a", writer()))


def test_second_process_is_refused(tmp_path):
    first, second = store(tmp_path), store(tmp_path)
    first.lock()
    with pytest.raises(UserError, match=f"process {os.getpid()} is running it"):
        second.lock()
    (tmp_path / ".lock").unlink()
    with pytest.raises(UserError, match="is running it"):
        second.lock()
    first.unlock()
    second.lock()


def test_any_number_of_old_artifacts_is_kept(tmp_path):
    (tmp_path / "stale").mkdir()
    for name in ("007-a", "0999-a", "1000-a", "note.txt"):
        (tmp_path / "stale" / name).mkdir()
    staged(store(tmp_path), "a", writer(), {"k": 1})
    staged(store(tmp_path), "a", writer(), {"k": 2})
    staged(store(tmp_path), "a", writer(), {"k": 3})
    assert {"1001-a", "1002-a"} <= {path.name for path in (tmp_path / "stale").iterdir()}


def test_equal_content_has_an_equal_hash_wherever_it_lies(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "model" / "w").write_text("same")
    a, b = external(tmp_path / "a"), external(tmp_path / "b" / "model")
    assert a.sub("model").hash == b.hash != a.hash
    with pytest.raises(UserError, match="no such file"):
        external(tmp_path / "c")


def test_broken_files_name_themselves(tmp_path):
    (tmp_path / "t.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"t\.parquet: not readable as Parquet"):
        read_table(tmp_path / "t.parquet")
    s = store(tmp_path)
    staged(s, "a", writer())
    (tmp_path / "a" / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json: not readable as JSON"):
        staged(store(tmp_path), "a", writer())


def test_same_rows_are_the_same_bytes(tmp_path):
    table = pa.table({"a": [1, 2], "b": ["x", None]})
    write_table(tmp_path / "1.parquet", table)
    write_table(tmp_path / "2.parquet", table)
    assert (tmp_path / "1.parquet").read_bytes() == (tmp_path / "2.parquet").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1.parquet", "2.parquet"]


def test_drops_are_written_and_counted(tmp_path):
    stage = Stage("select", tmp_path, World(), None, None)
    drops = Drops(stage)
    drops.add("tie", prompt_id="p", sample_index=3)
    drops.add("tie")
    drops.add("overlong", detail=99)
    drops.write()
    assert stage.counts == {"dropped/tie": 2, "dropped/overlong": 1}
    assert read_table(tmp_path / "drops.parquet").num_rows == 3


def test_json_is_replaced_whole(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    write_json(tmp_path / "a.json", {"x": "ü"})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": "ü"} and len(list(tmp_path.iterdir())) == 1
