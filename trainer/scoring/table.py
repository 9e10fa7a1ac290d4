"""Scores in long form: a row per completion and scorer. Sharded over the ranks and resumed by shard."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import pyarrow as pa

from strop.trainer.config import Part, Score, Scorer
from strop.trainer.data.samples import read_values
from strop.trainer.errors import UserError
from strop.trainer.models.loading import DTYPES
from strop.trainer.reports.judging import summarize_judges
from strop.trainer.run.artifacts import content_hash, list_files
from strop.trainer.run.files import hash_file, hash_json, write_json
from strop.trainer.run.store import Stage
from strop.trainer.run.tables import read_table, write_table
from strop.trainer.sampling.shards import Shard, run_shards
from strop.trainer.scoring.base import Compute, Item, Scored, open_scorer
from strop.trainer.scoring.known import VALUES as KNOWN
from strop.trainer.scoring.known import Lines, key_of
from strop.trainer.scoring.verdicts import read_verdicts

VALUES = [("scorer", pa.string()), ("version", pa.string()), ("value", pa.float64()), ("detail", pa.string()),
          ("error", pa.string())]
VERDICTS = pa.schema([("judge", pa.string()), ("prompt", pa.string()), ("first", pa.string()), ("second", pa.string()),
                      ("verdict", pa.string()), ("share", pa.float64()), ("text", pa.string())])
SHARD = 256  # completions, about: a prompt's are never divided


def score_rows(stage: Stage, rows: list[dict], key: dict[str, pa.DataType], to_item, scorers: dict[str, list[Scorer]],
               files: dict[str, Path], score: Score, compute: Part | None = None,
               beside: Sequence[Path] = ()) -> pa.Table:
    """The values of all `rows` by the scorers of their `source`: the columns `key` and VALUES. Every rank calls it, and
    the first one gets the table; the others get what they know of it.

    rows: sorted by key, the first column of which groups completions that are scored together. to_item(row) -> Item.
    compute: dtype and device, where a scorer is a model. beside: folders with values that Ahead computed. Raises
    UserError at more than score.max_errors failed values.
    """
    schema = pa.schema([*key.items(), *VALUES])
    dtype = compute.dtype if compute else None
    versions = {(source, scorer.name): version_of(scorer, files, dtype)
                for source, mine in scorers.items() for scorer in mine}
    shards = []
    for part in parts_of(rows):
        ids = [(*(row[k] for k in key), scorer.name) for row in part for scorer in scorers[row["source"]]]
        shards.append(Shard(stage.work / f"{len(shards):05}.parquet", part, ids))
    failed: list[str] = []

    def to_table(verdicts: Verdicts, part: list[dict], on_progress, drops) -> pa.Table:
        found: dict[int, list[dict]] = {i: [] for i in range(len(part))}
        for source, name, values, errors in verdicts.of(part, to_item):
            for i, value in values.items():
                found[i].append({k: part[i][k] for k in key} | {
                    "scorer": name, "version": versions[source, name], "value": value.value, "detail": value.detail,
                    "error": value.error})
            failed.extend(errors)
            refuse(stage, failed, score.max_errors)
            on_progress(len(values), 0)
        return pa.Table.from_pylist([row for i in range(len(part)) for row in found[i]], schema=schema)

    run_shards(stage, stage.name, shards, (*key, "scorer"), schema,
               lambda: Verdicts(stage, scorers, files, score, compute, beside), to_table)
    done = [shard for i, shard in enumerate(shards) if stage.world.first or i % stage.world.size == stage.world.rank]
    table = pa.concat_tables([schema.empty_table(), *(read_table(shard.path) for shard in done)])
    errors = [f"{name}: {error}" for name, error in zip(table["scorer"].to_pylist(), table["error"].to_pylist(),
                                                        strict=True) if error]
    refuse(stage, errors, score.max_errors)
    if errors and stage.world.first:
        stage.counts["scorer_errors"] = len(errors)
        stage.console.warn(f"{stage.name}: {len(errors)} values are missing because scorers failed; the first: "
                           f"{errors[0]}")
    return table


def parts_of(rows: list[dict]) -> Iterator[list[dict]]:
    """The rows, sorted by prompt, in parts of SHARD or a little more that divide no prompt's."""
    part: list[dict] = []
    for _, group in groupby(rows, key=lambda row: row["prompt_id"]):
        part += group
        if len(part) >= SHARD:
            yield part
            part = []
    if part:
        yield part


