"""The protocol of a scorer, and scorers made from a recipe.

A kind of scorer is a file: rules.py, user.py (Python of the user), code.py, reward_model.py, judge.py. To add one: its
key in `Scorer` and UNREAD of config.py, its class here in `open_scorer`, and what `check_scorer` can say before
anything is sampled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:  # the child processes of scorers load no more than they need
    from strop.trainer.config import Scorer as Config


class Item(NamedTuple):
    """A completion to score. row: the prompt's columns in the user's data, and `answer`; where: for error messages."""

    messages: list[dict]
    completion: str
    answer: str | None
    row: dict[str, Any]
    conversational: bool = False  # whether the prompt is a list of messages in the user's data, as TRL says it
    tokens: list[int] | None = None
    where: str = ""


class Columns(NamedTuple):
    """Of a source: its columns of prompts and answers, and the template that its prompts are in."""

    prompt: str
    answer: str
    template: str


def item_of(prompt: dict, columns: Columns, completion: str, tokens: list[int] | None, where: str) -> Item:
    """A completion of a row of prompts.parquet."""
    row = {"answer": prompt["answer"], columns.answer: prompt["answer"]} | json.loads(prompt["metadata"])
    if not prompt["conversational"]:
        before, _, after = columns.template.partition("{prompt}")
        asked = prompt["messages"][-1]["content"]
        if asked.startswith(before) and asked.endswith(after):  # else the template names other columns, too
            row.setdefault(columns.prompt, asked[len(before):len(asked) - len(after)])
    return Item(prompt["messages"], completion, prompt["answer"], row, prompt["conversational"], tokens, where)


class Scored(NamedTuple):
    """A scorer's verdict. value: None if the scorer does not apply to the row or failed; detail: what it read or
    says about the completion; error: why it failed, in one line."""

    value: float | None
    detail: str | None = None
    error: str | None = None


class Compute(NamedTuple):
    """Where and in which torch dtype a scorer that is a model computes, the folders of models by the recipe's name for
    them, and the stage's folder for what must not be computed twice. rank: names this rank's file there; beside:
    folders with what other stages computed; stage: for what starts engines, which are in `engines`."""

    device: Any
    dtype: Any
    files: dict[str, Path]
    work: Path | None = None
    rank: int | str = 0
    ranks: int = 1
    beside: tuple[Path, ...] = ()
    stage: Any = None
    engines: dict[str, Any] | None = None


class Scorer(Protocol):
    """Maps completions to values. `score` is called with completions of whole prompts, several at a time, and calls
    advance(n) as it goes; it raises UserError only for mistakes in the recipe, never for a completion. by_item: whether
    a value depends on its item alone, to the bit, not on the others of the call."""

    by_item: bool

    def score(self, items: list[Item], advance: Callable[[int], None]) -> list[Scored]: ...

    def close(self) -> None: ...


def open_scorer(config: Config, file: Path | None, workers: int, compute: Compute | None = None) -> Scorer:
    """The scorer that an entry of `scorers` names. file: the file or folder, if it names one; compute: for scorers that
    are models."""
    from strop.trainer.scoring.code import open_code
    from strop.trainer.scoring.rules import RuleScorer
    from strop.trainer.scoring.user import UserScorer

    if config.rule is not None:
        return RuleScorer(config.rule, config.args)
    if config.reward_model is not None:
        from strop.trainer.scoring.reward_model import RewardModelScorer

        return RewardModelScorer(file, compute.device, compute.dtype)
    if config.judge is not None:
        from strop.trainer.scoring.judge import open_judge

        return open_judge(config.judge, compute)
    if config.code is not None:
        return open_code(config, workers)
    return UserScorer(file, config.python.rpartition(":")[2], config.seconds, config.memory_gb or 4.0, workers)


def check_scorer(config: Config, file: Path | None) -> None:
    """Raises UserError if a scorer of Python or code cannot work here: before anything runs."""
    if config.rule is None:
        scorer = open_scorer(config, file, 1)
        try:
            scorer.check()
        finally:
            scorer.close()


def finite(value: Any) -> float:
    """`value` as a float. Raises ValueError or TypeError if it is not a finite number."""
    if isinstance(value, str | bytes) or value is None:
        raise TypeError(f"returned {value!r}, not a number"[:200])
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"returned {number}, which is not a finite number")
    return number
