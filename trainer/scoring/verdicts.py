"""Questions to judges and their verdicts, each kept by content so that none is asked twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from strop.trainer.run.files import hash_json
from strop.trainer.scoring.known import VERDICTS, Lines


class Question(NamedTuple):
    """messages for the judge; labels: the verdicts that it may give; prompt, first, second: hashes of what it judges,
    second None for a grade, first the judge's mode if it judges the prompt."""

    messages: list[dict]
    labels: tuple[str, ...]
    prompt: str
    first: str
    second: str | None


class Verdict(NamedTuple):
    """label: A, B, tie or a number; None if there is none to read. shares: of each label, where the judge gives log-
    probs. text: what it said."""

    label: str | None
    shares: dict[str, float] | None = None
    text: str = ""


class JudgeModel(Protocol):
    """Answers questions, in any order: yields (index, verdict). identity: what its verdicts depend on. in_text: whether
    it writes its verdict as text."""

    name: str
    identity: str
    in_text: bool

    def answer(self, questions: list[Question]) -> Iterator[tuple[int, Verdict]]: ...

    def close(self) -> None: ...


class Kept:
    """Verdicts by the hash of question and judge, in a file per rank of the stage's work folder. beside: folders with
    verdicts of other stages; those that are asked for here are copied."""

    def __init__(self, work: Path | None, rank: int | str, beside: Sequence[Path] = ()):
        self.own = Lines(work, VERDICTS, str(rank))
        self.beside = [Lines(folder, VERDICTS, "") for folder in beside]

    def answer(self, judge: JudgeModel, questions: list[Question]) -> list[Verdict]:
        """The judge's verdicts: those that are kept, and answers to the other questions, which are kept then."""
        keys = [hash_json([judge.name, judge.identity, q.messages, q.labels]) for q in questions]
        if any(key not in self.own.found for key in keys):
            self.own.catch_up()
        fresh = {key: q for key, q in zip(keys, questions, strict=True) if key not in self.own.found}
        there = {key: lines.found[key] for lines in self.beside for key in fresh if key in lines.found}
        self.own.add(list(there.values()))
        asked = [(key, q) for key, q in fresh.items() if key not in there]
        for i, v in judge.answer([q for _, q in asked]) if asked else ():
            key, q = asked[i]
            self.own.add([{"key": key, "judge": judge.name, "prompt": q.prompt, "first": q.first, "second": q.second,
                           "verdict": v.label, "shares": v.shares, "text": v.text[-2000:]}])
        kept = [self.own.found[key] for key in keys]
        return [Verdict(record["verdict"], record["shares"], record["text"]) for record in kept]


def read_verdicts(work: Path) -> list[dict]:
    """The records of all ranks, without lines that were cut."""
    return list(Lines(work, VERDICTS, "").found.values())
