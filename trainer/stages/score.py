"""Score: every sample, with its prompt's verifier."""

import json
from pathlib import Path

import pyarrow as pa

from strop.trainer.config import Score
from strop.trainer.data.samples import read_samples
from strop.trainer.errors import UserError
from strop.trainer.run.store import Stage
from strop.trainer.run.tables import read_table, write_table
from strop.trainer.scoring.rules import verify

SCHEMA = pa.schema([("prompt_id", pa.string()), ("sample_index", pa.int32()), ("score", pa.float64()),
                    ("correct", pa.bool_()), ("extracted", pa.string())])


def score(stage: Stage, *, score: Score, prompts: Path, sample: Path) -> None:
    """Writes scores.parquet. A sample is correct if it stopped by itself and scores at least score.correct_at. Raises
    UserError if a sample's prompt is not among the prompts."""
    asked = {row["prompt_id"]: row for row in read_table(prompts / "prompts.parquet").to_pylist()}
    samples, rows = read_samples(sample), []
    verified: dict[tuple[str, str], tuple[float, str | None]] = {}  # equal completions are verified once
    with stage.console.progress("score", len(samples), unit="completions") as progress:
        for row in samples:
            prompt = asked.get(row["prompt_id"])
            if prompt is None:
                raise UserError(f"{sample}: prompt {row['prompt_id']} is not in {prompts}; delete the folder to re-run "
                                 "the stage")
            key = row["prompt_id"], row["completion"]
            if key not in verified:
                verified[key] = verify(prompt["verifier"], row["completion"], prompt["answer"],
                                       json.loads(prompt["verifier_args"]), json.loads(prompt["metadata"]))
            value, extracted = verified[key]
            rows.append({"prompt_id": row["prompt_id"], "sample_index": row["sample_index"], "score": value,
                         "correct": row["finish"] == "stop" and value >= score.correct_at,
                         "extracted": extracted})
            progress.advance(1)
    write_table(stage.dir / "scores.parquet", pa.Table.from_pylist(rows, schema=SCHEMA))
    solved = {row["prompt_id"] for row in rows if row["correct"]}
    stage.counts |= {"completions": len(rows), "mean_score": sum(row["score"] for row in rows) / len(rows),
                     "pass_rate": sum(row["correct"] for row in rows) / len(rows), "solved_prompts": len(solved),
                     "cut_share": sum(row["finish"] != "stop" for row in samples) / len(rows)}
