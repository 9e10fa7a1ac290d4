"""Reads samples and their scores, joined by (prompt_id, sample_index)."""

from itertools import pairwise
from pathlib import Path

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


def read_scored(sample: Path, score: Path) -> list[dict]:
    """The samples with their `score` and `correct`. Raises UserError unless every sample has exactly one score."""
    rows = read_samples(sample)
    scores = {_key(row): row for row in read_table(score / "scores.parquet").to_pylist()}
    missing, extra = [row for row in rows if _key(row) not in scores], len(scores) - len(rows)
    if missing or extra:
        first = " (prompt {}, sample {}, ...)".format(*_key(missing[0])) if missing else ""
        raise UserError(f"{score}: {len(missing)} of {len(rows)} samples have no score{first}, and there are "
                         f"{len(scores)} scores; delete the folder to re-run the stage")
    return [row | {k: scores[_key(row)][k] for k in ("score", "correct")} for row in rows]


def _key(row: dict) -> tuple[str, int]:
    return row["prompt_id"], row["sample_index"]
