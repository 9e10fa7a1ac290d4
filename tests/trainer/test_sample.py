"""The sample stage: draws of prompts, shards, resume, ranks and drops."""

import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from stagecalls import sample

from strop.trainer.config import Recipe
from strop.trainer.data.splits import allot, draw_prompts
from strop.trainer.errors import UserError
from strop.trainer.run.console import Console
from strop.trainer.run.store import Stage
from strop.trainer.run.tables import read_table, write_table
from strop.trainer.run.world import World
from strop.trainer.sampling import in_process as generate
from strop.trainer.stages.prompts import SCHEMA


def recipe(**how) -> Recipe:
    sources = [{"name": "digits", "path": "none.jsonl", "verifier": "exact"}]
    keys = {"prompts": 10, "k": 3, "max_new_tokens": 8, "shard_prompts": 4, "batch_size": 5} | how
    return Recipe.model_validate({"dtype": "float32", "data": {"sources": sources}, "sample": keys})


def prompt_row(i: int, text: str, split: str = "train") -> dict:
    return {"prompt_id": f"p{i:03}", "source": "digits", "split": split, "answer": "1",
            "conversational": False, "metadata": json.dumps({}), "messages": [{"role": "user", "content": text}]}


@pytest.fixture
def prompts(tmp_path):
    rows = [prompt_row(i, f"say {i * 7}") for i in range(24)] + [prompt_row(99, "held out", "test")]
    write_table(tmp_path / "prompts.parquet", pa.Table.from_pylist(rows, schema=SCHEMA))
    return tmp_path


def make_stage(folder, rank=0, size=1) -> Stage:
    folder.mkdir(exist_ok=True)
    world = World(rank, size)
    object.__setattr__(world, "barrier", lambda: None)  # ranks run one after the other here
    return Stage("round-00/sample", folder, world, Console(enabled=False), None)


