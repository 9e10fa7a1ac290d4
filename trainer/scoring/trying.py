"""`strop try`: a scorer on the first rows of a file, before any run."""

from __future__ import annotations

import json
import re
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from pydantic import ValidationError

from strop.trainer.config import Scorer
from strop.trainer.data.columns import to_messages
from strop.trainer.data.rows import read_rows
from strop.trainer.data.sources import dumps
from strop.trainer.errors import UserError
from strop.trainer.scoring.base import Compute, Item, Scored, open_scorer

DEFAULTS = {"rows": 10, "prompt_column": "prompt", "completion_column": "completion", "answer_column": "answer"}
SHOWN = 60  # characters of a cell


def try_scorer(console, named: str, data: str, *overrides: str) -> None:
    """Prints the scores of the first rows of a file. named: file.py:function, a rule, or another kind of scorer as
    kind=value; overrides: key=value, of DEFAULTS or of a scorer. Raises UserError if one of the scores is an error."""
    options, keys = dict(DEFAULTS), {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"{override}: give key=value; keys are {', '.join(DEFAULTS)} and those of a scorer")
        (options if key in DEFAULTS else keys)[key] = yaml.safe_load(text)
    kind, equals, value = named.partition("=")
    if equals:
        keys[kind] = yaml.safe_load(value)
    else:
        keys["python" if re.search(r"\.py:\w+$", named) else "rule"] = named
    try:
        config = Scorer.model_validate(keys)
    except ValidationError as e:
        raise UserError(*(f"{'.'.join(map(str, error['loc'])) or named}: "
                          f"{error['msg'].removeprefix('Value error, ')}" for error in e.errors())) from e
    if config.rule:
        from strop.trainer.scoring.rules import check

        check(config.rule, config.args)
    file = compute = None
    if config.python:
        file = Path(config.python.rpartition(":")[0])
    elif config.reward_model:
        import torch

        file = Path(config.reward_model).expanduser()
        compute = Compute(torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.float32, {})
    items = [item_of_row(row, options) for row in islice(read_rows(data), options["rows"])]
    with TemporaryDirectory() as scratch:
        if config.judge:
            compute = compute_of_judges(config, Path(scratch), console)
        scorer = open_scorer(config, file, 1, compute)
        try:
            found = scorer.score(items, lambda n: None)
        finally:
            scorer.close()
    console.table(f"{config.name} on {len(items)} rows of {data}", ["row", "completion", "score", "detail"],
                  [[item.where, short(item.completion), number(scored), short(scored.detail or scored.error or "")]
                   for item, scored in zip(items, found, strict=True)])
    if errors := [scored.error for scored in found if scored.error]:
        raise UserError(f"{len(errors)} of {len(found)} rows failed; the first: {errors[0]}")


def compute_of_judges(config: Scorer, scratch: Path, console) -> Compute:
    """Raises UserError if a judge is the start weights, which only a run has."""
    import torch

    from strop.trainer.run.store import Stage
    from strop.trainer.run.world import World
    from strop.trainer.scoring.table import models_of

    files = {name: Path(name).expanduser() for name in models_of(config)}
    if "" in files:
        raise UserError("judge.models: without path the judge is a run's start weights; name a path, or a server")
    for name, folder in files.items():
        if not folder.is_dir():
            raise UserError(f"judge.models: path={name}: no such folder")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stage = Stage("try", scratch, World(device=device), console, None)
    return Compute(device, torch.float32, files, scratch, stage=stage, engines={})


def item_of_row(row, options: dict[str, Any]) -> Item:
    """A row's completion, or without one its answer in that place. Raises UserError if a column is missing."""
    if row.data is None:
        raise UserError(f"{row.where}: {row.error}")
    columns = {key: options[f"{key}_column"] for key in ("prompt", "completion", "answer")}
    data, answer = row.data, row.data.get(columns["answer"])
    completion = data.get(columns["completion"], answer)
    if isinstance(completion, list):
        completion = to_messages(completion, columns["completion"])[-1]["content"]
    if columns["prompt"] not in data or completion is None:
        raise UserError(f"{row.where}: needs the columns {columns['prompt']} and {columns['completion']} (or "
                        f"{columns['answer']}), has {', '.join(map(str, data))}; name others with prompt_column=")
    prompt, conversational = data[columns["prompt"]], isinstance(data[columns["prompt"]], list)
    messages = to_messages(prompt, columns["prompt"]) if conversational else [{"role": "user", "content": prompt}]
    answer = None if answer is None else str(answer)
    # as a run has them, which keeps columns as JSON
    rest = json.loads(dumps({k: v for k, v in data.items() if k not in (columns["prompt"], columns["completion"])}))
    return Item(messages, str(completion), answer, {"answer": answer} | rest, conversational, None, row.where)


def number(scored: Scored) -> str:
    return "error" if scored.error else "does not apply" if scored.value is None else f"{scored.value:g}"


def short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else text[:SHOWN - 3] + "..."
