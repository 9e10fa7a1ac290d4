"""Questions to judges and their verdicts, each kept by content so that none is asked twice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from strop.trainer.run.files import hash_json, writing


class Question(NamedTuple):
    """messages for the judge; labels: the verdicts that it may give; prompt, first, second: hashes of what it judges,
    second None for a grade."""

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
    """Verdicts by the hash of question and judge, in an append-only file per rank of the stage's work folder."""

    def __init__(self, work: Path | None, rank: int):
        self.file, self.found = work and work / f"verdicts-{rank}.jsonl", {}
        for record in read_verdicts(work) if work else ():
            self.found[record["key"]] = record

    def answer(self, judge: JudgeModel, questions: list[Question]) -> list[Verdict]:
        """The judge's verdicts: those that are kept, and answers to the other questions, which are kept then."""
        keys = [hash_json([judge.name, judge.identity, q.messages, q.labels]) for q in questions]
        fresh = {key: q for key, q in zip(keys, questions, strict=True) if key not in self.found}
        asked = list(fresh.items())
        for i, v in judge.answer([q for _, q in asked]) if asked else ():
            key, q = asked[i]
            self.found[key] = {"key": key, "judge": judge.name, "prompt": q.prompt, "first": q.first,
                               "second": q.second, "verdict": v.label, "shares": v.shares, "text": v.text[-2000:]}
            self._append(self.found[key])
        kept = [self.found[key] for key in keys]
        return [Verdict(record["verdict"], record["shares"], record["text"]) for record in kept]

    def _append(self, record: dict) -> None:
        if self.file is None:
            return
        with writing(self.file), open(self.file, "ab+") as f:
            size = f.seek(0, 2)
            if size:
                f.seek(size - 1)
                if f.read(1) != b"\n":  # the last line was cut when the run was killed
                    f.write(b"\n")
            f.write(json.dumps(record).encode() + b"\n")


def read_verdicts(work: Path) -> list[dict]:
    """The records of all ranks, without lines that were cut."""
    found = []
    for file in sorted(work.glob("verdicts-*.jsonl")):
        for line in file.read_bytes().splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
    return found
