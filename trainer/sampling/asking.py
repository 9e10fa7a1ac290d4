"""Many questions to a chat model at a time: every answer is on disk as it arrives, and within a budget of tokens."""

from __future__ import annotations

import json
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from strop.trainer.engines import OpenAI
from strop.trainer.errors import UserError
from strop.trainer.run import mirror, stopping
from strop.trainer.run.files import sync, writing
from strop.trainer.run.store import Stage
from strop.trainer.sampling.base import ChatModel, Reply, Settings, Stopped

Id = tuple  # of strings and numbers
PREFIX = "answers"


class Journal:
    """All answers of a stage, those of other ranks and of earlier processes too: a file of lines for each rank in the
    stage's scratch folder, which only grows."""

    def __init__(self, stage: Stage):
        self.folder = stage.work
        self.path = self.folder / f"{PREFIX}-{stage.world.rank:03}.jsonl"
        self.read: dict[Path, int] = {}  # bytes read of each file
        self.replies: dict[Id, Reply] = {}
        self.used = [0, 0]  # tokens of prompts and completions
        self.lock = threading.Lock()
        with writing(self.path):
            self.file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            size = os.fstat(self.file).st_size
            if size and os.pread(self.file, 1, size - 1) != b"\n":  # a kill left half a line
                os.write(self.file, b"\n")
            sync(self.folder)
        self.catch_up()

    def catch_up(self) -> None:
        """Reads what was written since the last call, also by other ranks."""
        with self.lock:
            for path in sorted(self.folder.glob(f"{PREFIX}-*.jsonl")):
                with open(path, "rb") as f:
                    f.seek(self.read.get(path, 0))
                    for line in f:
                        if not line.endswith(b"\n"):
                            break
                        self.read[path] = self.read.get(path, 0) + len(line)
                        self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            row = json.loads(line)
            identity, reply = tuple(row.pop("id")), Reply(**row)
        except (ValueError, TypeError, KeyError, AttributeError):
            return  # half a line, from a process that was killed
        self.replies[identity] = reply
        self.used[0] += reply.prompt_tokens or 0
        self.used[1] += reply.completion_tokens or 0

    def add(self, identity: Id, reply: Reply) -> None:
        """Returns once the answer is on disk."""
        line = (json.dumps({"id": list(identity)} | asdict(reply)) + "\n").encode()
        with writing(self.path), self.lock:
            if self.file is None:  # the run was interrupted, and this thread is late
                raise Stopped
            while line:
                line = line[os.write(self.file, line):]
            os.fsync(self.file)
        self.catch_up()

    def close(self) -> None:
        with self.lock:
            os.close(self.file)
            self.file = None


def usage(stage: Stage) -> dict[str, int]:
    """Answers and their tokens in all journals of a stage."""
    found = {"requests": 0, "prompt_tokens": 0, "completion_tokens": 0}
    for path in sorted(stage.work.glob(f"{PREFIX}-*.jsonl")):
        for line in path.read_bytes().splitlines():
            try:
                row = json.loads(line)
                counts = row["prompt_tokens"] or 0, row["completion_tokens"] or 0
            except (ValueError, TypeError, KeyError):
                continue
            found["requests"] += 1
            found["prompt_tokens"] += counts[0]
            found["completion_tokens"] += counts[1]
    return found


def cost_of(used: dict[str, int], section: OpenAI) -> dict[str, float]:
    """Usage of a server for the manifest, with its cost if the recipe has prices."""
    cost = (used["prompt_tokens"] * section.prompt_price + used["completion_tokens"] * section.completion_price) / 1e6
    return used | ({"cost": cost} if section.prompt_price or section.completion_price else {})


@dataclass(frozen=True)
class Question:
    """tokens: of the prompt; length(text) -> tokens of an answer: both for models that do not count them."""

    id: Id
    messages: Sequence[dict]
    tokens: int
    length: Callable[[str], int]


class Pool:
    """Threads that ask one chat model. `budget` and `key` are those of the section of the recipe."""

    def __init__(self, model: ChatModel, settings: Settings, journal: Journal, *, concurrency: int, budget: int | None,
                 key: str):
        if budget is not None and mirror.is_on():
            raise UserError(f"{key}.budget={budget:,}: the nodes share no storage, so ranks cannot see what others "
                            "use; leave it out, or put output_dir on storage that all nodes share")
        self.model, self.settings, self.journal, self.concurrency = model, settings, journal, concurrency
        self.budget, self.key, self.halt = budget, key, model.halt
        self.reserved, self.change = 0, threading.Condition()

    def ask(self, questions: Sequence[Question], on_reply: Callable[[Reply], None]) -> dict[Id, Reply]:
        """The answers to all questions; those in the journal are not asked again.

        Raises the first failure, after the requests under way have ended: their answers are paid for and kept."""
        waiting = deque(q for q in questions if q.id not in self.journal.replies)
        arrived: deque[Reply] = deque()
        failures: list[BaseException] = []

        def work() -> None:
            while not self.halt.is_set():
                try:
                    question = waiting.popleft()
                except IndexError:
                    return
                try:
                    arrived.append(self._answer(question))
                except BaseException as e:
                    failures.append(e)
                    self.halt.set()
                with self.change:
                    self.change.notify_all()

        threads = [threading.Thread(target=work, daemon=True) for _ in range(min(self.concurrency, len(waiting)))]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads) or arrived:
            while arrived:
                on_reply(arrived.popleft())
            if stopping.requested():
                self.halt.set()
            with self.change:
                self.change.wait(0.05)
        stopping.point()
        if failures:
            raise next((e for e in failures if isinstance(e, UserError)), failures[0])
        return {q.id: self.journal.replies[q.id] for q in questions}

    def _answer(self, question: Question) -> Reply:
        most = question.tokens + self.settings.max_new_tokens
        if self.budget is not None:
            self.journal.catch_up()
        with self.change:
            while self.budget is not None and sum(self.journal.used) + self.reserved + most > self.budget:
                if not self.reserved:
                    raise self._over_budget()
                if self.halt.is_set():
                    raise Stopped
                self.change.wait(0.05)
            self.reserved += most
        try:
            reply = self.model.ask(question.messages, self.settings)
            if reply.prompt_tokens is None or reply.completion_tokens is None:
                counts = {"prompt_tokens": question.tokens, "completion_tokens": question.length(reply.text)}
                reply = Reply(**asdict(reply) | counts)
            self.journal.add(question.id, reply)
            return reply
        finally:
            with self.change:
                self.reserved -= most

    def _over_budget(self) -> UserError:
        return UserError(f"{self.key}.budget={self.budget:,}: {sum(self.journal.used):,} tokens are used, and the next "
                         f"request may need more than is left; {len(self.journal.replies):,} answers are kept, and a "
                         "higher budget resumes the stage")
