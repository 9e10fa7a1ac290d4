"""Online training: completions of the weights in training, scored and learned from at once."""

from __future__ import annotations

import statistics
from contextlib import closing
from pathlib import Path

import pyarrow as pa

from strop.trainer.config import Log, Lora, Part, Scorer
from strop.trainer.data.chat import stop_ids
from strop.trainer.data.samples import Judging
from strop.trainer.errors import UserError
from strop.trainer.method_recipes import Online
from strop.trainer.models.loading import DTYPES, ModelFolder
from strop.trainer.run.store import Stage
from strop.trainer.run.tables import Drops, read_table
from strop.trainer.sampling.shards import fitting
from strop.trainer.scoring.base import Columns, Scored, item_of
from strop.trainer.scoring.table import VALUES, Verdicts, keep_verdicts, refuse, version_of
from strop.trainer.training import logprobs
from strop.trainer.training.guard import open_guard
from strop.trainer.training.local import Engine
from strop.trainer.training.online import OnlinePairs, PolicyGradient, train_online
from strop.trainer.training.probe import probe
from strop.trainer.training.rollouts import Rollouts

KEY = {"prompt_id": pa.string(), "step": pa.int32(), "sample_index": pa.int32()}


def online(stage: Stage, *, online: Online, lora: Lora, model: Part, compute: Part, log: Log, seed: int,
           score: Part, scorers: dict[str, list[Scorer]], columns: dict[str, list[str]],
           weights: dict[str, dict[str, float]], shares: dict[str, float], policy: Path, prompts: Path,
           files: dict[str, Path], reference: Path | None = None, same_weights: bool = False, round: int | None = None,
           evaluate: Part | None = None) -> None:
    """Trains the weights `policy` on completions that they write; writes model/, snapshots/, ema/, guard.json and
    rollouts/step-000001.parquet, ..., the completions of every step.

    score, scorers, columns and files: as in stage score. weights: source -> scorer -> its weight in the reward. shares:
    each source's share of the prompts. reference: the weights of the KL penalty, None without one or with anchor=ema;
    same_weights: they are those of the policy. Raises UserError if no prompt fits, if more than score.max_errors values
    fail, or if sampler and trainer do not agree on the log-probs of the first step.
    """
    world, folder = stage.world, ModelFolder(policy, model)
    tokenizer, drops = folder.tokenizer(), Drops(stage)
    asked = fitting_prompts(stage, online, folder, tokenizer, prompts, drops)
    (stage.dir / "rollouts").mkdir(exist_ok=True)
    engine = Engine(folder, online, stage, online.steps * online.epochs, compute=compute, lora=lora, seed=seed)
    scorer = logprobs.Scorer(engine.model, probe(engine.model, stage.console))
    engine.score_with(scorer)
    judging = Judging(weights, None, None, 0.0)
    rows_of = {row["prompt_id"]: row for row in asked}

    def to_item(row: dict):
        return item_of(rows_of[row["prompt_id"]], Columns(*columns[row["source"]]), row["completion"],
                       row["completion_tokens"], f"prompt {row['prompt_id']}, sample {row['sample_index']}")

    with closing(Verdicts(stage, scorers, files, score, compute)) as verdicts:
        def score_all(rows: list[dict]) -> list[tuple[list[dict], float | None]]:
            found: list[dict[str, Scored]] = [{} for _ in rows]
            for _, name, values, _ in verdicts.of(rows, to_item):
                for i, value in values.items():
                    found[i][name] = value
            return [(listed(values), reward_of(judging, row["source"], values))
                    for row, values in zip(rows, found, strict=True)]

        failed: list[str] = []

        def seen(rows: list[dict]) -> None:
            failed.extend(f"{s['scorer']}: {s['error']}" for row in rows for s in row["scores"] if s["error"])
            refuse(stage, failed, score.max_errors)

        rollouts = Rollouts(stage, engine, online, asked, shares, seed, (round or 0) * online.steps, tokenizer,
                            frozenset(stop_ids(tokenizer, folder.path)), score_all,
                            open_reference(stage, engine, scorer, reference and ModelFolder(reference, model), compute,
                                           same_weights))
        guard = open_guard(stage, engine, [], prompts, evaluate)
        objective = OnlinePairs(online) if online.pairs else PolicyGradient(online)
        steps = train_online(stage, engine, scorer, rollouts, objective, log.interval, guard, seen)
    if world.first:
        drops.write()
        count(stage, objective, steps, scorers, files, compute.dtype)


