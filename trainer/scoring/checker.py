"""What runs in a box: a script, or the two sides of a test.

Tests and the program that they test are two processes in two boxes. The tests use the names of the program as objects
of another process (remote.py), so that nothing that the program does to itself (exiting, printing, patching, tracing)
changes how a test is judged; the program does not hold the tests. The verdicts go to a file that only the tests have.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import io
import json
import os
import sys
import traceback
import types

from strop.trainer.scoring.remote import Gone, Peer, Remote

SAID = 500  # characters of an error


def run(do: str, fds: list[int]) -> int:
    """The exit status of what a box is asked to `do`. fds: the source, then the channel, then the report."""
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0)), encoding="utf-8", errors="replace")
    sys.stdout, sys.stderr = (io.TextIOWrapper(io.BufferedWriter(io.FileIO(fd, "w")), encoding="utf-8",
                                               errors="replace", line_buffering=fd == 2) for fd in (1, 2))
    if do == "nothing":
        return 0
    with open(fds[0], "rb") as file:
        source = file.read().decode(errors="replace")
    if do == "python":
        return script(source, {"__name__": "__main__", "__builtins__": builtins})
    if do == "serve":
        names = {"__name__": "solution", "__builtins__": builtins}
        code = script(source, names)
        peer = Peer(os.dup(fds[1]), fds[1], True, names if code == 0 else None)
        peer.serve()
        return code
    return check(source, fds)


def script(source: str, names: dict) -> int:
    """Runs `source` in `names` as Python runs a script; its exit status."""
    sys.argv, code = ["solution.py"], 0
    try:
        exec(compile(source, "solution.py", "exec"), names)
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
        if code != e.code and e.code is not None:
            print(e.code, file=sys.stderr)
        code = code if names["__name__"] == "__main__" else 1  # a solution must define, not exit
    except BaseException as e:
        inner = e.__traceback__.tb_next if e.__traceback__ else None
        traceback.print_exception(type(e), e, inner)
        code = 1
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):  # too long, or closed or replaced by the program
        code = code or 120
    return code & 0xFF


# ---- the side of the tests

class Report:
    """Lines written as they come: {"broken": why} or {"loaded": True} of the program, {"total": n} of the tests, then
    {"test", "passed", "said"} each."""

    def __init__(self, fd: int):
        self.fd = fd

    def __call__(self, **line) -> None:
        os.write(self.fd, json.dumps(line).encode() + b"\n")


def check(source: str, fds: list[int]) -> int:
    """Runs the tests that `source` (JSON: kind, tests, module) describes against the program behind the channel."""
    task, report = json.loads(source), Report(fds[2])
    try:
        names = names_of(Peer(os.dup(fds[1]), fds[1], False))
    except (Gone, Exception) as e:
        report(broken=said(e))
        return 1
    report(loaded=True)
    (check_pytest if task["kind"] == "pytest" else check_asserts)(task, names, report)
    return 0


def names_of(peer: Peer) -> dict:
    """The program's names: data by value, modules imported here, all else remote. Raises Gone if there is none."""
    names = {}
    for name, module in peer.ask("modules", None, ()):
        try:
            names[name] = importlib.import_module(module)
        except ImportError:
            continue
    for name in peer.ask("names", None, ()):
        names[name] = peer.ask("name", name, ())
    return names


def check_asserts(task: dict, names: dict, report: Report) -> None:
    """Every assert of the tests is one: passed if it ran and never failed; failed also if it was not reached."""
    parts = [Asserts(text, i) for i, text in enumerate(task["tests"])]
    count = sum(len(part.lines) for part in parts)
    report(total=count)
    first = 0
    for part in parts:
        verdicts: dict[int, str] = {}
        space = {"__name__": "tests", "__builtins__": builtins, **names}
        why = run_asserts(part, space, verdicts)
        for i, line in enumerate(part.lines):
            failed = verdicts.get(i) or (why and i not in verdicts and why) or ""
            if i in verdicts or why:
                report(test=first + i, passed=not failed, said=f"{line}: {failed}" if failed else "")
            else:
                report(test=first + i, passed=None, said="")  # in a branch that was not taken
        first += len(part.lines)


class Asserts(ast.NodeTransformer):
    """Tests with each assert in `with __test__(i)`. A text without any is one test as a whole."""

    def __init__(self, text: str, number: int):
        self.lines: list[str] = []
        tree = self.visit(ast.parse(text))
        if not self.lines:
            self.lines.append(f"test {number + 1}")
            whole = ast.With(items=[ast.withitem(self._watch(0))], body=tree.body or [ast.Pass()])
            tree.body = [whole]
        self.code = compile(ast.fix_missing_locations(tree), "tests.py", "exec")

    def visit_Assert(self, node):
        self.lines.append(ast.unparse(node.test)[:200])
        return ast.With(items=[ast.withitem(self._watch(len(self.lines) - 1))], body=[node])

    def _watch(self, i: int):
        return ast.Call(ast.Name("__test__", ast.Load()), [ast.Constant(i)], [])


def run_asserts(part: Asserts, space: dict, verdicts: dict[int, str]) -> str:
    """Fills `verdicts` ("" for passed); why the tests broke off, or ""."""
    class Watch:
        def __init__(self, i):
            self.i = i

        def __enter__(self):
            pass

        def __exit__(self, kind, error, trace):
            if error is None:
                verdicts.setdefault(self.i, "")
            elif isinstance(error, Exception):
                verdicts[self.i] = verdicts.get(self.i) or said(error)
                return not isinstance(error, Gone)
            return False

    space["__test__"] = Watch
    try:
        exec(part.code, space)
    except BaseException as e:
        return said(e)
    return ""


def said(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, Gone):
        return f"the program {text}"
    if isinstance(error, AssertionError) and not text:
        return "is false"
    return f"{type(error).__name__}: {text}"[:SAID] if text else type(error).__name__


class Program(types.ModuleType):
    """The program as a module that tests import."""

    def __init__(self, name: str, names: dict):
        super().__init__(name)
        self.__dict__.update(names)


def check_pytest(task: dict, names: dict, report: Report) -> None:
    """Every test that pytest collects is one."""
    import pytest

    sys.modules[task["module"]] = Program(task["module"], names)
    with open("test_solution.py", "w", encoding="utf-8") as file:
        file.write("\n".join(task["tests"]))
    sys.path.insert(0, os.getcwd())
    order: dict[str, int] = {}

    class Collector:
        def pytest_collection_finish(self, session):
            order.update((item.nodeid, i) for i, item in enumerate(session.items))
            report(total=len(order))

        def pytest_runtest_logreport(self, report: pytest.TestReport):
            if report.nodeid in order and (report.failed or (report.when == "call" and report.passed)):
                crash = getattr(getattr(report.longrepr, "reprcrash", None), "message", "") if report.failed else ""
                tell(test=order[report.nodeid], passed=not report.failed,
                     said=f"{report.nodeid}: {' '.join(crash.split())}"[:SAID] if report.failed else "")

    tell = report
    pytest.main(["-q", "-p", "no:cacheprovider", "--rootdir", os.getcwd(), "test_solution.py"], plugins=[Collector()])


__all__ = ["Remote", "run"]
