"""The loop of shards that every stage which samples shares: which prompts fit, which shards are done, who samples."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from strop.trainer.data.chat import prompt_tokens
from strop.trainer.run import stopping
from strop.trainer.run.store import Stage
from strop.trainer.run.tables import DROPS, Drops, read_part, read_table, write_table
from strop.trainer.sampling.base import Completion

SWITCH = 2e-4  # seconds between changes of the thread


@dataclass(frozen=True)
class Shard:
    """Prompts that are sampled together. ids: the values of the key columns in the shard's file, in order; `drops` has
    those that are not in the file, and why."""

    path: Path
    rows: list[dict]
    ids: list[tuple]
    drops: Path | None = None


class Writer(Protocol):
    """Completions of rows of prompts.parquet that have their `tokens`."""

    def write(self, rows: list[dict], n: int, first: int,
              on_progress: Callable[[int, int], None]) -> list[list[Completion]]:
        """Completions number `first` to `first + n - 1` of each row."""

    def expect(self, rows: list[dict], n: int, first: int) -> None:
        """Says what the call of `write` after the next one gets, so that it can be prepared."""

    def close(self) -> None: ...


def fitting(tokenizer, rows: list[dict], room: int, drops: Drops, detail: str = "") -> list[dict]:
    """The rows with at most `room` prompt tokens, with their `tokens`; the others are dropped as overlong."""
    kept = []
    for row in rows:
        tokens = prompt_tokens(tokenizer, row)
        if len(tokens) <= room:
            kept.append(row | {"tokens": tokens})
        else:
            drops.add("overlong", prompt_id=row["prompt_id"], source=row["source"],
                      detail=f"{len(tokens)} tokens{detail}")
    return kept


def run_shards(stage: Stage, label: str, shards: list[Shard], key: tuple[str, ...], schema: pa.Schema,
               load: Callable[[], Writer], to_table: Callable, lane: tuple[int, int] | None = None,
               on_done: Callable[[Path], None] = lambda path: None,
               expect: Callable[[Writer, list[dict]], None] = lambda writer, rows: None) -> None:
    """Writes the file of every shard that is not done; with `lane` (i, n), this rank does shards i, i + n, ...

    load() returns what writes; it is called at most once, and closed.
    to_table(writer, rows, on_progress, drops) -> a table of `schema`; what is not in it must be dropped. Or a function
    that makes the table: on a GPU it runs, and the table is written, while the next shard is drawn.
    on_done(path) is called with this rank's shards as they are done, at first with those that were.
    expect(writer, rows) is called before each shard with the rows of the one after it.
    """
    first, step = lane or (stage.world.rank, stage.world.size)
    mine = shards[first::step]
    todo = [shard for shard in mine if not is_done(shard, key, schema)]
    total = sum(len(shard.ids) for shard in mine)
    done = total - sum(len(shard.ids) for shard in todo)
    if done:
        stage.console.line(f"{label}: {len(mine) - len(todo)} of {len(mine)} shards ({done} completions) done before")
    for shard in mine:
        if shard not in todo:
            on_done(shard.path)
    if todo:
        def store(shard: Shard, drops: Drops, table: pa.Table | Callable[[], pa.Table]) -> None:
            table = table() if callable(table) else table
            if drops.rows:
                write_table(shard.drops, pa.Table.from_pylist(drops.rows, schema=DROPS))
            write_table(shard.path, table)
            on_done(shard.path)

        is_behind = stage.world.device.type == "cuda"  # a CPU has no core to spare
        with closing(load()) as writer, stage.console.progress(label, total, done=done) as bar, Behind() as behind:
            for shard, after in zip(todo, [*todo[1:], None], strict=True):
                if after:
                    expect(writer, after.rows)
                drops = Drops(stage)
                table = to_table(writer, shard.rows, bar.advance, drops)
                if is_behind and callable(table):
                    behind.run(store, shard, drops, table)
                else:
                    store(shard, drops, table)
                stopping.point()
    stage.meet()


class Behind:
    """Runs one function at a time on a thread. As a context it waits for the last.

    Meanwhile the interpreter changes threads more often than every 5 ms, its default: a step of the sampler takes 2."""

    def __init__(self):
        self.thread, self.last = ThreadPoolExecutor(1, "shard"), None

    def run(self, function: Callable, *arguments) -> None:
        """Begins function(*arguments) once the one before is done. Raises what that one raised."""
        if self.last:
            self.last.result()
        sys.setswitchinterval(SWITCH)
        self.last = self.thread.submit(function, *arguments)

    def __enter__(self) -> Behind:
        self.interval = sys.getswitchinterval()
        return self

    def __exit__(self, kind, *error) -> None:
        self.thread.shutdown(wait=True)
        sys.setswitchinterval(self.interval)
        if self.last and kind is None:
            self.last.result()


def is_done(shard: Shard, key: tuple[str, ...], schema: pa.Schema) -> bool:
    """Whether the shard's file and its drops have exactly its ids."""
    table = read_part(shard.path, schema)
    if table is None:
        return False
    there = list(zip(*(table[name].to_pylist() for name in key), strict=True))
    if there == shard.ids or shard.drops is None:
        return there == shard.ids
    dropped = read_part(shard.drops, DROPS)
    gone = set() if dropped is None else set(zip(*(dropped[name].to_pylist() for name in key), strict=True))
    return bool(gone) and there == [i for i in shard.ids if i not in gone]


def collect_drops(shards: list[Shard], drops: Drops) -> None:
    """Adds the rows that the shards dropped."""
    for shard in shards:
        if shard.drops.exists():
            gone = {(row["prompt_id"], row["sample_index"]) for row in read_table(shard.path).select(
                ["prompt_id", "sample_index"]).to_pylist()}
            drops.rows += [row for row in read_table(shard.drops).to_pylist()
                           if (row["prompt_id"], row["sample_index"]) not in gone]
