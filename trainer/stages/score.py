"""Score: every sample, by every scorer of its source, in long form."""

import math
from collections import Counter
from pathlib import Path
from statistics import fmean, pstdev

import pyarrow as pa

from strop.trainer.config import Part, Score, Scorer
from strop.trainer.data.samples import read_samples
from strop.trainer.errors import UserError
from strop.trainer.run.files import write_json
from strop.trainer.run.store import Stage
from strop.trainer.run.tables import read_table, write_table
from strop.trainer.scoring.base import Columns, item_of
from strop.trainer.scoring.table import keep_verdicts, score_rows

KEY = {"prompt_id": pa.string(), "sample_index": pa.int32()}


def score(stage: Stage, *, score: Score, scorers: dict[str, list[Scorer]], columns: dict[str, list[str]], prompts: Path,
          sample: Path, files: dict[str, Path], compute: Part | None = None, safety: Part | None = None) -> None:
    """Writes scores.parquet. scorers: of each source; columns: see base.Columns; files: those that scorers name.
    safety: adds the value `reward`, see piecewise.

    Runs on every rank and resumes by shard. Raises UserError if a sample's prompt is not among the prompts, or if
    scorers fail more than score.max_errors times."""
    asked = {row["prompt_id"]: row for row in read_table(prompts / "prompts.parquet").to_pylist()}
    samples = read_samples(sample)
    for row in samples:
        if row["prompt_id"] not in asked:
            raise UserError(f"{sample}: prompt {row['prompt_id']} is not in {prompts}; delete the folder to re-run "
                             "the stage")
        row["source"] = asked[row["prompt_id"]]["source"]

    def to_item(row: dict):
        return item_of(asked[row["prompt_id"]], Columns(*columns[row["source"]]), row["completion"],
                       row["completion_tokens"], f"prompt {row['prompt_id']}, sample {row['sample_index']}")

    table = score_rows(stage, samples, KEY, to_item, scorers, files, score, compute,
                       sorted(sample.parent.glob("*.scored")))  # by Ahead
    if stage.world.first:
        if safety:
            sources = {row["prompt_id"]: row["source"] for row in samples}
            table = pa.Table.from_pylist(piecewise(table.to_pylist(), sources, safety), schema=table.schema)
        write_table(stage.dir / "scores.parquet", table)
        write_json(stage.dir / "sources.json", by_source(table, {
            (row["prompt_id"], row["sample_index"]): row["source"] for row in samples}, scorers))
        keep_verdicts(stage, table, scorers, prompt=0)
        stage.counts |= {"completions": len(samples)} | means(table) | {
            "cut_share": sum(row["finish"] != "stop" for row in samples) / len(samples)}


def piecewise(rows: list[dict], sources: dict[str, str], safety: Part) -> list[dict]:
    """The rows of the scorers `helpfulness` and `safety`, each completion's followed by one of `reward` (Llama 2,
    2307.09288, section 3.2.3): the value of safety if its prompt is of safety.sources or if sigmoid(safety) is below
    safety.threshold, else that of helpfulness. sources: of the prompts."""
    found = []
    for both in zip(rows[::2], rows[1::2], strict=True):  # a completion's rows follow each other
        values = {row["scorer"]: row for row in both}
        error = next((row["error"] for row in both if row["error"]), None)
        about = sources[both[0]["prompt_id"]] in safety.sources
        unsafe = not error and 1 / (1 + math.exp(-max(values["safety"]["value"], -700.0))) < safety.threshold
        counts = values["safety" if about or unsafe else "helpfulness"]
        why = "the prompt is about safety" if about else f"sigmoid of safety {'below' if unsafe else 'at least'} " \
                                                         f"{safety.threshold:g}"
        found += [*both, counts | {"scorer": "reward", "value": None if error else counts["value"], "error": error,
                                   "detail": f"{counts['scorer']}: {why}"}]
    return found


def by_source(table: pa.Table, sources: dict[tuple, str], scorers: dict[str, list[Scorer]]) -> dict:
    """Source -> scorer -> n, mean and std of its values; of a topic judge n and topics, {label: completions}."""
    found = {source: {scorer.name: [] for scorer in mine} for source, mine in scorers.items()}
    topics = {(source, s.name) for source, mine in scorers.items() for s in mine if s.judge and s.judge.mode == "topic"}
    for row in table.select(["prompt_id", "sample_index", "scorer", "value", "detail"]).to_pylist():
        source = sources[row["prompt_id"], row["sample_index"]]
        one = row["detail"] if (source, row["scorer"]) in topics else row["value"]
        if one is not None:
            found[source].setdefault(row["scorer"], []).append(one)
    return {source: {name: {"n": len(mine)} | (
        {"topics": dict(Counter(mine).most_common())} if (source, name) in topics else
        {"mean": fmean(mine), "std": pstdev(mine)}) for name, mine in by.items() if mine}
        for source, by in found.items() if any(by.values())}


def means(table: pa.Table) -> dict[str, float]:
    """{"mean/SCORER": its mean value}"""
    found: dict[str, list[float]] = {}
    for name, value in zip(table["scorer"].to_pylist(), table["value"].to_pylist(), strict=True):
        if value is not None:
            found.setdefault(name, []).append(value)
    return {f"mean/{name}": sum(values) / len(values) for name, values in found.items()}
