"""Held-out: every candidate's greedy completions of the held-out prompts. The stage results.py scores them."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from strop.trainer.config import Evaluate, Part
from strop.trainer.data.chat import completion_text, stop_ids
from strop.trainer.engines import InProcess, OpenAI
from strop.trainer.errors import UserError
from strop.trainer.models.kl import drift
from strop.trainer.models.loading import DTYPES, ModelFolder
from strop.trainer.run.files import write_json
from strop.trainer.run.store import Stage
from strop.trainer.run.tables import Drops, read_table, write_table
from strop.trainer.sampling.asking import cost_of, usage
from strop.trainer.sampling.base import Settings
from strop.trainer.sampling.shards import Shard, fitting, run_shards
from strop.trainer.sampling.vllm import lane
from strop.trainer.sampling.writers import Job, open_writer

SPLITS = ("validation", "test")
SHARD = 256  # prompts per shard of an engine without batch_size
SCHEMA = pa.schema([("candidate", pa.string()), ("split", pa.string()), ("source", pa.string()),
                    ("prompt_id", pa.string()), ("completion", pa.string()), ("completion_tokens", pa.int32()),
                    ("finish", pa.string()), ("tokens", pa.list_(pa.int32()))])


def held_out(stage: Stage, *, evaluate: Evaluate, model: Part, compute: Part, prompts: Path,
             candidates: dict[str, Path], start: Path | None = None) -> None:
    """Writes completions.parquet (a row per candidate and prompt) and drops.parquet; with `start`, the run's start
    weights, also kl.json: each candidate's KL from them.

    Runs on every rank and resumes by shard. Raises UserError if no held-out prompt fits.
    """
    rows = [r for r in read_table(prompts / "prompts.parquet").to_pylist() if r["split"] in SPLITS]
    rows.sort(key=lambda r: (SPLITS.index(r["split"]), r["prompt_id"]))
    parts: list[Path] = []
    first: dict[str, list[dict]] = {}  # the prompts of each candidate's KL
    drops, n = Drops(stage), evaluate.batch_size if isinstance(evaluate, InProcess) else SHARD
    served = isinstance(evaluate, OpenAI)
    if served and "{weights}" not in evaluate.model:
        stage.console.warn(f"{stage.name}: evaluate.model={evaluate.model} answers for {', '.join(candidates)}: these "
                           "pass rates are the server's model's, not theirs")
    for c, (name, weights) in enumerate(candidates.items()):
        folder = ModelFolder(weights, model)
        tokenizer = folder.tokenizer()
        fits = fitting(tokenizer, rows, folder.context_length() - evaluate.max_new_tokens, drops, f", candidate {name}")
        if not fits:
            raise UserError(f"{stage.name}: none of {len(rows)} held-out prompts leaves room for evaluate."
                            f"max_new_tokens={evaluate.max_new_tokens} in the context of candidate {name}")
        shards = [Shard(stage.work / f"{c:02}-{i // n:05}.parquet", fits[i:i + n],
                        [(name, row["prompt_id"]) for row in fits[i:i + n]]) for i in range(0, len(fits), n)]
        settings = Settings(evaluate.max_new_tokens, 0.0, stop_ids=frozenset(stop_ids(tokenizer, folder.path)))
        job = Job(stage, evaluate, "evaluate", folder, folder, tokenizer, settings, compute, fits, name)

        def to_table(writer, rows, on_progress, drops, tokenizer=tokenizer, name=name):
            found = writer.write(rows, 1, 0, on_progress)
            return lambda: to_rows(tokenizer, name, rows, found)

        run_shards(stage, f"{stage.name} {name}", shards, ("candidate", "prompt_id"), SCHEMA,
                   lambda job=job: open_writer(job), to_table, lane(stage.world, evaluate),
                   expect=lambda writer, rows: writer.expect(rows, 1, 0))
        parts += [shard.path for shard in shards]
        first[name] = [] if served else fits[:evaluate.kl_prompts]
    if stage.world.first:
        results = pa.concat_tables([SCHEMA.empty_table(), *map(read_table, parts)])
        write_table(stage.dir / "completions.parquet", results)
        rows = results.to_pylist()
        drops.write()
        stage.counts["tokens"] = sum(row["completion_tokens"] for row in rows)
        if served:
            stage.counts |= cost_of(usage(stage), evaluate)
        if start and any(first.values()):
            tokens = {(row["candidate"], row["prompt_id"]): row["tokens"] for row in rows}
            completions = {name: [(row["tokens"], tokens[name, row["prompt_id"]]) for row in asked]
                           for name, asked in first.items()}
            folders = {name: ModelFolder(path, model) for name, path in candidates.items()}
            kl = drift(folders, completions, ModelFolder(start, model), DTYPES[compute.dtype], stage.world.device)
            write_json(stage.dir / "kl.json", kl)
            stage.counts |= {f"{name}/kl": found["kl"] for name, found in kl.items()}


def to_rows(tokenizer, candidate: str, shard: list[dict], completions: list) -> pa.Table:
    found = []
    for row, (completion,) in zip(shard, completions, strict=True):
        text = completion_text(tokenizer, completion.tokens) if completion.text is None else completion.text
        found.append({"candidate": candidate, "split": row["split"], "source": row["source"],
                      "prompt_id": row["prompt_id"], "completion": text, "completion_tokens": len(completion.tokens),
                      "finish": completion.finish, "tokens": completion.tokens})
    return pa.Table.from_pylist(found, schema=SCHEMA)
