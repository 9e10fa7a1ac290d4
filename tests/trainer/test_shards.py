"""The loop of shards: on a GPU a shard is written while the next one is drawn, and the writer knows what comes."""

import dataclasses
import sys
import threading

import pyarrow as pa
import pytest
import torch
from training import stage_in

from strop.trainer.run import stopping
from strop.trainer.run.tables import Drops, read_table
from strop.trainer.run.world import World
from strop.trainer.sampling.shards import Shard, run_shards

SCHEMA = pa.schema([("prompt_id", pa.string()), ("value", pa.int64())])
SECONDS = 20


class Writer:
    def __init__(self, events):
        self.events = events

    def write(self, rows):
        self.events.append(("draw", rows[0]["prompt_id"]))
        return rows

    def expect(self, rows):
        self.events.append(("expect", rows[0]["prompt_id"]))

    def close(self):
        self.events.append(("close", ""))


def shards_of(folder, n: int = 3) -> list[Shard]:
    rows = [[{"prompt_id": f"{i}{j}", "value": j} for j in range(2)] for i in range(n)]
    return [Shard(folder / f"shard-{i}.parquet", mine, [(r["prompt_id"],) for r in mine if r["value"] or i],
                  folder / f"drops-{i}.parquet") for i, mine in enumerate(rows)]


def run(stage, events, to_table, n: int = 3) -> list[Shard]:
    shards = shards_of(stage.work, n)
    run_shards(stage, "stage", shards, ("prompt_id",), SCHEMA, lambda: Writer(events), to_table,
               on_done=lambda path: events.append(("done", path.stem)), expect=lambda writer, rows: writer.expect(rows))
    return shards


def on(device: str, folder):
    made = dataclasses.replace(stage_in(folder, "sample"), world=World(device=torch.device(device)))
    made.work.mkdir(parents=True, exist_ok=True)
    return made


def table_of(rows: list[dict], drops: Drops) -> pa.Table:
    kept = [r for r in rows if r["value"] or r["prompt_id"][0] != "0"]
    for row in rows:
        if row not in kept:
            drops.add("cut", prompt_id=row["prompt_id"], source="s")
    return pa.Table.from_pylist(kept, schema=SCHEMA)


def test_a_shard_is_written_while_the_next_one_is_drawn(tmp_path):
    """The same files as on a CPU, where nothing runs beside anything."""
    found, before = {}, sys.getswitchinterval()
    for device in ("cpu", "cuda"):
        events, drawn = [], {name: threading.Event() for name in "0123"}

        def to_table(writer, rows, on_progress, drops, device=device, drawn=drawn):
            rows = writer.write(rows)
            number = int(rows[0]["prompt_id"][0])
            drawn[str(number)].set()

            def make():
                if device == "cuda" and number < 2:
                    assert drawn[str(number + 1)].wait(SECONDS), "the next one is drawn before this one is made"
                return table_of(rows, drops)

            return make

        shards = run(on(device, tmp_path / device), events, to_table)
        found[device] = [read_table(path).to_pylist() for s in shards for path in (s.path, s.drops) if path.exists()]
        order = [e for e in events if e[0] != "done"]
        assert order == [("expect", "10"), ("draw", "00"), ("expect", "20"), ("draw", "10"), ("draw", "20"),
                         ("close", "")]
        assert [e for e in events if e[0] == "done"] == [("done", f"shard-{i}") for i in range(3)]
        if device == "cpu":
            assert events.index(("done", "shard-0")) < events.index(("draw", "10"))
    assert found["cpu"] == found["cuda"] and len(found["cpu"]) == 4 and sys.getswitchinterval() == before
    again = []
    run(on("cuda", tmp_path / "cuda"), again, to_table)
    assert again == [("done", f"shard-{i}") for i in range(3)], "what is done is not drawn again"


def test_an_error_while_a_shard_is_written_ends_the_stage(tmp_path):
    events = []

    def to_table(writer, rows, on_progress, drops):
        writer.write(rows)

        def make():
            raise OSError("disk full")

        return make

    with pytest.raises(OSError, match="disk full"):
        run(on("cuda", tmp_path), events, to_table, n=4)
    assert [e for e in events if e[0] == "draw"] in ([("draw", "00"), ("draw", "10")], [("draw", "00")])
    with pytest.raises(OSError, match="disk full"):
        run(on("cuda", tmp_path), events, to_table, n=1)


def test_a_stage_that_is_stopped_has_what_was_drawn(tmp_path, monkeypatch):
    events, folder = [], tmp_path

    def to_table(writer, rows, on_progress, drops):
        rows = writer.write(rows)
        return lambda: table_of(rows, drops)

    def point():
        if ("draw", "10") in events:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stopping, "point", point)
        with pytest.raises(KeyboardInterrupt):
            run(on("cuda", folder), events, to_table)
    assert [e for e in events if e[0] == "done"] == [("done", "shard-0"), ("done", "shard-1")]
    events.clear()
    shards = run(on("cuda", folder), events, to_table)
    assert [e for e in events if e[0] == "draw"] == [("draw", "20")] and all(s.path.exists() for s in shards)
