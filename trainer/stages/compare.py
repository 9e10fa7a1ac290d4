"""Comparison: the best of n samples beside the policies that were trained, at the KL of each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from strop.trainer.config import Part
from strop.trainer.data.samples import Judging, read_scored, read_values
from strop.trainer.errors import UserError
from strop.trainer.models.kl import summed
from strop.trainer.models.loading import DTYPES, ModelFolder
from strop.trainer.reports.best_of import curve, half_interval
from strop.trainer.reports.comparison import COLUMNS, cells, figure, page
from strop.trainer.run.files import write_json
from strop.trainer.run.store import Stage
from strop.trainer.run.tables import read_table

KL_TOKENS = 1 << 17  # of completions, whose hidden states are in memory at once


def compare(stage: Stage, *, weights: dict[str, dict[str, float]], model: Part, compute: Part, prompts: Path,
            sample: Path, scores: Path, rewards: Path, start: Path, policies: dict[str, Path]) -> None:
    """Writes comparison.json, comparison.svg and comparison.md.

    sample: completions at temperature 1 by the policies under their names as writers, and by `start` under another.
    weights: source -> scorer -> its weight in the score, which decides who wins; rewards: values of reward models,
    whose sum picks the best of n. Raises UserError if no completion of some weights has both.
    """
    sources = {r["prompt_id"]: r["source"] for r in read_table(prompts / "prompts.parquet").to_pylist()}
    rows = read_scored(sample, scores, sources, Judging(weights, None, None, None), prompts)
    values = read_values(read_table(rewards / "scores.parquet"), ("prompt_id", "sample_index"))
    for row in rows:
        found = [value for value, _ in values[row["prompt_id"], row["sample_index"]].values()]
        row["reward"] = None if None in found else sum(found)
    rows = [row for row in rows if row["reward"] is not None and row["score"] is not None]
    by_writer = defaultdict(list)
    for row in rows:
        by_writer[row["writer"] if row["writer"] in policies else None].append(row)
    for name, who in {None: start, **policies}.items():
        if not by_writer[name]:
            raise UserError(f"{stage.name}: no completion of {who} has a score and a reward; see the errors in "
                            f"{scores} and {rewards}")
    drawn = [{"prompt_id": r["prompt_id"], "score": r["reward"], "correct": r["score"]} for r in by_writer[None]]
    best = [{"name": f"best of {r['n']}", "n": r["n"], "kl": r["kl_bound"], "kl_error": None, "score": r["pass_rate"],
             "score_error": r["error"], "reward": r["score"], "win_rate": r["win_rate"], "win_error": r["win_error"],
             "win_bound": r["win_bound"], "prompts": r["prompts"]} for r in curve(drawn)]
    kept = {name: first_tokens(by_writer[name]) for name in policies}
    completions = {name: [(r["prompt_tokens"], r["completion_tokens"]) for r in mine] for name, mine in kept.items()}
    found = summed({name: ModelFolder(folder, model) for name, folder in policies.items()}, completions,
                   ModelFolder(start, model), DTYPES[compute.dtype], stage.world.device)
    trained = []
    for name in policies:
        for row, nats in zip(kept[name], found[name][0], strict=True):
            row["kl"] = nats
        (kl, kl_error), (score, score_error), (reward, _) = (mean(by_prompt(rows, key).values()) for rows, key in (
            (kept[name], "kl"), (by_writer[name], "score"), (by_writer[name], "reward")))
        wins = wins_over(by_writer[name], by_writer[None])
        trained.append({"name": name, "n": None, "kl": kl, "kl_error": kl_error, "score": score,
                        "score_error": score_error, "reward": reward, "win_rate": float(np.mean(wins)),
                        "win_error": half_interval(wins), "win_bound": None, "prompts": len(wins)})
        stage.counts |= {f"{name}/kl": kl, f"{name}/win_rate": trained[-1]["win_rate"]}
    write_json(stage.dir / "comparison.json", [*best, *trained])
    (stage.dir / "comparison.svg").write_text(figure([*best, *trained]), encoding="utf-8")
    (stage.dir / "comparison.md").write_text(page([*best, *trained]), encoding="utf-8")
    stage.console.table(f"{stage.name}: best of n and trained policies, {stage.dir.parent.name}/comparison.svg",
                        COLUMNS, [cells(row) for row in [*best, *trained]])


def mean(values: Iterable[list[float]]) -> tuple[float, float]:
    """The mean over prompts of each prompt's mean, and half of its 95 % interval."""
    means = [float(np.mean(mine)) for mine in values]
    return float(np.mean(means)), half_interval(means)


def by_prompt(rows: list[dict], key: str) -> dict[str, list[float]]:
    """prompt_id -> the values `key` of its rows."""
    found = defaultdict(list)
    for row in rows:
        found[row["prompt_id"]].append(row[key])
    return found


def wins_over(rows: list[dict], others: list[dict]) -> list[float]:
    """For each prompt that both have, how often a completion of `rows` has a higher score than one of `others`, ties
    half, over all pairs of them."""
    mine, theirs = by_prompt(rows, "score"), by_prompt(others, "score")
    found = []
    for prompt_id in sorted(mine.keys() & theirs.keys()):
        a, b = np.array(mine[prompt_id])[:, None], np.array(theirs[prompt_id])[None]
        found.append(float(np.mean((a > b) + 0.5 * (a == b))))
    return found


def first_tokens(rows: list[dict]) -> list[dict]:
    """The first completions of all prompts, then the second ones and so on, up to KL_TOKENS."""
    nth, order, kept, tokens = defaultdict(int), [], [], 0
    for row in rows:
        order.append(nth[row["prompt_id"]])
        nth[row["prompt_id"]] += 1
    for i in sorted(range(len(rows)), key=lambda i: order[i]):
        tokens += len(rows[i]["completion_tokens"])
        if kept and tokens > KL_TOKENS:
            break
        kept.append(rows[i])
    return kept
