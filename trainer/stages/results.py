"""Evaluate: the scores of held-out completions, and each candidate's pass rate, mean score and win rate."""

from collections import defaultdict
from pathlib import Path
from statistics import fmean

import pyarrow as pa

from strop.trainer.config import Part, Score, Scorer
from strop.trainer.data.samples import Judging, read_values
from strop.trainer.run.files import write_json
from strop.trainer.run.store import Stage
from strop.trainer.run.tables import read_table, write_table
from strop.trainer.scoring.base import Columns, item_of
from strop.trainer.scoring.table import keep_verdicts, score_rows

KEY = {"candidate": pa.string(), "prompt_id": pa.string()}
SCHEMA = pa.schema([("candidate", pa.string()), ("split", pa.string()), ("source", pa.string()),
                    ("prompt_id", pa.string()), ("completion", pa.string()), ("completion_tokens", pa.int32()),
                    ("finish", pa.string()), ("score", pa.float64()), ("correct", pa.bool_())])


def evaluate(stage: Stage, *, score: Score, scorers: dict[str, list[Scorer]], weights: dict[str, dict[str, float]],
             columns: dict[str, list[str]], prompts: Path, completions: Path, candidates: dict[str, Path],
             files: dict[str, Path], compute: Part | None = None) -> None:
    """Writes results.parquet (a row per candidate and prompt), scores.parquet and summary.json.

    scorers and weights: of each source; columns: see base.Columns; files: those that scorers name. A completion is
    correct if it stopped by itself and has at least score.correct_at. Runs on every rank and resumes by shard. Raises
    UserError if scorers fail more than score.max_errors times.
    """
    asked = {row["prompt_id"]: row for row in read_table(prompts / "prompts.parquet").to_pylist()}
    rows = read_table(completions / "completions.parquet").to_pylist()

    def to_item(row: dict):
        return item_of(asked[row["prompt_id"]], Columns(*columns[row["source"]]), row["completion"], row["tokens"],
                       f"prompt {row['prompt_id']} of {row['split']}, {row['candidate']}")

    table = score_rows(stage, rows, KEY, to_item, scorers, files, score, compute)
    if stage.world.first:
        judging = Judging(weights, None, score.correct_by, score.correct_at)
        values = read_values(table, tuple(KEY))
        for row in rows:
            row["values"] = values[row["candidate"], row["prompt_id"]]
            row |= judging(row["source"], row["values"], row["finish"] == "stop")
        write_table(stage.dir / "results.parquet", pa.Table.from_pylist(rows, schema=SCHEMA))
        write_table(stage.dir / "scores.parquet", table)
        keep_verdicts(stage, table, scorers, prompt=1)
        summary = summarize(rows, score.correct_at)
        write_json(stage.dir / "summary.json", summary)
        stage.counts |= {f"{name}/{split}": found["pass_rate"] for name, splits in summary.items()
                         for split, found in splits.items()}


def summarize(rows: list[dict], correct_at: float) -> dict:
    """{candidate: {split: what describe returns}}"""
    summary: dict[str, dict] = defaultdict(dict)
    for row in rows:
        summary[row["candidate"]].setdefault(row["split"], []).append(row)
    return {name: {split: describe(found, correct_at) for split, found in splits.items()}
            for name, splits in summary.items()}


def describe(rows: list[dict], correct_at: float) -> dict:
    """pass_rate, mean score, n, by_source, mean_length in tokens, cut_share, and for each of the scorers its mean
    value, pass_rate and number of values n."""
    by_source: dict[str, list[bool]] = defaultdict(list)
    scorers: dict[str, list[tuple[float, bool]]] = defaultdict(list)
    for row in rows:
        by_source[row["source"]].append(row["correct"])
        for name, (value, _) in row["values"].items():
            if value is not None:
                scorers[name].append((value, row["finish"] == "stop" and value >= correct_at))
    scores = [row["score"] for row in rows if row["score"] is not None]
    return {"pass_rate": fmean(row["correct"] for row in rows), "mean": fmean(scores) if scores else None,
            "n": len(rows),
            "by_source": {s: {"pass_rate": fmean(right), "n": len(right)} for s, right in sorted(by_source.items())},
            "scorers": {name: {"mean": fmean(v for v, _ in found), "pass_rate": fmean(ok for _, ok in found),
                               "n": len(found)} for name, found in sorted(scorers.items())},
            "mean_length": fmean(row["completion_tokens"] for row in rows),
            "cut_share": fmean(row["finish"] == "length" for row in rows)}