class Verdicts:
    """The open scorers of all sources; called with a completion of one, {scorer: (value, error)}.

    beside: folders with values by content, which are not computed again. into: a folder that gets the values of
    scorers with `by_item`, and the verdicts of judges, in files that `who` names."""

    def __init__(self, stage: Stage, scorers: dict[str, list[Scorer]], files: dict[str, Path], score: Score | Part,
                 compute: Part | None = None, beside: Sequence[Path] = (), into: Path | None = None, who: str = ""):
        self.live, self.scorers, self.versions, opened = {}, scorers, {}, {}
        self.into = into and Lines(into, KNOWN, f"{stage.world.rank}{who}")
        self.known = [*([self.into] if into else []), *(Lines(folder, KNOWN, "") for folder in beside)]
        where = compute and Compute(stage.world.device, DTYPES[compute.dtype], files, into or stage.work,
                                    f"{stage.world.rank}{who}", stage.world.size, tuple(beside), stage, {})
        for source, mine in scorers.items():
            for scorer in mine:
                version = self.versions[source, scorer.name] = version_of(scorer, files)
                if version not in opened:  # sources share equal scorers
                    opened[version] = open_scorer(scorer, file_of(scorer, files), workers_of(score), where)
                self.live[source, scorer.name] = opened[version]

    def __call__(self, source: str, item: Item) -> dict[str, tuple[float | None, str | None]]:
        found = {scorer.name: self.values(source, scorer.name, [item])[0] for scorer in self.scorers[source]}
        return {name: (scored.value, scored.error) for name, scored in found.items()}

    def values(self, source: str, name: str, items: list[Item]) -> list[Scored]:
        """A scorer's values; those that are known are not computed, and failures are not kept."""
        scorer = self.live[source, name]
        if not self.known:
            return scorer.score(items, lambda n: None)
        keys = [key_of(self.versions[source, name], item) for item in items]
        there = [next((lines.found[key] for lines in self.known if key in lines.found), None) for key in keys]
        missing = [i for i, record in enumerate(there) if record is None]
        found = [record and Scored(record["value"], record["detail"]) for record in there]
        for i, value in zip(missing, scorer.score([items[i] for i in missing], lambda n: None) if missing else (),
                            strict=True):
            found[i] = value
        if missing and self.into and scorer.by_item:
            self.into.add([{"key": keys[i], "value": found[i].value, "detail": found[i].detail} for i in missing
                           if not found[i].error])
        return found

    def of(self, part: list[dict], to_item) -> Iterator[tuple[str, str, dict[int, Scored], list[str]]]:
        """(source, scorer, the values by place in `part`, its errors) of every source in it and each of its scorers.
        part: rows sorted by prompt; equal completions of a prompt are scored once. to_item(row) -> Item."""
        for source in dict.fromkeys(row["source"] for row in part):
            mine = [i for i, row in enumerate(part) if row["source"] == source]
            items = [to_item(part[i]) for i in mine]
            first = {}
            for n, i in enumerate(mine):
                first.setdefault((part[i]["prompt_id"], items[n].completion), n)
            same = [first[part[i]["prompt_id"], items[n].completion] for n, i in enumerate(mine)]
            distinct = sorted(set(same))
            for scorer in self.scorers[source]:
                values = self.values(source, scorer.name, [items[n] for n in distinct])
                by_item = dict(zip(distinct, values, strict=True))
                yield (source, scorer.name, {i: by_item[n] for i, n in zip(mine, same, strict=True)},
                       [f"{scorer.name}: {value.error}" for value in values if value.error])

    def close(self) -> None:
        for scorer in set(self.live.values()):
            scorer.close()


def version_of(scorer: Scorer, files: dict[str, Path], dtype: str | None = None) -> str:
    """Hash of all that a scorer's values depend on: its keys, without name and weight, the content of the files and
    folders that it names, and the dtype of a model."""
    key = {k: v for k, v in scorer.key().items() if k not in ("name", "python")}
    if scorer.python is not None:
        key |= {"function": scorer.python.rpartition(":")[2], "file": hash_file(file_of(scorer, files))}
    if names := models_of(scorer):
        key |= {"models": [content_hash(list_files(files[name])) for name in names], "dtype": dtype}
    return hash_json(key)[:12]


def refuse(stage: Stage, errors: list[str], allowed: int) -> None:
    """Raises UserError at more than score.max_errors failed values."""
    if len(errors) > allowed:
        more = f"; {len(errors) - 1} before it" if len(errors) > 1 else ""
        raise UserError(f"{stage.name}: scorer {errors[-1]}{more} (score.max_errors={allowed}; fix it, or raise "
                        "score.max_errors to go on without such values)")


def file_of(scorer: Scorer, files: dict[str, Path]) -> Path | None:
    """The file or folder that a scorer of one names."""
    return files.get(scorer.python.rpartition(":")[0] if scorer.python else scorer.reward_model)


def models_of(scorer: Scorer) -> list[str]:
    """The folders of models that a scorer names; empty for the run's start weights."""
    if scorer.judge is not None:
        return [model.path or "" for model in scorer.judge.models if model.engine != "openai"]
    return [scorer.reward_model] if scorer.reward_model else []


def keep_verdicts(stage: Stage, table: pa.Table, scorers: dict[str, list[Scorer]], prompt: int) -> None:
    """Writes verdicts.parquet and judge.json if a scorer is a judge. table: as score_rows returns it; prompt: the place
    of prompt_id among its key columns."""
    judges = {scorer.name for mine in scorers.values() for scorer in mine if scorer.judge is not None}
    if not judges:
        return
    rows = {row["key"]: row | {"share": max((row["shares"] or {"": None}).values())}
            for row in read_verdicts(stage.work)}
    rows = [rows[key] for key in sorted(rows)]
    write_table(stage.dir / "verdicts.parquet", pa.Table.from_pylist(rows, schema=VERDICTS))
    names = [name for name in table.column_names if name not in dict(VALUES)]
    names = [names[prompt], *(name for name in names if name != names[prompt])]
    values = {key: {scorer: value for scorer, (value, _) in found.items()}
              for key, found in read_values(table, tuple(names)).items()}
    summary = summarize_judges(rows, values, judges)
    write_json(stage.dir / "judge.json", summary)
    unparsed = sum(about["unparsed"] for about in summary["judges"].values())
    stage.counts |= {"verdicts": len(rows), "unparsed_verdicts": unparsed}
    if unparsed:
        stage.console.warn(f"{stage.name}: {unparsed} of {len(rows)} verdicts cannot be read and do not count; see "
                           f"text in {stage.dir / 'verdicts.parquet'}")


def workers_of(score: Score) -> int:
    """Processes that scorers of this rank use."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return score.workers or max(1, len(os.sched_getaffinity(0)) // local)
