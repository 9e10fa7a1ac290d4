"""Prompts: read or generated, filtered, and split by content into train, validation and test."""

import time
from collections import Counter
from functools import partial
from pathlib import Path

import pyarrow as pa

from strop.trainer.config import Filter, Part
from strop.trainer.data.contamination import held_out
from strop.trainer.data.dedup import near_duplicates
from strop.trainer.data.quality import repetition
from strop.trainer.data.rows import Quarantine
from strop.trainer.data.sources import source_rows
from strop.trainer.data.splits import assign_splits
from strop.trainer.data.text import words
from strop.trainer.errors import UserError
from strop.trainer.run.store import Stage
from strop.trainer.run.tables import Drops, write_table
from strop.trainer.scoring import choice
from strop.trainer.scoring.rules import check, why_not

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
SCHEMA = pa.schema([("prompt_id", pa.string()), ("source", pa.string()), ("split", pa.string()),
                    ("messages", MESSAGES), ("conversational", pa.bool_()), ("answer", pa.string()),
                    ("metadata", pa.string()), ("template_kwargs", pa.string())])
REPORT_SECONDS = 10.0  # between two console lines while a source is read
WARN_SHARE = 0.2  # of a source's prompts that filters may drop without a warning


def prompts(stage: Stage, *, data: Part, filter: Part, seed: int, rules: dict[str, list],
            files: dict[str, Path]) -> None:
    """Writes prompts.parquet, drops.parquet and quarantine.jsonl. rules: source -> (rule, args) of its scorers, which
    every answer must satisfy; files: the rows of each source that has a path.

    Raises UserError on sources that cannot be read, more bad rows than data.max_bad_rows in a file, or fewer distinct
    prompts than data.test and data.validation need.
    """
    drops, quarantine = Drops(stage), Quarantine(data.max_bad_rows)
    rows, seen = [], {}
    for source in data.sources:
        key = f"data.sources, {source.name}"
        try:
            for rule, args in rules[source.name]:
                check(rule, args)
            if source.reasoning_gym:
                key += f": reasoning_gym={source.reasoning_gym}"
                check("reasoning_gym", {"dataset": source.reasoning_gym})
        except UserError as e:
            raise UserError(f"{key}: {e}") from e
        shown = time.monotonic()
        source = source.model_copy(update={"path": files.get(source.name)})
        arguments = next((args for rule, args in rules[source.name] if rule == "choice"), {})
        options_of, columns = partial(labeled_options, arguments), {}
        check_row = partial(why_not, rules[source.name])
        for row in source_rows(source, seed, check_row, options_of, drops, quarantine):
            columns |= dict.fromkeys(row.pop("columns"))
            if time.monotonic() - shown > REPORT_SECONDS:
                shown = time.monotonic()
                stage.console.line(f"{stage.name}: {source.name}: {len(rows):,} prompts, at {row['where']}")
            first = seen.setdefault(row["prompt_id"], row)
            if first is not row:
                detail = row.pop("where") + ("" if first["answer"] == row["answer"] else ", with another answer")
                drops.add("duplicate", prompt_id=row["prompt_id"], source=source.name, detail=detail)
            else:
                rows.append(row)
        if columns:
            stage.console.line(f"{stage.name}: {source.name}: kept as metadata: {', '.join(columns)}")
    rows = drop_near_duplicates(drop_repetitive(rows, filter, drops), data, filter, drops)
    try:
        assign_splits(rows, data, seed)
    except UserError as e:
        gone = ", ".join(f"{reason} {n}" for reason, n in Counter(row["reason"] for row in drops.rows).items())
        bad = "".join(f"; the first malformed row is {row['where']}: {row['error']}" for row in quarantine.rows[:1])
        raise UserError((f"{e} (dropped: {gone})" if gone else str(e)) + bad) from e
    rows = drop_contaminated(rows, data, filter, drops)
    warn_of_templates(stage, data, rows, drops)
    write_table(stage.dir / "prompts.parquet", pa.Table.from_pylist(rows, schema=SCHEMA))
    drops.write()
    quarantine.write(stage)
    splits = Counter(row["split"] for row in rows)
    stage.counts |= {"prompts": len(rows), **{s: splits[s] for s in ("train", "validation", "test")}}


def labeled_options(args: dict, metadata: dict) -> dict[str, str]:
    """{label: text} of a prompt's options, of the recipe or of its row; {} if it has none."""
    return choice.labeled(args.get("choices") or metadata.get("choices"))


def drop_repetitive(rows: list[dict], filter: Filter | Part, drops: Drops) -> list[dict]:
    """Drops rows with more than filter.max_repetition repeated 4-grams."""
    kept = []
    for row in rows:
        share = repetition(words(row["text"]))
        if share <= filter.max_repetition:
            kept.append(row)
        else:
            drops.add("repetitive", prompt_id=row["prompt_id"], source=row["source"],
                      detail=f"{row['where']}: {share:.2f} of its 4-grams are repeats")
    return kept


def drop_near_duplicates(rows: list[dict], data: Part, filter: Filter | Part, drops: Drops) -> list[dict]:
    """Drops near duplicates of an earlier row of the same source, except in templated sources."""
    threshold, gone = filter.near_duplicates, set()
    by_source: dict[str, list[dict]] = {source.name: [] for source in data.sources if not source.templated}
    for row in rows if threshold else ():
        if row["source"] in by_source:
            by_source[row["source"]].append(row)
    for name, mine in by_source.items():
        for i, j, similarity in near_duplicates([(row["text"],) for row in mine], threshold):
            gone.add(mine[i]["prompt_id"])
            drops.add("near_duplicate", prompt_id=mine[i]["prompt_id"], source=name,
                      detail=f"{mine[i]['where']}: {similarity:.2f} like {mine[j]['where']}")
    return [row for row in rows if row["prompt_id"] not in gone]


def drop_contaminated(rows: list[dict], data: Part, filter: Filter | Part, drops: Drops) -> list[dict]:
    """Drops training prompts that repeat a held-out one. Raises UserError if no training prompt is left."""
    if not filter.decontaminate:
        return rows
    held = held_out(rows, filter.decontaminate, {s.name for s in data.sources if s.templated})
    splits, kept = {row["prompt_id"]: row["split"] for row in rows}, []
    for row in rows:
        found = held.match(row["text"], row["source"]) if row["split"] == "train" else None
        if found is None:
            kept.append(row)
        else:
            drops.add("contaminated", prompt_id=row["prompt_id"], source=row["source"],
                      detail=f"{row['where']}: shares {found[1]!r} with {splits[found[0]]} prompt {found[0]}")
    if not any(row["split"] == "train" for row in kept):
        raise UserError(f"filter.decontaminate={filter.decontaminate}: every training prompt repeats a held-"
                         "out one; give more varied prompts, raise it, or set it to 0 to train on them anyway")
    return kept


def warn_of_templates(stage: Stage, data: Part, rows: list[dict], drops: Drops) -> None:
    """Warns if the filters drop much of a source: most likely its prompts come from templates."""
    left = Counter(row["source"] for row in rows)
    for i, source in enumerate(data.sources):
        gone = Counter(row["reason"] for row in drops.rows if row["source"] == source.name)
        n = gone["near_duplicate"] + gone["contaminated"]
        if not source.templated and n > WARN_SHARE * (n + left[source.name]):
            stage.console.warn(f"{stage.name}: {n:,} of {n + left[source.name]:,} prompts of source {source.name} are "
                               f"near duplicates or repeat held-out ones (drops.parquet has each); if they come from "
                               f"templates, set data.sources.{i}.templated=true to keep them")
