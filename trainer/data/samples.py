"""Reads samples and their scores, joined by (prompt_id, sample_index), and judges them."""

from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from strop.trainer.errors import UserError
from strop.trainer.run.tables import read_table


def read_samples(sample: Path) -> list[dict]:
    """All rows of a sample artifact's shards, sorted by (prompt_id, sample_index).

    Raises UserError if there are none or two have the same ids."""
    rows = [row for path in sorted(sample.glob("shard-*.parquet")) for row in read_table(path).to_pylist()]
    if not rows:
        raise UserError(f"{sample}: holds no samples; delete the folder to re-run the stage")
    rows.sort(key=_key)
    for a, b in pairwise(rows):
        if _key(a) == _key(b):
            raise UserError(f"{sample}: prompt {a['prompt_id']} has sample {a['sample_index']} twice; delete the "
                             "folder to re-run the stage")
    return rows


class Judging(NamedTuple):
    """How values become a score and a verdict. weights: source -> scorer -> its weight."""

    weights: dict[str, dict[str, float]]
    by: str | None  # the scorer whose value is the score; None: the sum by weight
    correct_by: str | None  # likewise of the verdict
    correct_at: float | None  # None: nothing says what is correct

    def __call__(self, source: str, values: dict[str, tuple[float | None, str | None]], stopped: bool) -> dict:
        """`score`, None if a scorer that it needs failed, and `correct`. values: scorer -> (value, error)."""
        if self.correct_at is None:
            return {"score": self._sum(source, values, self.by), "correct": None}
        against = self._sum(source, values, self.correct_by)
        return {"score": self._sum(source, values, self.by),
                "correct": stopped and against is not None and against >= self.correct_at}

    def _sum(self, source: str, values: dict, by: str | None) -> float | None:
        weights = {by: 1.0} if by else self.weights[source]
        counted = {name: values[name] for name, weight in weights.items() if weight}
        if any(error for _, error in counted.values()) or all(value is None for value, _ in counted.values()):
            return None
        # a scorer that does not apply to a row adds nothing
        return sum(weights[name] * value for name, (value, _) in counted.items() if value is not None)

    def decided(self, source: str, better: dict, worse: dict) -> str:
        """The scorer that adds most to the difference in score of two completions, by their values."""
        if self.by:
            return self.by
        parts = {name: weight * ((better[name][0] or 0.0) - (worse[name][0] or 0.0))
                 for name, weight in self.weights[source].items()}
        return max(parts, key=parts.get)


def read_values(table: pa.Table, key: tuple[str, ...]) -> dict[tuple, dict[str, tuple[float | None, str | None]]]:
    """{values of the columns `key`: {scorer: (value, error)}} of scores in long form."""
    found: dict[tuple, dict] = {}
    for row in table.select([*key, "scorer", "value", "error"]).to_pylist():
        found.setdefault(tuple(row[k] for k in key), {})[row["scorer"]] = row["value"], row["error"]
    return found


def read_scored(sample: Path, score: Path, sources: dict[str, str], judging: Judging, prompts: Path,
                topics: dict[str, str | None] | None = None) -> list[dict]:
    """The samples with their `source`, `values`, `score` and `correct`, and `topic` if there are topics. sources: of
    each training prompt of `prompts`; topics: the scorer of each source that tells the topic.

    Raises UserError unless every sample is of such a prompt and has the values of its source's scorers, and nothing
    else has any."""
    rows = read_samples(sample)
    table = read_table(score / "scores.parquet")
    values, told = read_values(table, ("prompt_id", "sample_index")), {}
    if names := set((topics or {}).values()) - {None}:
        told = {(*_key(row), row["scorer"]): row["detail"] for row in table.filter(pc.field("scorer").isin(names))
                .select(["prompt_id", "sample_index", "scorer", "detail"]).to_pylist()}
    missing = []
    for row in rows:
        row["source"], row["values"] = _source(row, sources, sample, prompts), values.get(_key(row), {})
        if row["values"].keys() != judging.weights[row["source"]].keys():
            missing.append(row)
    extra = len(values.keys() - {_key(row) for row in rows})
    if missing or extra:
        first = " (prompt {}, sample {}, ...)".format(*_key(missing[0])) if missing else ""
        raise UserError(f"{score}: {len(missing)} of {len(rows)} samples lack a score{first}, and {extra} scores have "
                        "no sample; delete the folder to re-run the stage")
    for row in rows:
        row |= judging(row["source"], row["values"], row["finish"] == "stop")
        if topics:
            row["topic"] = told.get((*_key(row), topics.get(row["source"])))
    return rows


def read_unscored(sample: Path, sources: dict[str, str], prompts: Path) -> list[dict]:
    """As read_scored, of samples that nothing scores: all that stopped by themselves are as good, and correct."""
    rows = read_samples(sample)
    for row in rows:
        row |= {"source": _source(row, sources, sample, prompts), "values": {}, "score": 1.0,
                "correct": row["finish"] == "stop"}
    return rows


def _source(row: dict, sources: dict[str, str], sample: Path, prompts: Path) -> str:
    if (source := sources.get(row["prompt_id"])) is None:
        raise UserError(f"{sample}: prompt {row['prompt_id']} is not among the training prompts of {prompts}; "
                        "delete the folder to re-run the stage")
    return source


def _key(row: dict) -> tuple[str, int]:
    return row["prompt_id"], row["sample_index"]
