"""Judging text in a child process: regular expressions, computer algebra and the scorers of a library.

Data can make such code run forever, fill the memory or reach for files. The child has a limit on memory and on CPU time
per task, a deleted working directory, no secrets of the environment and no inherited files. It does not import from the
user's working directory. An audit hook lets a task evaluate arithmetic only, and start, connect or write nothing. On
Linux the kernel also forbids writing and executing files (Landlock, 5.13 or newer) and TCP (6.7), gives the child an
empty network where the user may make one, and ends it with its parent.
"""

import ast
import contextlib
import importlib.util
import io
import json
import math
import os
import resource
import signal
import sys
import time
import traceback
from pathlib import Path

from strop.trainer.errors import UserError
from strop.trainer.scoring.confine import (
    EXECUTE_AND_CHANGE,
    PR_SET_NO_NEW_PRIVS,
    PR_SET_PDEATHSIG,
    landlock,
    libc,
    limit,
    prctl,
)
from strop.trainer.scoring.process import Process

MEMORY_BYTES = 4 << 30
KEPT_ENVIRONMENT = ("PATH", "VIRTUAL_ENV", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR", "MPLCONFIGDIR",
                    "XDG_CACHE_HOME", "XDG_CONFIG_HOME")
FUNCTIONS = {"sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan", "sinh", "cosh", "tanh", "exp", "log",
             "ln", "sqrt", "Abs", "abs", "Symbol", "Integer", "Float", "Rational", "factorial"}
COMPUTES = (ast.Expression, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Constant, ast.Tuple, ast.List,
            ast.Set, ast.Dict, ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.expr_context)
FORBIDDEN = ("os", "subprocess", "socket", "shutil", "pty", "webbrowser", "ctypes", "urllib")


class Child(Process):
    """The process in which JUDGES of rules.py run."""

    def __init__(self):
        if importlib.util.find_spec("reasoning_gym"):
            _make_matplotlib_folders()
        kept = {k: os.environ[k] for k in KEPT_ENVIRONMENT if k in os.environ}
        super().__init__("a rule", "strop.trainer.scoring.sandbox", [], kept | {
            "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"})

    def judge(self, kind: str, task: dict, seconds: float) -> dict | None:
        """The judge's answer to `task`; None if it took more than `seconds` of CPU time, or the child died of it.

        Raises UserError with the child's message if the child cannot start or load what `kind` needs.
        """
        self.name = f"verifier {kind}"
        # the wall clock only ends a task that waits
        answer = self.ask({"kind": kind, "seconds": seconds, "task": task}, 120 + 20 * seconds)
        if answer is not None and "error" in answer:
            raise UserError(f"verifier {kind} cannot load what it needs: {answer['error']}")
        return answer


def _make_matplotlib_folders() -> None:
    """reasoning_gym imports Matplotlib, which makes its folders where there are none; the child may not."""
    for name, usual in (("XDG_CACHE_HOME", "~/.cache"), ("XDG_CONFIG_HOME", "~/.config")):
        folder = Path(os.environ.get(name) or usual, "matplotlib").expanduser()
        with contextlib.suppress(OSError):
            Path(os.environ.get("MPLCONFIGDIR") or folder).mkdir(parents=True, exist_ok=True)


# ---- in the child

def main() -> None:
    """The child: a line when it is ready; then one JSON task a line in, one JSON answer a line out."""
    from strop.trainer.scoring.rules import JUDGES

    answers, loaded = os.fdopen(os.dup(1), "wb"), set()
    _confine()
    sys.addaudithook(_forbid)
    signal.signal(signal.SIGPROF, signal.default_int_handler)  # raises KeyboardInterrupt, which no library catches
    answer = "ready"
    while True:
        signal.setitimer(signal.ITIMER_PROF, 0)
        _armed.clear()
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()
        asked = json.loads(sys.stdin.buffer.readline() or sys.exit())
        judge, seconds = JUDGES[asked["kind"]], asked["seconds"]
        try:
            if judge not in loaded:
                judge(None)
                loaded.add(judge)
            _armed.append(judge)
            # SIGXCPU ends the process if one long call of C code keeps Python from raising
            last = math.ceil(time.process_time() + seconds) + 1
            resource.setrlimit(resource.RLIMIT_CPU, (last, resource.RLIM_INFINITY))
            signal.setitimer(signal.ITIMER_PROF, seconds, 0.5)
            answer = judge(asked["task"])
        except KeyboardInterrupt:
            answer = None
        except (Exception, SystemExit) as e:
            answer = {"score": 0.0, "extracted": None} if _armed else {"error": f"{type(e).__name__}: {e}"}


def _confine() -> None:
    limit(AS=MEMORY_BYTES, FSIZE=0, CORE=0)
    if sys.platform == "linux":
        new_user, new_network = 1 << 28, 1 << 30
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        libc().unshare(new_network if os.geteuid() == 0 else new_user | new_network)
        prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        landlock(EXECUTE_AND_CHANGE)
    null = os.open(os.devnull, os.O_RDONLY)
    for stream in (1, 2):  # what a scorer prints must not be taken for an answer
        os.dup2(null, stream)
    sys.stdout = sys.stderr = io.StringIO()


_armed: list = []  # the judge at work


def _forbid(event: str, args: tuple) -> None:
    """An audit hook: raises PermissionError where a task evaluates other text than arithmetic, or changes anything."""
    if not _armed:
        return
    if event == "compile" and args[0] and str(args[1]).startswith("<"):
        importing = any("importlib._bootstrap" in frame.f_code.co_filename for frame, _ in traceback.walk_stack(None))
        if not importing and not _arithmetic(args[0]):
            raise PermissionError("only arithmetic is evaluated")
    elif event == "open" and not isinstance(args[0], int):
        if set(args[1] or "") & set("wax+") or args[2] & (os.O_WRONLY | os.O_RDWR):
            raise PermissionError("no file is written")
    elif event.partition(".")[0] in FORBIDDEN and event not in ("os.listdir", "os.scandir"):
        raise PermissionError(f"{event} is forbidden")


def _arithmetic(source) -> bool:
    """True if evaluating `source` can only compute: names, constants, containers, operators, FUNCTIONS."""
    if isinstance(source, str | bytes):
        text, judge = source if isinstance(source, str) else source.decode(), _armed.pop()
        try:
            source = ast.parse("0" if text == "from sympy import *" else text, mode="eval")  # sympy begins with it
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False
        finally:
            _armed.append(judge)
    return all(isinstance(n, COMPUTES) or (isinstance(n, ast.Name) and "__" not in n.id)
               or (isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id in FUNCTIONS)
               for n in ast.walk(source))


if __name__ == "__main__":
    main()
