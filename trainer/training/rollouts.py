"""Completions of the weights in training, a step at a time: sampled in place, scored, and kept in a table per step.

A step's table is written before its completions are trained on, and a resumed stage reads it instead of sampling and
scoring again: judges and servers may not say the same twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import torch
from torch import Tensor

from strop.kernels import Group, PackedGroups
from strop.trainer.data.chat import completion_text
from strop.trainer.data.splits import draws, hash_int
from strop.trainer.method_recipes import Online
from strop.trainer.run.store import Stage
from strop.trainer.run.tables import read_part, read_table, write_table
from strop.trainer.sampling.in_process import lent
from strop.trainer.training.batch import Example, collate, pack, pack_evenly
from strop.trainer.training.local import Engine

SCORES = pa.list_(pa.struct([("scorer", pa.string()), ("value", pa.float64()), ("detail", pa.string()),
                             ("error", pa.string())]))
SCHEMA = pa.schema([("prompt_id", pa.string()), ("sample_index", pa.int32()), ("step", pa.int32()),
                    ("source", pa.string()), ("prompt_tokens", pa.list_(pa.int32())),
                    ("completion_tokens", pa.list_(pa.int32())), ("completion", pa.string()),
                    ("logprobs", pa.list_(pa.float32())), ("ref_logp", pa.float64()), ("finish", pa.string()),
                    ("scores", SCORES), ("score", pa.float64()), ("reward", pa.float64()), ("writer", pa.string())])


@dataclass
class Rollouts:
    """prompts: training prompts with their `tokens`, all of which fit. shares: of the sources. first: the draw of
    prompts that step 0 takes. score(rows) -> for each row its SCORES and score; reference(groups) -> log-probs
    [targets] of the reference, None if there is none."""

    stage: Stage
    engine: Engine
    section: Online
    prompts: list[dict]
    shares: dict[str, float]
    seed: int
    first: int
    tokenizer: object
    stop_ids: frozenset[int]
    score: Callable[[list[dict]], list[tuple[list[dict], float | None]]]
    reference: Callable[[PackedGroups], Tensor] | None
    seconds: dict[str, float] = field(default_factory=dict)  # of the last step
    next_step: int = -1

    def of(self, step: int) -> list[dict]:
        """The rows of a step, in the order of prompts and samples; every rank gets all of them."""
        if step != self.next_step:
            self.draws = draws(self.prompts, self.shares, self.section.batch_size, self.seed, self.first + step)
        drawn, self.next_step = next(self.draws), step + 1
        self.seconds = {}
        path, world = self.path(step), self.stage.world
        ids = [(row["prompt_id"], i) for row in drawn for i in range(self.section.k)]
        table = read_part(path, SCHEMA)
        if table is None or list(zip(*(table[c].to_pylist() for c in ("prompt_id", "sample_index")),
                                     strict=True)) != ids:
            mine = self.written(drawn[world.rank::world.size], step)
            if world.size == 1:
                write_table(path, mine)
            else:
                self.join(mine, drawn, step)
            table = read_table(path)
        return table.to_pylist()

    def path(self, step: int) -> Path:
        return self.stage.dir / "rollouts" / f"step-{step + 1:06}.parquet"

    def join(self, mine: pa.Table, drawn: list[dict], step: int) -> None:
        """The table of a step from what each rank has written."""
        world, name = self.stage.world, f"rollouts-{step + 1:06}"
        write_table(self.stage.work / f"{name}-{world.rank}.parquet", mine)
        self.stage.meet()
        if world.first:
            parts = [self.stage.work / f"{name}-{rank}.parquet" for rank in range(world.size)]
            place = {row["prompt_id"]: i for i, row in enumerate(drawn)}
            rows = [row for part in parts for row in read_table(part).to_pylist()]
            rows.sort(key=lambda row: (place[row["prompt_id"]], row["sample_index"]))
            write_table(self.path(step), pa.Table.from_pylist(rows, schema=SCHEMA))
            for part in parts:
                part.unlink()
        self.stage.meet()

    def written(self, drawn: list[dict], step: int) -> pa.Table:
        """Completions of these prompts by the current weights."""
        section, started = self.section, time.perf_counter()
        with lent(self.engine.model) as generator:
            found = generator.generate(
                [row["tokens"] for row in drawn], k=section.k, ids=[row["prompt_id"] for row in drawn],
                seed=hash_int(self.seed, "online", self.first + step), max_new_tokens=section.max_new_tokens,
                temperature=section.temperature, stop_ids=self.stop_ids, batch_size=section.decode_batch)
        writer = f"{self.stage.name}@{self.engine.step_index}"
        rows = [{"prompt_id": row["prompt_id"], "sample_index": i, "step": step + 1, "source": row["source"],
                 "prompt_tokens": row["tokens"], "completion_tokens": c.tokens,
                 "completion": completion_text(self.tokenizer, c.tokens), "logprobs": c.logps, "finish": c.finish,
                 "writer": writer} for row, mine in zip(drawn, found, strict=True) for i, c in enumerate(mine)]
        self.seconds["sampling_seconds"] = time.perf_counter() - started
        started = time.perf_counter()
        for row, (scores, score) in zip(rows, self.score(rows), strict=True):
            cut = section.missing_eos_penalty * (row["finish"] == "length")
            row |= {"scores": scores, "score": score, "reward": None if score is None else score - cut}
        self.seconds["scoring_seconds"] = time.perf_counter() - started
        for row, logp in zip(rows, self.ref_logps(rows), strict=True):
            row["ref_logp"] = logp
        return pa.Table.from_pylist(rows, schema=SCHEMA)

    @torch.no_grad()
    def ref_logps(self, rows: list[dict]) -> list[float | None]:
        """The reference's log-prob of every completion: with anchor=ema that of the average after the steps so far, as
        in algorithm 1 of WARP (arXiv 2406.16768)."""
        if self.reference is None:
            return [None] * len(rows)
        found: list[float | None] = [None] * len(rows)
        parts = grouped(rows, list(range(len(rows))), self.section.max_tokens)
        examples = [Example(str(i), group_of([rows[j] for j in part])) for i, part in enumerate(parts)]
        with self.engine.averaged() if self.section.anchor == "ema" else nullcontext():
            for indices in pack_evenly([e.tokens for e in examples], self.section.max_tokens):
                groups = collate(examples, indices, self.stage.world.device)
                logp = self.reference(groups).cpu().double()
                sums = [logp[a:b].sum().item() for a, b in groups.target_bounds]
                for j, value in zip((j for i in indices for j in parts[i]), sums, strict=True):
                    found[j] = value
        return found


def grouped(rows: list[dict], indices: list[int], budget: int) -> list[list[int]]:
    """`indices` of rows by prompt, divided where a prompt with its completions has more than `budget` tokens."""
    by_prompt: dict[str, list[int]] = {}
    for i in indices:
        by_prompt.setdefault(rows[i]["prompt_id"], []).append(i)
    found = []
    for mine in by_prompt.values():
        room = budget - len(rows[mine[0]]["prompt_tokens"])
        bins = pack([len(rows[i]["completion_tokens"]) for i in mine], room)
        found += [[mine[j] for j in sorted(part)] for part in bins]
    return found


def group_of(rows: list[dict]) -> Group:
    """Completions of one prompt."""
    return Group(rows[0]["prompt_tokens"], [row["completion_tokens"] for row in rows])
