"""Sharded generation for the stages sample and evaluate: which prompts fit, which shards are done, who samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from strop.trainer.data.chat import prompt_tokens
from strop.trainer.run import stopping
from strop.trainer.run.store import Stage
from strop.trainer.run.tables import Drops, read_part, write_table


@dataclass(frozen=True)
class Shard:
    """Prompts that are sampled together. ids: the values of the key columns in the shard's file, in order."""

    path: Path
    rows: list[dict]
    ids: list[tuple]


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
               load: Callable[[], Callable], to_table: Callable[[list[dict], list], pa.Table]) -> None:
    """Writes the file of every shard that is not done; shard i belongs to rank i modulo the number of ranks.

    load() returns generate(rows, on_progress) -> a list of completions per row; it is called at most once.
    to_table(rows, completions) -> a table of `schema`, a row per id of the shard.
    """
    mine = shards[stage.world.rank::stage.world.size]
    todo = [shard for shard in mine if not is_done(shard, key, schema)]
    total = sum(len(shard.ids) for shard in mine)
    done = total - sum(len(shard.ids) for shard in todo)
    if done:
        stage.console.line(f"{label}: {len(mine) - len(todo)} of {len(mine)} shards ({done} completions) done before")
    if todo:
        generate = load()
        with stage.console.progress(label, total, done=done) as bar:
            for shard in todo:
                write_table(shard.path, to_table(shard.rows, generate(shard.rows, bar.advance)))
                stopping.point()
    stage.world.barrier()


def is_done(shard: Shard, key: tuple[str, ...], schema: pa.Schema) -> bool:
    """Whether the shard's file has exactly its ids."""
    table = read_part(shard.path, schema)
    return table is not None and shard.ids == list(zip(*(table[name].to_pylist() for name in key), strict=True))
