"""Python functions of the user as scorers, in worker processes with a time and memory limit.

Two forms, told apart by the names of the parameters:
- `grade(prompt, completion, row)`, or fewer of these: called for each completion; row has the columns of the data.
- a parameter `completions`: called with lists, as TRL calls reward functions: prompts, completions, completion_ids,
  rows and the columns of the data, as keywords, those that the function takes.
Both may be async. They return a number, a boolean, None (does not apply), or a dict with `score` and anything else
to keep beside it; the second form a list of these. Prompts are strings, or lists of messages if the data has those;
then the second form's completions are lists of messages, too, as TRL has it.
"""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import json
import os
import resource
import signal
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from strop.trainer.errors import UserError
from strop.trainer.scoring.base import Item, Scored, finite
from strop.trainer.scoring.process import Process

BATCH = 64  # completions per call of the second form, and per message to a worker


class UserScorer:
    """A function of a user's file; see base.Scorer."""

    def __init__(self, file: Path, function: str, seconds: float, memory_gb: float, workers: int):
        self.file, self.function, self.seconds = file, function, seconds
        arguments = [str(file.resolve()), function, str(seconds), str(int(memory_gb * 2**30))]
        name = f"{file}:{function}"
        self._workers = [Process(name, "strop.trainer.scoring.user", arguments, dict(os.environ))
                         for _ in range(workers)]
        self._free: SimpleQueue[Process] = SimpleQueue()
        for worker in self._workers:
            self._free.put(worker)
        self._pool = ThreadPoolExecutor(workers)

    @property
    def by_item(self) -> bool:
        """Raises UserError as check does."""
        if "batched" not in (self._workers[0].first or {}):
            self.check()
        return not self._workers[0].first["batched"]

    def score(self, items: list[Item], advance) -> list[Scored]:
        parts = [items[i:i + BATCH] for i in range(0, len(items), BATCH)]
        found = []
        for part in self._pool.map(self._part, parts):
            found += part
            advance(len(part))
        return found

    def check(self) -> None:
        """Raises UserError if the function cannot be imported or takes no form of arguments."""
        self._call(self._workers[0], [])

    def _part(self, items: list[Item]) -> list[Scored]:
        worker, found = self._free.get(), []
        try:
            while len(found) < len(items):
                found += self._call(worker, items[len(found):])
            return found
        finally:
            self._free.put(worker)

    def _call(self, worker: Process, items: list[Item]) -> list[Scored]:
        """Scores of one or more of the first `items`."""
        rest = {"items": [i._asdict() for i in items]}
        answer = worker.ask(rest, (self.seconds + 5) * max(1, len(items)))
        if isinstance(worker.first, dict) and "error" in worker.first:
            worker.close()
            raise UserError(worker.first["error"].replace(str(self.file.resolve()), str(self.file)))
        if answer is None and items:  # the worker is gone; which item it was is found one by one
            if len(items) > 1 and not (isinstance(worker.first, dict) and worker.first["batched"]):
                return self._call(worker, items[:1])
            where = items[0].where + (f" to {items[-1].where}" if len(items) > 1 else "")
            why = f"{self.file}:{worker.first['line']}: {self.function} ended its process ({self._limits()}); {where}"
            return [Scored(None, error=why)] * len(items)
        found = [Scored(*one) for one in answer or ()]
        shown, named = str(self.file.resolve()), str(self.file)
        return [s._replace(error=s.error.replace(shown, named)) if s.error else s for s in found]

    def _limits(self) -> str:
        return f"out of memory, a crash, or more than {self.seconds:g} s in one call of C code"

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.close()


# ---- in the worker


class OutOfTime(BaseException):
    """Raised in the user's function by the timer; a BaseException, so that `except Exception` does not catch it."""


def main() -> None:
    """The worker: a line about the function when it is ready; then items in, a list of scores out."""
    file, name, seconds, memory = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
    answers = os.fdopen(os.dup(1), "wb")
    questions = os.fdopen(os.dup(0), "rb")
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1):  # what a function prints must not be taken for an answer
        os.dup2(null, stream)
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))

    def send(message) -> None:
        answers.write(json.dumps(message).encode() + b"\n")
        answers.flush()

    try:
        function = load(file, name)
        form = signature(function)
    except UserError as e:
        send({"error": str(e)})
        return
    signal.signal(signal.SIGALRM, alarm)
    send({"line": getattr(inspect.unwrap(function), "__code__", alarm.__code__).co_firstlineno,
          "batched": form == "completions"})
    loop = asyncio.new_event_loop()
    while line := questions.readline():
        items = [Item(**item) for item in json.loads(line)["items"]]
        if form == "completions" and items:
            send(call_batch(function, items, file, seconds, loop))
        else:
            send([call_one(function, form, item, file, seconds, loop) for item in items])


