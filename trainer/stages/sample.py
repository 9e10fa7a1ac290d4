"""Sample: K completions of this round's prompts, in shards: the unit of resume and of determinism."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from strop.trainer.config import Part, Sample
from strop.trainer.data.chat import completion_text, stop_ids
from strop.trainer.data.splits import draw_prompts, hash_int
from strop.trainer.errors import UserError
from strop.trainer.models.loading import DTYPES, ModelFolder
from strop.trainer.run.store import Stage
from strop.trainer.run.tables import Drops, read_table
from strop.trainer.sampling.in_process import Generator, load_for_generation
from strop.trainer.sampling.shards import Shard, fitting, run_shards

MOST = 1 << 25  # completions of a round
SCHEMA = pa.schema([("prompt_id", pa.string()), ("sample_index", pa.int32()),
                    ("prompt_tokens", pa.list_(pa.int32())), ("completion_tokens", pa.list_(pa.int32())),
                    ("completion", pa.string()), ("logp", pa.float32()), ("finish", pa.string())])


def sample(stage: Stage, *, sample: Sample, model: Part, compute: Part, shares: dict[str, float], seed: int,
           round: int, weights: Path, prompts: Path) -> None:
    """Writes shard-00000.parquet, ...; shard i runs on rank i modulo the number of ranks. compute: the recipe's dtype.
    shares: each source's share of the prompts. Raises UserError if no prompt fits the model's context."""
    folder = ModelFolder(weights, model)
    tokenizer = folder.tokenizer()
    rows = read_table(prompts / "prompts.parquet").drop_columns(["verifier_args", "metadata"]).to_pylist()
    drawn = draw_prompts([r for r in rows if r["split"] == "train"], shares, sample.prompts, seed, round)
    if len(drawn) < sample.prompts:
        stage.console.warn(f"sample.prompts={sample.prompts}, but there are only {len(drawn)} training prompts")
    context, drops = folder.context_length(), Drops(stage)
    fits = fitting(tokenizer, drawn, context - sample.max_new_tokens, drops)
    if not fits:
        raise UserError(f"{stage.name}: none of {len(drawn)} prompts leaves room for sample.max_new_tokens="
                        f"{sample.max_new_tokens} in the model's context of {context} tokens")
    if len(fits) * sample.k > MOST:
        raise UserError(f"{stage.name}: sample.k={sample.k} of {len(fits):,} prompts are {len(fits) * sample.k:,} "
                         f"completions in a round, {MOST:,} at most; lower it or sample.prompts")
    parts = [fits[i:i + sample.shard_prompts] for i in range(0, len(fits), sample.shard_prompts)]
    shards = [Shard(stage.dir / f"shard-{i:05}.parquet", part,
                    [(row["prompt_id"], k) for row in part for k in range(sample.k)]) for i, part in enumerate(parts)]

    def load():
        generator = Generator(load_for_generation(folder, DTYPES[compute.dtype], stage.world.device))
        stop = stop_ids(tokenizer, weights)
        return lambda rows, on_progress: generator.generate(
            [row["tokens"] for row in rows], k=sample.k, ids=[row["prompt_id"] for row in rows],
            seed=hash_int(seed, "sample", round), max_new_tokens=sample.max_new_tokens,
            temperature=sample.temperature, top_k=sample.top_k, top_p=sample.top_p, stop_ids=stop,
            batch_size=sample.batch_size, on_progress=on_progress)

    run_shards(stage, stage.name, shards, ("prompt_id", "sample_index"), SCHEMA, load,
               lambda rows, completions: shard_table(tokenizer, rows, completions))
    if stage.world.first:
        drops.write()
        table = pa.concat_tables([read_table(shard.path).select(["completion_tokens", "finish"]) for shard in shards])
        lengths = [len(tokens) for tokens in table["completion_tokens"].to_pylist()]
        cut = table["finish"].to_pylist().count("length")
        stage.counts |= {"prompts": len(fits), "samples": len(lengths), "tokens": sum(lengths),
                         "cut_share": cut / len(lengths), "mean_length": sum(lengths) / len(lengths)}


def shard_table(tokenizer, shard: list[dict], completions: list) -> pa.Table:
    rows = [{"prompt_id": row["prompt_id"], "sample_index": s, "prompt_tokens": row["tokens"],
             "completion_tokens": c.tokens, "completion": completion_text(tokenizer, c.tokens),
             "logp": c.logp, "finish": c.finish}
            for row, samples in zip(shard, completions, strict=True) for s, c in enumerate(samples)]
    return pa.Table.from_pylist(rows, schema=SCHEMA)