def files(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*.parquet"))}


def test_shards_hold_every_sample_once(tiny_model, prompts, tmp_path):
    stage = make_stage(tmp_path / "out")
    sample(stage, recipe(), round=0, model=tiny_model, prompts=prompts)
    tables = [read_table(p) for p in sorted(stage.dir.glob("shard-*.parquet"))]
    assert [len(t) for t in tables] == [12, 12, 6]
    rows = pa.concat_tables(tables).to_pylist()
    seen = Counter((r["prompt_id"], r["sample_index"]) for r in rows)
    assert len(seen) == 30 and set(seen.values()) == {1} and "p099" not in {r["prompt_id"] for r in rows}
    assert {r["finish"] for r in rows} == {"stop", "length"}
    for r in rows:
        assert (len(r["completion_tokens"]) == 8) or r["finish"] == "stop"
        assert r["logp"] < 0 and "<|im_end|>" not in r["completion"]
    assert stage.counts["prompts"] == 10 and stage.counts["samples"] == 30
    assert stage.counts["tokens"] == sum(len(r["completion_tokens"]) for r in rows)
    assert stage.counts["cut_share"] == sum(r["finish"] == "length" for r in rows) / 30
    assert len(read_table(stage.dir / "drops.parquet")) == 0


@pytest.mark.parametrize(("how", "said"), [
    ({"batch_size": 13}, "sample.batch_size=13 is never reached: a shard has sample.shard_prompts=4 prompts of 3 "
                         "completions, 12 in all; raise sample.shard_prompts to 5 or more"),
    ({"batch_size": 12}, ""), ({"batch_size": 13, "shard_prompts": 5}, ""),
    ({"batch_size": 999, "shard_prompts": 10}, "")])  # one shard holds all there is
def test_a_batch_that_no_shard_fills_is_warned_of(tiny_model, prompts, tmp_path, how, said):
    stage, lines = make_stage(tmp_path / "out"), []
    stage.console.warn = lines.append
    sample(stage, recipe(**how), round=0, model=tiny_model, prompts=prompts)
    assert len(lines) == bool(said) and said in "".join(lines)


def test_killed_between_shards_and_resumed_gives_the_same_files(tiny_model, prompts, tmp_path, monkeypatch):
    sample(make_stage(tmp_path / "whole"), recipe(), round=0, model=tiny_model, prompts=prompts)
    stage = make_stage(tmp_path / "killed")
    original, calls = generate.Generator.generate, []

    def dies_on_third_shard(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(generate.Generator, "generate", dies_on_third_shard)
    with pytest.raises(KeyboardInterrupt):
        sample(stage, recipe(), round=0, model=tiny_model, prompts=prompts)
    assert len(files(stage.dir)) == 2
    (stage.dir / "shard-00001.parquet").write_bytes(b"torn")
    sample(stage, recipe(), round=0, model=tiny_model, prompts=prompts)
    assert len(calls) == 5  # two before the kill, the killed one, the torn one and the last one
    assert files(stage.dir) == files(tmp_path / "whole")
    assert stage.counts["samples"] == 30


def test_two_ranks_write_the_shards_of_one(tiny_model, prompts, tmp_path):
    sample(make_stage(tmp_path / "one"), recipe(), round=0, model=tiny_model, prompts=prompts)
    for rank in (1, 0):
        sample(make_stage(tmp_path / "two", rank, 2), recipe(), round=0, model=tiny_model, prompts=prompts)
        made = {p.name for p in (tmp_path / "two").glob("shard-*")}
        assert made == ({"shard-00001.parquet"} if rank else {f"shard-0000{i}.parquet" for i in range(3)})
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_overlong_prompts_are_dropped_with_reason(tiny_model, tmp_path):
    rows = [prompt_row(i, "x" * (600 if i % 3 == 0 else 5)) for i in range(9)]
    write_table(tmp_path / "prompts.parquet", pa.Table.from_pylist(rows, schema=SCHEMA))
    stage = make_stage(tmp_path / "out")
    sample(stage, recipe(prompts=9), round=0, model=tiny_model, prompts=tmp_path)
    drops = read_table(stage.dir / "drops.parquet").to_pylist()
    assert {(d["prompt_id"], d["reason"], d["source"]) for d in drops} == {
        (f"p{i:03}", "overlong", "digits") for i in (0, 3, 6)}
    assert stage.counts["dropped/overlong"] == 3 and stage.counts["prompts"] == 6
    write_table(tmp_path / "prompts.parquet", pa.Table.from_pylist(rows[:1], schema=SCHEMA))
    with pytest.raises(UserError, match=r"none of 1 prompts leaves room for sample.max_new_tokens=8"):
        sample(make_stage(tmp_path / "none"), recipe(), round=0, model=tiny_model, prompts=tmp_path)


def test_rounds_differ_in_prompts_and_in_draws(tiny_model, prompts, tmp_path):
    for r in (0, 1):
        sample(make_stage(tmp_path / str(r)), recipe(prompts=24), round=r, model=tiny_model, prompts=prompts)
    first, second = ({(row["prompt_id"], row["sample_index"]): row["completion"]
                      for p in (tmp_path / str(r)).glob("shard-*") for row in pq.read_table(p).to_pylist()}
                     for r in (0, 1))
    assert first.keys() == second.keys()
    assert sum(first[key] != second[key] for key in first) > len(first) / 2


def rows_of(**sizes) -> list[dict]:
    return [{"prompt_id": f"{name}{i}", "source": name} for name, n in sizes.items() for i in range(n)]


def test_no_prompt_returns_before_all_have_come():
    rows = rows_of(a=10)
    drawn = [[r["prompt_id"] for r in draw_prompts(rows, {"a": 1.0}, 4, seed=3, round=r)] for r in range(5)]
    assert len({i for d in drawn[:2] for i in d}) == 8
    assert {i for d in drawn[:3] for i in d} == {r["prompt_id"] for r in rows}
    assert all(len(set(d)) == 4 for d in drawn)
    assert set(Counter(i for d in drawn for i in d).values()) == {2}  # 20 draws of 10 prompts
    assert drawn[0] == [r["prompt_id"] for r in draw_prompts(rows[::-1], {"a": 1.0}, 4, seed=3, round=0)]
    assert drawn[0] != [r["prompt_id"] for r in draw_prompts(rows, {"a": 1.0}, 4, seed=4, round=0)]


def test_sources_are_drawn_by_share_and_fill_in_for_one_another():
    rows = rows_of(a=100, b=100, c=3)
    drawn = Counter(r["source"] for r in draw_prompts(rows, {"a": 3.0, "b": 1.0, "c": 1.0}, 40, seed=0, round=0))
    assert drawn == {"a": 28, "b": 9, "c": 3}
    assert len(draw_prompts(rows, {"a": 3.0, "b": 1.0, "c": 1.0}, 500, seed=0, round=0)) == 203
    assert allot(3, {"a": 1.0, "b": 1.0}, {"a": 5, "b": 5}) == {"a": 2, "b": 1}
    assert allot(3, {"a": 9.0, "b": 1.0}, {"a": 0, "b": 5}) == {"a": 0, "b": 3}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
