"""Results of a run: pass rates of the start weights and of every round's candidates, and paired gains."""

import math
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.compute as compute

from strop.trainer.run.records import SUMMARY, read_record
from strop.trainer.run.tables import read_table


def correct(run_dir: Path, where: tuple[str, str], split: str) -> dict[str, bool]:
    """prompt_id -> correct, of one candidate of an evaluate artifact."""
    artifact, candidate = where
    table = read_table(run_dir / artifact / "results.parquet", ["candidate", "split", "prompt_id", "correct"])
    mine = compute.and_(compute.equal(table["candidate"], candidate), compute.equal(table["split"], split))
    table = table.filter(mine)
    return dict(zip(table["prompt_id"].to_pylist(), table["correct"].to_pylist(), strict=True))


def gain(new: dict[str, bool], old: dict[str, bool], resamples: int) -> dict | None:
    """Pass rate of `new` minus that of `old` on their common prompts: `gain`, its 95 % paired bootstrap interval `low`
    to `high`, and the number of prompts `n`. None if they have no prompt in common."""
    ids = sorted(new.keys() & old.keys())
    if not ids:
        return None
    a, b = (np.array([side[i] for i in ids], dtype=float) for side in (new, old))
    value, low, high = paired_bootstrap(a, b, resamples, 0)
    return {"gain": value, "low": low, "high": high, "n": len(ids)}


def round_results(run_dir: Path, promotions: list[dict], base: tuple[str, str] | None, resamples: int) -> list[dict]:
    """A row for the start weights and for each candidate of each round: `round`, `stop`, `promoted`, the splits' pass
    rates, and on the test split `over_base` and `part` (the gain over the previous candidate of the round).

    A round's first candidate has no row, since the round began with it. base: where the start weights were evaluated;
    without it there are no results."""
    if base is None:
        return []

    @cache
    def test(where: tuple[str, str]) -> dict[str, bool]:
        return correct(run_dir, where, "test")

    def over(new: tuple[str, str], old: tuple[str, str]) -> dict:
        after, before = test(new), test(old)
        assert after.keys() == before.keys(), (new, old)
        return {"split": "test"} | gain(after, before, resamples)

    rows = [{"round": None, "stop": "base", "promoted": False, "where": base, **rates(run_dir, base)}]
    for promotion in promotions:
        stops = {stop: tuple(where) for stop, where in promotion["candidates"].items()}
        for before, stop in pairwise(stops):
            where = stops[stop]
            rows.append({"round": promotion["round"], "stop": stop, "promoted": promotion["promoted"] == stop,
                         "where": where, "before": before, **rates(run_dir, where),
                         "over_base": over(where, base), "part": over(where, stops[before])})
    return rows


def rates(run_dir: Path, where: tuple[str, str]) -> dict:
    summary = read_record(run_dir / where[0] / "summary.json", SUMMARY)[where[1]]
    return {split: summary[split] for split in ("validation", "test")}


def merits(measure: str, where: list[tuple[Path, str]], split: str) -> list[float]:
    """How good candidates are by `measure`, one of pass_rate, mean and win_rate, of one scorer's values if :NAME
    follows. A win rate is over the first candidate, see `win_rate`. where: (folder of the evaluation, candidate)."""
    kind, _, scorer = measure.partition(":")
    if kind == "win_rate":
        found = [values_of(folder, candidate, split, scorer) for folder, candidate in where]
        return [win_rate(values, found[0]) or 0.0 for values in found]
    summaries = [read_record(folder / "summary.json", SUMMARY)[candidate][split] for folder, candidate in where]
    if scorer:
        summaries = [summary["scorers"].get(scorer, {}) for summary in summaries]
    return [-math.inf if summary.get(kind) is None else summary[kind] for summary in summaries]


def values_of(folder: Path, candidate: str, split: str, scorer: str = "") -> dict[str, float]:
    """prompt_id -> score, or value by `scorer`, of one candidate of an evaluation."""
    rows = [r for r in read_table(folder / "results.parquet").select(
        ["candidate", "split", "prompt_id", "score"]).to_pylist() if (r["candidate"], r["split"]) == (candidate, split)]
    found = {r["prompt_id"]: r["score"] for r in rows}
    if scorer:
        values = read_table(folder / "scores.parquet").select(["candidate", "prompt_id", "scorer", "value"]).to_pylist()
        found = {r["prompt_id"]: r["value"] for r in values
                 if (r["candidate"], r["scorer"]) == (candidate, scorer) and r["prompt_id"] in found}
    return {prompt_id: value for prompt_id, value in found.items() if value is not None}


def win_rate(new: dict[str, float], old: dict[str, float]) -> float | None:
    """Share of the common prompts on which `new` has the higher value, ties as half; None without common prompts."""
    ids = new.keys() & old.keys()
    return sum((new[i] > old[i]) + 0.5 * (new[i] == old[i]) for i in ids) / len(ids) if ids else None


def print_results(console, results: list[dict]) -> None:
    """Prints the table of rounds at the end of a run, from `round_results`."""
    rows = []
    for r in results:
        name = "base" if r["round"] is None else f"{r['round']:02} {r['stop']}{' *' if r['promoted'] else ''}"
        rows.append([name, f"{r['validation']['pass_rate']:.1%}", f"{r['test']['pass_rate']:.1%}",
                     points(r.get("over_base")), f"{points(r['part'])} over {r['before']}" if "part" in r else "",
                     f"{r['test']['mean_length']:.1f}", f"{r['test']['cut_share']:.1%}"])
    if rows:
        console.table("rounds (* promoted; points with 95 % paired bootstrap interval on the test split)",
                      ["weights", "validation", "test", "gain over base", "gain of this step", "length", "cut"], rows)


def points(g: dict | None) -> str:
    return f"{100 * g['gain']:+.1f} [{100 * g['low']:+.1f}, {100 * g['high']:+.1f}]" if g else ""


def paired_bootstrap(new: np.ndarray, old: np.ndarray, resamples: int, seed: int,
                     level: float = 0.95) -> tuple[float, float, float]:
    """(gain, low, high): the mean of `new` - `old` and its percentile interval over resampled prompts. new, old:
    [prompts], in the same order. Raises ValueError if they differ in length or are empty."""
    if new.shape != old.shape or new.ndim != 1 or not len(new):
        raise ValueError(f"paired_bootstrap needs two arrays of the same prompts, got shapes {new.shape}, {old.shape}")
    # prompts with equal differences are exchangeable, so the counts of the distinct differences are multinomial
    values, counts = np.unique(new.astype(np.float64) - old.astype(np.float64), return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(new), counts / len(new), size=resamples)
    low, high = np.quantile(drawn @ values / len(new), [(1 - level) / 2, (1 + level) / 2])
    return float(values @ counts / len(new)), float(low), float(high)


def wilson(rate: float, n: int) -> tuple[float, float]:
    """95 % interval of a share observed in n trials (Wilson's score interval)."""
    z = 1.959964
    if n == 0:
        return 0.0, 1.0
    center, half = rate + z * z / (2 * n), z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return max(0.0, (center - half) / (1 + z * z / n)), min(1.0, (center + half) / (1 + z * z / n))


def percent(rate: float) -> str:
    return f"{100 * rate:.1f} %"