def fitting_prompts(stage: Stage, online: Online, folder: ModelFolder, tokenizer, prompts: Path,
                    drops: Drops) -> list[dict]:
    """The training prompts that leave room for their completions, with their `tokens`. Raises UserError without any."""
    room = min(folder.context_length(), online.max_length or 1 << 30) - online.max_new_tokens
    room = min(room, online.max_tokens - online.longest)
    rows = [row for row in read_table(prompts / "prompts.parquet").to_pylist() if row["split"] == "train"]
    found = fitting(tokenizer, rows, room, drops)
    if not found:
        raise UserError(f"{stage.name}: none of {len(rows)} prompts leaves room for online.max_new_tokens="
                        f"{online.max_new_tokens}: {room} tokens fit (online.max_tokens, online.max_length, the "
                        "model's context)")
    if len(found) < online.batch_size:
        stage.console.warn(f"{stage.name}: online.batch_size={online.batch_size}, but there are only {len(found)} "
                           "training prompts")
    return found


def open_reference(stage: Stage, engine: Engine, scorer: logprobs.Scorer, folder: ModelFolder | None, compute: Part,
                   same_weights: bool):
    """Log-probs under the reference: with anchor=ema, of the model in training, which has the average's weights when it
    is called; with adapters on the same weights, of the model without them; else of a second model, which is not
    trained. None without a reference."""
    if engine.section.anchor == "ema":
        return scorer
    if folder is None:
        return None
    if same_weights and engine.lora.rank:
        def without_adapters(groups):
            with engine.model.disable_adapter():
                return scorer(groups)

        return without_adapters
    frozen = folder.load(DTYPES[compute.dtype], stage.world.device, backend=compute.attention)
    return logprobs.Scorer(frozen.requires_grad_(False), scorer.packed or probe(frozen, stage.console))


def listed(values: dict[str, Scored]) -> list[dict]:
    """The verdicts of a completion, as rollouts have them."""
    return [{"scorer": name, "value": v.value, "detail": v.detail, "error": v.error} for name, v in values.items()]


def reward_of(judging: Judging, source: str, values: dict[str, Scored]) -> float | None:
    return judging(source, {name: (v.value, v.error) for name, v in values.items()}, True)["score"]


def count(stage: Stage, objective: OnlinePairs | PolicyGradient, steps: int, scorers: dict[str, list[Scorer]],
          files: dict[str, Path], dtype: str) -> None:
    """The stage's counts and the verdicts of its judges, from the completions of all steps."""
    counts = {"steps": steps, "completions": 0, "tokens": 0}
    cut, errors, rewards, values = 0, 0, [], []
    versions = {(source, scorer.name): version_of(scorer, files, dtype)
                for source, mine in scorers.items() for scorer in mine}
    judged = any(scorer.judge is not None for mine in scorers.values() for scorer in mine)
    for path in sorted((stage.dir / "rollouts").glob("step-*.parquet")):
        rows = read_table(path).to_pylist()
        counts["completions"] += len(rows)
        counts["tokens"] += sum(len(row["completion_tokens"]) for row in rows)
        cut += sum(row["finish"] == "length" for row in rows)
        errors += sum(score["error"] is not None for row in rows for score in row["scores"])
        rewards.append([row["reward"] for row in rows if row["reward"] is not None])
        for reason, n in objective.batch(rows).skipped.items():
            if n:
                counts[f"skipped/{reason}"] = counts.get(f"skipped/{reason}", 0) + n
        if judged:
            values += [{k: row[k] for k in KEY} | score | {"version": versions[row["source"], score["scorer"]]}
                       for row in rows for score in row["scores"]]
    stage.counts |= counts | {"cut_share": cut / counts["completions"]}
    for name, mine in (("first", rewards[0]), ("last", rewards[-1])):
        if mine:
            stage.counts[f"reward/{name}_step"] = statistics.fmean(mine)
    if errors:
        stage.counts["scorer_errors"] = errors
    keep_verdicts(stage, pa.Table.from_pylist(values, schema=pa.schema([*KEY.items(), *VALUES])), scorers, prompt=0)
