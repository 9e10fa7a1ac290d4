"""Evaluate: greedy completions of the held-out prompts by every candidate, and their pass rates."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa

from strop.trainer.chat import load_tokenizer, stop_ids
from strop.trainer.config import Recipe
from strop.trainer.drift import drift
from strop.trainer.generate import Generator, load_for_generation
from strop.trainer.models import DTYPES, context_length
from strop.trainer.prompts import prompt_tokens
from strop.trainer.store import Drops, Stage, read_part, read_table, write_json, write_table
from strop.trainer.verifiers import verify

SPLITS = ("validation", "test")
SCHEMA = pa.schema([("candidate", pa.string()), ("split", pa.string()), ("source", pa.string()),
                    ("prompt_id", pa.string()), ("completion", pa.string()), ("completion_tokens", pa.int32()),
                    ("finish", pa.string()), ("score", pa.float64()), ("correct", pa.bool_()),
                    ("tokens", pa.list_(pa.int32()))])


def evaluate(stage: Stage, recipe: Recipe, *, prompts: Path, candidates: dict[str, Path],
             start: Path | None = None) -> None:
    """Writes results.parquet (a row for each candidate and prompt), summary.json and drops.parquet; with `start`, the
    weights the run began with, also kl.json: how far each candidate is from them.

    Runs on every rank; shards of prompts are the unit of resume. Raises ValueError if no held-out prompt fits.
    """
    how, world = recipe.evaluate, stage.world
    rows = [r for r in read_table(prompts / "prompts.parquet").to_pylist() if r["split"] in SPLITS]
    rows.sort(key=lambda r: (SPLITS.index(r["split"]), r["prompt_id"]))
    parts: list[Path] = []
    asked: dict[str, list[dict]] = {}  # of each candidate, the first prompts, on which the KL is measured
    drops = Drops(stage)
    for c, (name, model) in enumerate(candidates.items()):
        tokenizer = load_tokenizer(model, recipe.model.chat_template, recipe.model.trust_remote_code)
        room, fitting = context_length(model, recipe.model.trust_remote_code) - how.max_new_tokens, []
        for row in rows:
            tokens = prompt_tokens(tokenizer, row)
            if len(tokens) <= room:
                fitting.append(row | {"tokens": tokens})
            else:
                drops.add("overlong", prompt_id=row["prompt_id"], source=row["source"],
                          detail=f"{len(tokens)} tokens, candidate {name}")
        if not fitting:
            raise ValueError(f"{stage.name}: none of {len(rows)} held-out prompts leaves room for evaluate."
                             f"max_new_tokens={how.max_new_tokens} in the context of candidate {name}")
        shards = [fitting[i : i + how.batch_size] for i in range(0, len(fitting), how.batch_size)]
        paths = [stage.work / f"{c:02}-{i:05}.parquet" for i in range(len(shards))]
        mine = range(world.rank, len(shards), world.size)
        todo = [i for i in mine if not is_done(paths[i], name, shards[i])]
        kept = sum(len(shards[i]) for i in mine) - sum(len(shards[i]) for i in todo)
        if todo:
            generator = Generator(load_for_generation(model, DTYPES[recipe.dtype], world.device,
                                                      recipe.model.trust_remote_code))
            stop = stop_ids(tokenizer, model)
            total = sum(len(shards[i]) for i in mine)
            with stage.console.progress(f"{stage.name} {name}", total, done=kept) as bar:
                for i in todo:
                    completions = generator.generate(
                        [row["tokens"] for row in shards[i]], max_new_tokens=how.max_new_tokens, temperature=0.0,
                        stop_ids=stop, batch_size=how.batch_size, on_progress=bar.advance)
                    write_table(paths[i], judge(tokenizer, name, shards[i], completions, recipe.score.correct_at))
            del generator
        parts += paths
        asked[name] = fitting[:how.kl_prompts]
    world.barrier()
    if world.first:
        results = pa.concat_tables([SCHEMA.empty_table(), *map(read_table, parts)])
        write_table(stage.dir / "results.parquet", results)
        rows = results.to_pylist()
        summary = summarize(rows)
        write_json(stage.dir / "summary.json", summary)
        drops.write()
        stage.counts |= {f"{name}/{split}": found["pass_rate"] for name, splits in summary.items()
                         for split, found in splits.items()}
        stage.counts["tokens"] = sum(row["completion_tokens"] for row in rows)
        if start and candidates and how.kl_prompts:
            tokens = {(row["candidate"], row["prompt_id"]): row["tokens"] for row in rows}
            own = {name: [(row["tokens"], tokens[name, row["prompt_id"]]) for row in first]
                   for name, first in asked.items()}
            moved = drift(candidates, own, start, DTYPES[recipe.dtype], world.device, recipe.model.trust_remote_code)
            write_json(stage.dir / "kl.json", moved)
            stage.counts |= {f"{name}/kl": found["kl"] for name, found in moved.items()}


def is_done(path: Path, candidate: str, shard: list[dict]) -> bool:
    """Whether `path` holds the candidate's results on `shard`; a file that does not is made again."""
    table = read_part(path, SCHEMA)
    return (table is not None and set(table["candidate"].to_pylist()) == {candidate}
            and table["prompt_id"].to_pylist() == [row["prompt_id"] for row in shard])


def judge(tokenizer, candidate: str, shard: list[dict], completions: list, correct_at: float) -> pa.Table:
    """Results of one completion a prompt; correct: it stopped by itself and scores at least `correct_at`."""
    found = []
    for row, (completion,) in zip(shard, completions, strict=True):
        text = tokenizer.decode(completion.tokens, skip_special_tokens=True)
        score, _ = verify(row["verifier"], text, row["answer"], json.loads(row["verifier_args"] or "{}"),
                          json.loads(row["metadata"] or "{}"))
        found.append({"candidate": candidate, "split": row["split"], "source": row["source"],
                      "prompt_id": row["prompt_id"], "completion": text, "completion_tokens": len(completion.tokens),
                      "finish": completion.finish, "score": score,
                      "correct": completion.finish == "stop" and score >= correct_at, "tokens": completion.tokens})
    return pa.Table.from_pylist(found, schema=SCHEMA)


def summarize(rows: list[dict]) -> dict:
    """{candidate: {split: pass_rate, n, by_source, mean_length in tokens, cut_share}}"""
    summary: dict[str, dict] = {}
    for row in rows:
        summary.setdefault(row["candidate"], {}).setdefault(row["split"], []).append(row)
    return {name: {split: describe(found) for split, found in splits.items()} for name, splits in summary.items()}


def describe(rows: list[dict]) -> dict:
    by_source: dict[str, list[bool]] = {}
    for row in rows:
        by_source.setdefault(row["source"], []).append(row["correct"])
    return {"pass_rate": sum(row["correct"] for row in rows) / len(rows), "n": len(rows),
            "by_source": {s: {"pass_rate": sum(right) / len(right), "n": len(right)}
                          for s, right in sorted(by_source.items())},
            "mean_length": sum(row["completion_tokens"] for row in rows) / len(rows),
            "cut_share": sum(row["finish"] == "length" for row in rows) / len(rows)}
