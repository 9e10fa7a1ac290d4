"""Programs of a model against unit tests, in boxes (box.py). The score is the share of the tests that pass.

Kinds of tests: asserts (a text or a list of texts), pytest (a test file), stdio (a list of {input, output}, or of
[input, output]; programs in any language).
"""

from __future__ import annotations

import ast
import json
import os
import re
import socket
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, NamedTuple

from strop.trainer.errors import UserError
from strop.trainer.scoring.answers import spoken
from strop.trainer.scoring.base import Item, Scored
from strop.trainer.scoring.box import Box, Limits, Outcome, content_of, memory_file

FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*([\w+#.-]*)[^\n]*\n(.*?)(?:^[ \t]*\1[ \t]*$|\Z)", re.M | re.S)
SAID = 1000  # characters of the error that is kept


class Tests(NamedTuple):
    """The `code` section of a scorer; see config.Code."""

    kind: str
    tests_column: str
    entry_column: str | None
    prefix_column: str | None
    module: str
    command: list[str]
    file: str


class CodeScorer:
    """Runs programs, `workers` at a time; see base.Scorer. Raises UserError if no sandbox can be made."""

    by_item = True

    def __init__(self, tests: Tests, limits: Limits, workers: int):
        self.tests, self.limits = tests, limits
        pairs = [(Box(), Box()) for _ in range(workers)]  # for a program and its tests
        self._free: SimpleQueue[tuple[Box, Box]] = SimpleQueue()
        self._boxes = [box for pair in pairs for box in pair]
        for pair in pairs:
            self._free.put(pair)
        self._pool = ThreadPoolExecutor(workers)

    def score(self, items: list[Item], advance) -> list[Scored]:
        found = []
        for one in self._pool.map(self._one, items):
            found.append(one)
            advance(1)
        return found

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        for box in self._boxes:
            box.close()

    def check(self) -> None:
        """The sandbox has been made when this scorer is."""

    def _one(self, item: Item) -> Scored:
        boxes = self._free.get()
        try:
            return self.judge(item, *boxes)
        except BadTests as e:
            return Scored(None, error=f"{e}; {item.where}")
        finally:
            self._free.put(boxes)

    def judge(self, item: Item, program: Box, tests: Box) -> Scored:
        """Raises BadTests if the row's tests cannot be read."""
        entry = str(item.row[self.tests.entry_column]) if self.tests.entry_column else None
        prefix = item.row.get(self.tests.prefix_column, "") if self.tests.prefix_column else ""
        code = program_of(item.completion, entry)
        if not code.strip():
            return Scored(0.0, "no code")
        given = read_tests(item.row, self.tests, entry)
        source = f"{prefix}\n{code}".encode(errors="replace")
        if self.tests.kind == "stdio":
            return self._stdio(source, given, program)
        return self._tests(source, given, program, tests)

    def _stdio(self, source: bytes, pairs: list, box: Box) -> Scored:
        passed, first = 0, ""
        for i, (given, wanted) in enumerate(pairs):
            how = {"argv": self.tests.command, "file": self.tests.file} if self.tests.command else {}
            outcome = box.run("command" if how else "python", source, self.limits, stdin=given.encode(), **how)
            if outcome.code == 0 and same_output(outcome.stdout.decode(errors="replace"), wanted):
                passed += 1
            elif not first:
                first = f"test {i + 1}: {why(outcome, wanted)}"
        return Scored(passed / len(pairs), f"{passed}/{len(pairs)} passed" + (f"; {first}" if first else ""))

    def _tests(self, source: bytes, texts: list[str], program: Box, tests: Box) -> Scored:
        ours, theirs = socket.socketpair()
        report = memory_file()
        try:
            task = json.dumps({"kind": self.tests.kind, "tests": texts, "module": self.tests.module}).encode()
            served = program.start("serve", source, self.limits, further=(theirs.fileno(),))
            theirs.close()
            # the tests may start processes in no case, but need memory for themselves
            checked = tests.start("check", task, self.limits._replace(processes=1), further=(ours.fileno(), report))
            ours.close()
            judged = checked()
            ran = served()
            lines = [json.loads(line) for line in content_of(report, 16 << 20).splitlines()]
        finally:
            ours.close()
            theirs.close()
            os.close(report)
        # on a busy machine the tests may run out of time before the program that they wait for does
        waited = judged.code is None and not any("loaded" in line for line in lines)
        total = next((line["total"] for line in lines if "total" in line), 0)
        error = ran.stderr.decode(errors="replace").strip()[-SAID:]
        if waited or any("broken" in line for line in lines):
            return Scored(0.0, f"the program does not load: {error or ran.ended}")
        if not total:
            said = (judged.stderr + judged.stdout).decode(errors="replace").strip().splitlines()[-1:] or [judged.ended]
            raise BadTests(f"the tests cannot be run: {said[0][:300]}")
        verdicts = [line for line in lines if "test" in line]
        counted = total - sum(line["passed"] is None for line in verdicts)
        passed = sum(line["passed"] is True for line in verdicts)
        failed = next((line["said"] for line in verdicts if line["passed"] is False), "")
        if ran.code is None:  # stopped just before the tests, which have the same limit and took it to have ended
            failed = failed.replace("the program ended", f"the program {ran.ended}")
        if not failed and passed < counted:
            failed = f"{ran.ended if ran.code is None else judged.ended} before the last test"
        value = passed / counted if counted else 0.0
        return Scored(value, f"{passed}/{counted} passed" + "".join(f"; {t}" for t in (failed, error) if t)[:SAID])


class BadTests(Exception):
    """The tests of a row cannot be read or run; the text says why."""


def program_of(completion: str, entry: str | None) -> str:
    """The code of a completion: its last fenced block, of several the last one that defines `entry`; without a fence
    the whole text. Thinking is left out."""
    text = spoken(completion)
    blocks = [m[3] for m in FENCE.finditer(text) if m[3].strip()]
    if not blocks:
        return text
    defines = re.compile(rf"^\s*(?:async\s+)?(?:def|class)\s+{re.escape(entry or '')}\b", re.M)
    defining = [b for b in blocks if entry and defines.search(b)]
    return (defining or blocks)[-1]


def read_tests(row: dict[str, Any], how: Tests, entry: str | None) -> list:
    """The row's tests: texts, or (input, output) for stdio. Raises BadTests."""
    tests = row.get(how.tests_column)
    if isinstance(tests, str) and how.kind == "stdio":
        try:
            tests = json.loads(tests)
        except ValueError as e:
            raise BadTests(f"column {how.tests_column!r} is not JSON ({e})") from e
    if how.kind == "stdio":
        if isinstance(tests, dict):  # {"inputs": [...], "outputs": [...]}
            tests = list(zip(tests.get("inputs", ()), tests.get("outputs", ()), strict=False))
        pairs = [(t.get("input", ""), t.get("output")) if isinstance(t, dict) else t for t in tests or ()]
        if not pairs or any(not isinstance(p, list | tuple) or len(p) != 2 or not all(isinstance(s, str) for s in p)
                            for p in pairs):
            raise BadTests(f"column {how.tests_column!r} must be a list of {{input, output}} texts")
        return [tuple(p) for p in pairs]
    texts = [tests] if isinstance(tests, str) else tests
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
        raise BadTests(f"column {how.tests_column!r} must be a text or a list of texts")
    if how.kind == "asserts":
        for text in texts:
            try:
                ast.parse(text)
            except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
                raise BadTests(f"column {how.tests_column!r} is not Python ({e})") from e
        if entry and any(re.search(r"^def check\(", t, re.M) for t in texts):  # as HumanEval has it
            texts = ["\n".join([*texts, f"check({entry})"])]
    return texts


def same_output(said: str, wanted: str) -> bool:
    """Equal texts but for white space at the ends of lines and of the output."""
    one, other = ([line.rstrip() for line in text.rstrip().splitlines()] for text in (said, wanted))
    return one == other


def why(outcome: Outcome, wanted: str) -> str:
    error = outcome.stderr.decode(errors="replace").strip()
    if outcome.code != 0:
        return f"{outcome.ended}{': ' + error[-SAID:] if error else ''}"
    return f"output {outcome.stdout.decode(errors='replace').strip()[:200]!r}, wanted {wanted.strip()[:200]!r}"


def open_code(config, workers: int) -> CodeScorer:
    """The scorer of a `Scorer` section with `code`. Raises UserError if pytest is needed and not installed."""
    import importlib.util

    code = config.code
    if code.kind == "pytest" and importlib.util.find_spec("pytest") is None:
        raise UserError("code.kind=pytest needs the package pytest: pip install pytest")
    limits = Limits(config.seconds, int((config.memory_gb or 1.0) * 2**30), code.output_kb << 10, code.processes)
    return CodeScorer(Tests(code.kind, code.tests_column, code.entry_column, code.prefix_column, code.module,
                            code.command, code.file), limits, workers)