def load(file: Path, name: str):
    """The function `name` of a Python file. Raises UserError, with file and line, if there is none."""
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    sys.path.insert(0, str(file.parent))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    try:
        spec.loader.exec_module(module)
    except SyntaxError as e:
        raise UserError(f"{e.filename}:{e.lineno}: {e.msg}; correct it") from e
    except (Exception, SystemExit) as e:
        raise UserError(f"{place(e, file)}: {said(e)} (while it was imported)") from e
    function = getattr(module, name, None)
    if not callable(function):
        there = [n for n, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module.__name__]
        raise UserError(f"{file}: has no function {name}; there are: {', '.join(there) or 'none'}")
    return function


def signature(function) -> list[str] | str:
    """"completions" for the second form; else which of prompt, completion and row it takes, in order."""
    parameters = inspect.signature(function).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY, p.POSITIONAL_ONLY)
             and p.default is p.empty]
    if "completions" in (p.name for p in parameters):
        return "completions"
    if len(names) <= 3 and set(names) <= {"prompt", "completion", "row"} and names:
        return names
    if len(names) == 3:
        return ["prompt", "completion", "row"]  # by position, whatever their names
    raise UserError(f"{getattr(function, '__name__', function)}({', '.join(names)}): a scorer takes prompt, completion "
                    "and row, or completions and columns of the data as lists")


def call_one(function, names: list[str], item: Item, file: Path, seconds: float, loop) -> tuple:
    given = {"prompt": prompt_of(item), "completion": item.completion, "row": dict(item.row)}
    try:
        return verdict(timed(function, [given[name] for name in names], {}, seconds, loop))
    except (Exception, SystemExit, OutOfTime) as e:
        return None, None, f"{place(e, file, function)}: {said(e, seconds)}; {item.where}"


def call_batch(function, items: list[Item], file: Path, seconds: float, loop) -> list[tuple]:
    where = items[0].where + (f" to {items[-1].where}" if len(items) > 1 else "")
    completions = [[{"role": "assistant", "content": i.completion}] if i.conversational else i.completion
                   for i in items]
    columns = dict.fromkeys(name for item in items for name in item.row)
    given = {name: [item.row.get(name) for item in items] for name in columns} | {
        "prompts": [prompt_of(i) for i in items], "completions": completions,
        "completion_ids": [i.tokens for i in items], "rows": [dict(i.row) for i in items]}
    parameters = inspect.signature(function).parameters.values()
    if not any(p.kind == p.VAR_KEYWORD for p in parameters):
        given = {p.name: given[p.name] for p in parameters if p.name in given}
    try:
        values = timed(function, [], given, seconds * len(items), loop)
        values = values.tolist() if hasattr(values, "tolist") else list(values)
        if len(values) != len(items):
            raise ValueError(f"returned {len(values)} values for {len(items)} completions")
    except (Exception, SystemExit, OutOfTime) as e:
        return [(None, None, f"{place(e, file, function)}: {said(e, seconds * len(items))}; {where}")] * len(items)
    found = []
    for value, item in zip(values, items, strict=True):
        try:
            found.append(verdict(value))
        except (ValueError, TypeError) as e:
            found.append((None, None, f"{place(e, file, function)}: {said(e)}; {item.where}"))
    return found


def timed(function, args: list, given: dict, seconds: float, loop):
    """function(*args, **given), awaited if it is async. Raises OutOfTime in it after `seconds`."""
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        value = function(*args, **given)
        return loop.run_until_complete(value) if inspect.isawaitable(value) else value
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def alarm(number, frame) -> None:
    raise OutOfTime


def verdict(value) -> tuple[float | None, str | None, None]:
    """(value, detail, None) of what a function returned. Raises ValueError or TypeError if it is none."""
    detail = None
    if isinstance(value, dict):
        if "score" not in value:
            raise ValueError(f"returned a dict without score, with {', '.join(map(str, value)) or 'nothing'}")
        rest = {k: v for k, v in value.items() if k != "score"}
        detail, value = json.dumps(rest, default=str, ensure_ascii=False)[:10_000] if rest else None, value["score"]
    return (None if value is None else finite(value)), detail, None


def prompt_of(item: Item):
    return item.messages if item.conversational else item.messages[-1]["content"]


def place(error: BaseException, file: Path, function=None) -> str:
    """file:line of the newest frame in the user's file."""
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == str(file)]
    if not lines and function is not None:
        lines = [getattr(inspect.unwrap(function), "__code__", alarm.__code__).co_firstlineno]
    return f"{file}:{lines[-1]}" if lines else str(file)


def said(error: BaseException, seconds: float = 0.0) -> str:
    if isinstance(error, OutOfTime):
        return f"took more than {seconds:g} s"
    if isinstance(error, MemoryError):
        return "out of memory (memory_gb)"
    text = " ".join(str(error).split())[:300]
    return text if text.startswith("returned ") else f"{type(error).__name__}: {text}" if text else type(error).__name__


if __name__ == "__main__":
    main()
