"""Sample: K completions of this round's prompts, in shards that are the unit of resume and of determinism."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa

from strop.trainer.chat import load_tokenizer, stop_ids
from strop.trainer.config import Recipe
from strop.trainer.generate import Generator, load_for_generation
from strop.trainer.models import DTYPES, context_length
from strop.trainer.prompts import allot, prompt_tokens
from strop.trainer.store import Drops, Stage, read_part, read_table, write_table

SCHEMA = pa.schema([("prompt_id", pa.string()), ("sample_index", pa.int32()),
                    ("prompt_tokens", pa.list_(pa.int32())), ("completion_tokens", pa.list_(pa.int32())),
                    ("completion", pa.string()), ("logp", pa.float32()), ("finish", pa.string())])


def sample(stage: Stage, recipe: Recipe, *, round: int, model: Path, prompts: Path) -> None:
    """Writes shard-00000.parquet, ...; shard i is made by rank i modulo the number of ranks. Runs on every rank.

    Raises ValueError if no prompt fits the model's context.
    """
    how, world = recipe.sample, stage.world
    tokenizer = load_tokenizer(model, recipe.model.chat_template, recipe.model.trust_remote_code)
    rows = read_table(prompts / "prompts.parquet").select(["prompt_id", "source", "split", "messages"]).to_pylist()
    shares = {s.name: s.share for s in recipe.data.sources}
    drawn = draw_prompts([r for r in rows if r["split"] == "train"], shares, how.prompts, recipe.seed, round)
    if len(drawn) < how.prompts:
        stage.console.warn(f"sample.prompts={how.prompts}, but there are only {len(drawn)} prompts to draw from")
    for row in drawn:
        row["tokens"] = prompt_tokens(tokenizer, row)
    context = context_length(model, recipe.model.trust_remote_code)
    fitting, overlong = fit(drawn, context - how.max_new_tokens)
    if not fitting:
        raise ValueError(f"{stage.name}: none of {len(drawn)} prompts leaves room for sample.max_new_tokens="
                         f"{how.max_new_tokens} in the model's context of {context} tokens")
    shards = list(enumerate(fitting[i : i + how.shard_prompts] for i in range(0, len(fitting), how.shard_prompts)))
    mine = [(i, shard) for i, shard in shards if i % world.size == world.rank]
    todo = [(i, shard) for i, shard in mine if not is_done(shard_path(stage.dir, i), shard, how.k)]
    if kept := sum(len(shard) for _, shard in mine) - sum(len(shard) for _, shard in todo):
        stage.console.line(f"{stage.name}: {len(mine) - len(todo)} shards ({kept * how.k} samples) kept from before")
    if todo:
        generator = Generator(load_for_generation(model, DTYPES[recipe.dtype], world.device,
                                                  recipe.model.trust_remote_code))
        stop = stop_ids(tokenizer, model)
        total = sum(len(shard) for _, shard in mine) * how.k
        with stage.console.progress(stage.name, total, done=kept * how.k) as bar:
            for i, shard in todo:
                completions = generator.generate(
                    [row["tokens"] for row in shard], k=how.k, ids=[row["prompt_id"] for row in shard],
                    seed=hash_int(recipe.seed, "sample", round), max_new_tokens=how.max_new_tokens,
                    temperature=how.temperature, top_k=how.top_k, top_p=how.top_p, stop_ids=stop,
                    batch_size=how.batch_size, on_progress=bar.advance)
                write_table(shard_path(stage.dir, i), shard_table(tokenizer, shard, completions))
    world.barrier()
    if world.first:
        drops = Drops(stage)
        for row in overlong:
            drops.add("overlong", prompt_id=row["prompt_id"], source=row["source"],
                      detail=f"{len(row['tokens'])} tokens")
        drops.write()
        count(stage, [shard_path(stage.dir, i) for i, _ in shards], len(fitting))


def draw_prompts(rows: list[dict], shares: dict[str, float], n: int, seed: int, round: int) -> list[dict]:
    """This round's `n` prompts (all, if there are fewer), sources in proportion to their shares.

    Each source is gone through in a shuffled order; no prompt comes again before all of its source have come, then the
    order is drawn anew. No prompt comes twice in a round.
    """
    sources: dict[str, dict[str, dict]] = {name: {} for name in shares}
    for row in rows:
        sources[row["source"]][row["prompt_id"]] = row
    chosen = []
    room = {name: len(of) for name, of in sources.items()}
    for name, m in allot(min(n, sum(room.values())), shares, room).items():
        chosen += [sources[name][i] for i in stream(sorted(sources[name]), m, seed, name, round)]
    return sorted(chosen, key=lambda row: hash_int(seed, "order", round, row["prompt_id"]))


def stream(ids: list[str], m: int, seed: int, source: str, round: int) -> list[str]:
    """The `m` ids that round `round` takes, where rounds take turns at an endless row of shuffled passes over `ids`."""
    waiting: list[str] = []
    taken: list[str] = []
    epoch = 0
    for _ in range(round + 1):
        if len(waiting) < m:
            fresh = sorted(ids, key=lambda i: hash_int(seed, "pass", source, epoch, i))
            left = set(waiting)  # goes first, and comes late in the new pass: not twice in this round
            waiting += [i for i in fresh if i not in left] + [i for i in fresh if i in left]
            epoch += 1
        taken, waiting = waiting[:m], waiting[m:]
    return taken


def hash_int(*parts) -> int:
    """A 63-bit number that depends on `parts` only."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def fit(rows: list[dict], room: int) -> tuple[list[dict], list[dict]]:
    """(rows whose `tokens` fit `room`, the others)."""
    return [r for r in rows if len(r["tokens"]) <= room], [r for r in rows if len(r["tokens"]) > room]


def shard_path(folder: Path, i: int) -> Path:
    return folder / f"shard-{i:05}.parquet"


def is_done(path: Path, shard: list[dict], k: int) -> bool:
    """Whether `path` holds all samples of `shard`; a file that does not is made again."""
    table = read_part(path, SCHEMA)
    expected = [(row["prompt_id"], s) for row in shard for s in range(k)]
    return table is not None and expected == list(
        zip(table["prompt_id"].to_pylist(), table["sample_index"].to_pylist(), strict=True))


def shard_table(tokenizer, shard: list[dict], completions: list) -> pa.Table:
    rows = [{"prompt_id": row["prompt_id"], "sample_index": s, "prompt_tokens": row["tokens"],
             "completion_tokens": c.tokens, "completion": tokenizer.decode(c.tokens, skip_special_tokens=True),
             "logp": c.logp, "finish": c.finish}
            for row, samples in zip(shard, completions, strict=True) for s, c in enumerate(samples)]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def count(stage: Stage, shards: Iterable[Path], prompts: int) -> None:
    lengths, cut = [], 0
    for path in shards:
        table = read_table(path)
        lengths += [len(tokens) for tokens in table["completion_tokens"].to_pylist()]
        cut += table["finish"].to_pylist().count("length")
    stage.counts |= {"prompts": prompts, "samples": len(lengths), "tokens": sum(lengths),
                     "cut_share": cut / len(lengths), "mean_length": sum(lengths) / len(lengths)}
