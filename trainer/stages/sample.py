"""Sample: K completions of this round's prompts by one writer, in shards, and the samples of several writers as one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import closing, nullcontext
from pathlib import Path

import pyarrow as pa

from strop.trainer.config import Part, Sample, Score
from strop.trainer.data.chat import completion_text, stop_ids
from strop.trainer.data.samples import Judging
from strop.trainer.data.splits import draw_prompts, hash_int
from strop.trainer.engines import InProcess, OpenAI, Sampling, Writer
from strop.trainer.errors import UserError
from strop.trainer.models.loading import ModelFolder
from strop.trainer.run.store import Stage
from strop.trainer.run.tables import Drops, read_table
from strop.trainer.sampling.asking import cost_of, usage
from strop.trainer.sampling.base import Completion, Settings
from strop.trainer.sampling.shards import Shard, collect_drops, fitting, run_shards
from strop.trainer.sampling.vllm import lane
from strop.trainer.sampling.writers import Job, open_writer, until_enough
from strop.trainer.scoring.base import Columns, item_of
from strop.trainer.scoring.table import Verdicts

MOST = 1 << 25  # completions of a round
SCHEMA = pa.schema([("prompt_id", pa.string()), ("sample_index", pa.int32()),
                    ("prompt_tokens", pa.list_(pa.int32())), ("completion_tokens", pa.list_(pa.int32())),
                    ("completion", pa.string()), ("logp", pa.float32()), ("finish", pa.string()),
                    ("writer", pa.string()), ("writer_hash", pa.string()), ("from_text", pa.bool_())])


def sample(stage: Stage, *, sample: Sampling | Part, model: Part, compute: Part, shares: dict[str, float], seed: int,
           round: int, weights: Path, prompts: Path, writer: Sample | Writer | None = None, own: Part | None = None,
           first: int = 0, k: int | None = None, score: Score | None = None, student: Path | None = None,
           writer_hash: str | None = None, scorers: dict | None = None, columns: dict | None = None,
           judging: dict | None = None, files: dict[str, Path] | None = None, split: str = "train") -> None:
    """Writes shard-00000.parquet, ... and drops.parquet; shard i runs on rank i modulo the number of ranks.

    shares: each source's share of the prompts. compute: the recipe's dtype. writer: the section with the engine, by
    default `sample`; it draws `k` of the sample.k completions, from number `first` on. own: how its weights are
    loaded if they are not of this run. student: the model folder whose tokens are wanted, by default `weights`.
    writer_hash: of the weights that write. scorers, columns, judging (weights of scorers) and files: with
    sample.enough, see stages score and select. split: of the prompts. Raises UserError if no prompt fits the model's
    context, or no completion can be used.
    """
    writer, k = writer or sample, k or sample.k
    name = getattr(writer, "name", writer.model if isinstance(writer, OpenAI) else "current")
    key = f"sample.models.{name}" if isinstance(writer, Writer) else "sample"
    folder = ModelFolder(weights, own or model)
    student_folder = ModelFolder(student, model) if student else folder
    tokenizer = student_folder.tokenizer()
    unread = [] if sample.enough else ["metadata"]
    rows = read_table(prompts / "prompts.parquet").drop_columns(unread).to_pylist()
    drawn = draw_prompts([r for r in rows if r["split"] == split], shares, sample.prompts, seed, round)
    if len(drawn) < sample.prompts:
        stage.console.warn(f"sample.prompts={sample.prompts}, but there are only {len(drawn)} "
                           f"{'training' if split == 'train' else split} prompts")
    context, drops = student_folder.context_length(), Drops(stage)
    if not isinstance(writer, OpenAI):
        context = min(context, folder.context_length())
    fits = fitting(tokenizer, drawn, context - sample.max_new_tokens, drops)
    if not fits:
        raise UserError(f"{stage.name}: none of {len(drawn)} prompts leaves room for sample.max_new_tokens="
                        f"{sample.max_new_tokens} in the model's context of {context} tokens")
    if len(fits) * k > MOST:
        raise UserError(f"{stage.name}: sample.k={sample.k} of {len(fits):,} prompts are {len(fits) * k:,} "
                         f"completions in a round, {MOST:,} at most; lower it or sample.prompts")
    parts = [fits[i:i + sample.shard_prompts] for i in range(0, len(fits), sample.shard_prompts)]
    # no step has rows of two shards, since a shard's completions do not depend on the next shard
    if isinstance(writer, InProcess) and writer.batch_size > sample.shard_prompts * k and len(parts) > 1:
        stage.console.warn(f"{stage.name}: {key}.batch_size={writer.batch_size} is never reached: a shard has "
                           f"sample.shard_prompts={sample.shard_prompts} prompts of {k} completions, "
                           f"{sample.shard_prompts * k} in all; raise sample.shard_prompts to "
                           f"{-(-writer.batch_size // k)} or more to fill it")
    shards = [Shard(stage.dir / f"shard-{i:05}.parquet", part,
                    [(row["prompt_id"], s) for row in part for s in range(first, first + k)],
                    stage.work / f"drops-{i:05}.parquet") for i, part in enumerate(parts)]
    settings = Settings(sample.max_new_tokens, sample.temperature, sample.top_k, sample.top_p,
                        frozenset(stop_ids(tokenizer, student_folder.path)),
                        hash_int(seed, "sample", round, *([name] if isinstance(writer, Writer) else [])))
    job = Job(stage, writer, key, folder, student_folder, tokenizer, settings, compute, fits)
    about = {"writer": name, "writer_hash": writer_hash}

    def text_of(c: Completion) -> str:
        return completion_text(tokenizer, c.tokens) if c.text is None else c.text

    verdicts = Verdicts(stage, scorers, files, score, compute, (), stage.scored) if sample.enough else None

    def correct(row: dict, c: Completion) -> bool:
        item = item_of(row, Columns(*columns[row["source"]]), text_of(c), c.tokens, f"prompt {row['prompt_id']}")
        judge = Judging(judging, None, score.correct_by, score.correct_at)
        return judge(row["source"], verdicts(row["source"], item), c.finish == "stop")["correct"]

    def to_table(engine, rows: list[dict], on_progress, drops: Drops) -> Callable[[], pa.Table]:
        if sample.enough is None:
            found = engine.write(rows, k, 0, on_progress)
        else:
            found = until_enough(engine, rows, k, sample.enough, correct, on_progress)
        return lambda: table_of(rows, found, drops)

    def table_of(rows: list[dict], found: list[list[Completion]], drops: Drops) -> pa.Table:
        made = []
        for row, completions in zip(rows, found, strict=True):
            for s in range(k):
                ids = {"prompt_id": row["prompt_id"], "sample_index": first + s}
                c = completions[s] if s < len(completions) else Completion(finish="released")
                if c.finish == "stop" or (c.finish == "length" and c.text is None):
                    made.append(ids | about | {
                        "prompt_tokens": row["tokens"], "completion_tokens": c.tokens, "completion": text_of(c),
                        "logp": c.logp, "finish": c.finish, "from_text": c.text is not None})
                else:
                    detail = c.detail or f"sample.enough={sample.enough}" * (c.finish == "released")
                    drops.add("cut" if c.finish == "length" else c.finish, **ids, source=row["source"], detail=detail)
        return pa.Table.from_pylist(made, schema=SCHEMA)

    # on a CPU Strop's sampler and vLLM use all cores
    idle = isinstance(writer, OpenAI) or stage.world.device.type == "cuda"
    with (closing(verdicts) if verdicts else nullcontext(),
          stage.ahead(stage, idle) if stage.ahead else nullcontext() as ahead):
        run_shards(stage, stage.name, shards, ("prompt_id", "sample_index"), SCHEMA, lambda: open_writer(job), to_table,
                   lane(stage.world, writer), ahead.add if ahead else lambda path: None,
                   lambda engine, rows: engine.expect(rows, k, 0) if sample.enough is None else None)
    if stage.world.first:
        collect_drops(shards, drops)
        drops.write()
        stage.counts |= {"prompts": len(fits)} | counts_of([shard.path for shard in shards])
        if isinstance(writer, OpenAI):
            stage.counts |= cost_of(usage(stage), writer)
        if not stage.counts["samples"]:
            reasons = ", ".join(f"{name.removeprefix('dropped/')} {n}" for name, n in stage.counts.items()
                                if name.startswith("dropped/"))
            raise UserError(f"{stage.name}: none of {len(fits) * k} completions of {name} can be used ({reasons}); "
                            "raise sample.max_new_tokens if they are cut, else change the model or the prompts")
        if released := stage.counts.get("dropped/released"):
            stage.console.warn(f"{stage.name}: sample.enough={sample.enough} released {released:,} of "
                               f"{len(fits) * k:,} completions; pass rates are too high, because drawing stopped at "
                               "correct ones")


def counts_of(paths: list[Path]) -> dict[str, float]:
    table = pa.concat_tables([read_table(path).select(["completion_tokens", "finish"]) for path in paths])
    lengths = [len(tokens) for tokens in table["completion_tokens"].to_pylist()]
    n, cut = max(1, len(lengths)), table["finish"].to_pylist().count("length")
    return {"samples": len(lengths), "tokens": sum(lengths), "cut_share": cut / n, "mean_length": sum(lengths) / n}


def gather(stage: Stage, *, writers: dict[str, Path]) -> None:
    """The samples of several writers as one artifact."""
    paths: list[Path] = []
    for name, folder in writers.items():
        mine = sorted(folder.glob("shard-*.parquet"))
        for path in mine:
            paths.append(stage.dir / f"shard-{len(paths):05}.parquet")
            shutil.copyfile(path, paths[-1])
        stage.counts[f"samples/{name}"] = sum(read_table(path).num_rows for path in mine)
    ids = {i for path in paths for i in read_table(path)["prompt_id"].to_pylist()}
    stage.counts |= {"prompts": len(ids)} | counts_of(paths)
