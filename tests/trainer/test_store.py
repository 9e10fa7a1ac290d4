import json
import os

import pyarrow as pa
import pytest

from strop.trainer.run.artifacts import external
from strop.trainer.run.console import Console
from strop.trainer.run.files import write_json
from strop.trainer.run.store import Stage, Store
from strop.trainer.run.tables import Drops, read_table, write_table
from strop.trainer.run.world import World


def store(path, **keys):
    return Store(path, World(), Console(enabled=False), **keys)


def writer(text="x"):
    def run(stage, recipe, **inputs):
        (stage.dir / "out.txt").write_text(text + "".join(p.joinpath("out.txt").read_text() for p in inputs.values()))
        stage.counts["rows"] = 1

    return run


def test_done_is_kept_and_a_changed_key_runs_what_follows(tmp_path):
    calls = []

    def make(text):
        def run(stage, recipe, **inputs):
            calls.append(stage.name)
            writer(text)(stage, recipe, **inputs)
        return run

    def both(a, b, text="x"):
        s = store(tmp_path)
        first = s.stage("round-00/a", make(text), None, {"lr": a})
        return s.stage("round-00/b", make("y"), None, {"k": b}, a=first)

    both(1, 1)
    assert calls == ["round-00/a", "round-00/b"]
    both(1, 1)
    assert len(calls) == 2
    both(1, 2)
    assert calls[2:] == ["round-00/b"]
    both(2, 2)  # a is made again, with the same content, so b stays fresh
    assert calls[3:] == ["round-00/a"]
    both(3, 2, text="z")
    assert calls[4:] == ["round-00/a", "round-00/b"]
    assert len(list((tmp_path / "stale").iterdir())) == 4


def test_plan_tells_state_and_reason_and_writes_nothing(tmp_path):
    def plan(lr):
        s = store(tmp_path, plan=True)
        first = s.stage("a", writer(), None, {"sft": {"lr": lr}})
        s.stage("b", writer(), None, {}, a=first)
        return s.plans

    assert [p[1] for p in plan(1)] == ["to run", "to run"] and not list(tmp_path.iterdir())
    s = store(tmp_path)
    s.stage("b", writer(), None, {}, a=s.stage("a", writer(), None, {"sft": {"lr": 1}}))
    assert [p[1] for p in plan(1)] == ["done", "done"]
    (a, state, why), second = plan(2)
    assert (a, state, why) == ("a", "stale", "sft.lr: 1 -> 2") and second[1] == "stale" and "made again" in second[2]


def test_a_failed_stage_is_not_done_and_goes_on_where_it_was(tmp_path):
    seen = []

    def fails(stage, recipe):
        seen.append((stage.dir / "shard-0").exists())
        (stage.dir / "shard-0").write_text("kept")
        if len(seen) == 1:
            raise RuntimeError("killed")
        (stage.work / "scratch").write_text("not part of it")

    with pytest.raises(RuntimeError):
        store(tmp_path).stage("a", fails, None, {})
    assert not (tmp_path / "a").exists()
    artifact = store(tmp_path).stage("a", fails, None, {})
    assert seen == [False, True] and sorted(artifact.files) == ["shard-0"] and not (tmp_path / "a" / "work").exists()


def test_a_partial_of_another_config_is_not_gone_on_with(tmp_path):
    def fails(stage, recipe):
        (stage.dir / "shard-0").write_text("old")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        store(tmp_path).stage("a", fails, None, {"seed": 1})

    def checks(stage, recipe):
        assert not (stage.dir / "shard-0").exists()

    store(tmp_path).stage("a", checks, None, {"seed": 2})


def test_damage_is_found_before_an_artifact_is_used(tmp_path):
    first = store(tmp_path).stage("a", writer(), None, {})
    (first.path / "out.txt").write_text("y")
    s = store(tmp_path)
    with pytest.raises(ValueError, match=r"out\.txt: damaged.*delete the folder"):
        s.stage("b", writer(), None, {}, a=s.stage("a", writer(), None, {}))


def test_second_process_is_refused(tmp_path):
    first, second = store(tmp_path), store(tmp_path)
    first.lock()
    with pytest.raises(ValueError, match=f"process {os.getpid()} is running it"):
        second.lock()


def test_equal_content_has_an_equal_hash_wherever_it_lies(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "model" / "w").write_text("same")
    a, b = external(tmp_path / "a"), external(tmp_path / "b" / "model")
    assert a.sub("model").hash == b.hash != a.hash
    with pytest.raises(ValueError, match="no such file"):
        external(tmp_path / "c")


def test_broken_files_name_themselves(tmp_path):
    (tmp_path / "t.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match=r"t\.parquet: not readable as Parquet"):
        read_table(tmp_path / "t.parquet")
    s = store(tmp_path)
    s.stage("a", writer(), None, {})
    (tmp_path / "a" / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json: not readable as JSON"):
        store(tmp_path).stage("a", writer(), None, {})


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
