"""Judging text in a child process: regular expressions, computer algebra and the scorers of a library.

Data can make such code run forever, fill the memory or reach for files. The child has a limit on CPU time per task and
on memory, an empty, deleted working directory, no secrets of the environment and no inherited files, and it is started
without the working directory on its import path. An audit hook lets it evaluate arithmetic only, and no program start,
connection or write: on every platform. On Linux the kernel also forbids writing and executing files (Landlock, 5.13 or
newer) and TCP (6.7), gives it a network of its own where the user may make one, and ends it with its parent.
"""

import ast
import atexit
import contextlib
import ctypes
import io
import json
import math
import os
import resource
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback

from strop.trainer.errors import UserError

LOAD_SECONDS = 120.0
MEMORY_BYTES = 4 << 30
KEPT_ENVIRONMENT = ("PATH", "VIRTUAL_ENV", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR")
FUNCTIONS = {"sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan", "sinh", "cosh", "tanh", "exp", "log",
             "ln", "sqrt", "Abs", "abs", "Symbol", "Integer", "Float", "Rational", "factorial"}
COMPUTES = (ast.Expression, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Constant, ast.Tuple, ast.List,
            ast.Set, ast.Dict, ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.expr_context)
FORBIDDEN = ("os", "subprocess", "socket", "shutil", "pty", "webbrowser", "ctypes", "urllib")


class Child:
    """One child process, started when first asked, and again after it had to be killed. Safe to call from threads."""

    def __init__(self):
        self._process: subprocess.Popen | None = None
        self._lock = threading.Lock()
        self._loaded: set[str] = set()

    def ask(self, kind: str, task: dict, seconds: float) -> dict | None:
        """The child's answer to `task`; None if it took more than `seconds` of CPU time, or the child died of it.

        Raises UserError with the child's message if the child cannot load what `kind` needs.
        """
        with self._lock:
            for _ in range(2):  # once more if the child had died before it got the task
                if self._process is None or self._process.poll() is not None:
                    self._start()
                with contextlib.suppress(BrokenPipeError):
                    if kind not in self._loaded:
                        self._load(kind)
                    # the wall clock only ends a task that waits
                    return self._exchange({"kind": kind, "seconds": seconds, **task}, 60 + 20 * seconds)
            return None

    def close(self) -> None:
        if self._process is not None:
            with contextlib.suppress(OSError), self._process:
                self._process.kill()
        self._process, self._loaded = None, set()

    def _start(self) -> None:
        self.close()
        path = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if os.path.isabs(p)]
        environment = {k: os.environ[k] for k in KEPT_ENVIRONMENT if k in os.environ} | {
            "PYTHONPATH": os.pathsep.join(path), "PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0",
            "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._complaint = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the object
        with tempfile.TemporaryDirectory() as empty:  # -P: no module of a working directory is imported
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "strop.trainer.scoring.sandbox"], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=self._complaint, env=environment, cwd=empty, start_new_session=True)
        atexit.register(self.close)

    def _load(self, kind: str) -> None:
        answer = self._exchange({"load": kind}, LOAD_SECONDS)
        if answer is None or "error" in answer:
            self._complaint.seek(0)
            lines = self._complaint.read().decode(errors="replace").strip().splitlines()
            why = answer["error"] if answer else lines[-1] if lines else f"no answer within {LOAD_SECONDS:g} s"
            raise UserError(f"verifier {kind} cannot start its process {sys.executable} -P -m strop.trainer.scoring."
                            f"sandbox ({why}); repair what the message names, or choose another verifier")
        self._loaded.add(kind)

    def _exchange(self, message: dict, seconds: float) -> dict | None:
        self._process.stdin.write(json.dumps(message).encode() + b"\n")
        self._process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            line = self._process.stdout.readline() if selector.select(seconds) else b""
        if not line.endswith(b"\n"):
            self.close()
            return None
        return json.loads(line)


# ---- in the child

class OutOfTime(BaseException):
    """A task has used its CPU time. No library catches it by `except Exception`."""


def main() -> None:
    """The child: one JSON task a line in, one JSON answer a line out; null for a task that was cut off."""
    from strop.trainer.scoring.rules import JUDGES

    answers, nothing = os.fdopen(os.dup(1), "wb"), {"score": 0.0, "extracted": None}
    _confine()
    signal.signal(signal.SIGPROF, _out_of_time)
    sys.addaudithook(_forbid)
    for line in sys.stdin.buffer:
        task, seconds = json.loads(line), 0.0
        try:
            if "load" in task:
                answer = JUDGES[task["load"]](None)
            else:
                judge, seconds = JUDGES[task.pop("kind")], task.pop("seconds")
                signal.setitimer(signal.ITIMER_PROF, seconds, 0.5)
                # SIGXCPU ends the process if one long call of C code keeps Python from raising OutOfTime
                last = math.ceil(time.process_time() + seconds) + 1
                resource.setrlimit(resource.RLIMIT_CPU, (last, resource.RLIM_INFINITY))
                _armed.append(task)
                answer = judge(task)
        except OutOfTime:
            answer = None
        except (Exception, SystemExit) as e:
            answer = nothing if seconds else {"error": f"{type(e).__name__}: {e}"}
        finally:
            _armed.clear()
            signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


def _out_of_time(*_) -> None:
    raise OutOfTime


def _confine() -> None:
    for what, limit in (("AS", MEMORY_BYTES), ("FSIZE", 0), ("CORE", 0)):
        with contextlib.suppress(ValueError, OSError):  # macOS has no limit on address space
            resource.setrlimit(getattr(resource, f"RLIMIT_{what}"), (limit, limit))
    if sys.platform == "linux":
        libc, new_user, new_network, pr_set_pdeathsig, pr_set_no_new_privs = ctypes.CDLL(None), 1 << 28, 1 << 30, 1, 38
        libc.prctl(pr_set_pdeathsig, signal.SIGKILL)
        libc.unshare(new_network if os.geteuid() == 0 else new_user | new_network)
        libc.prctl(pr_set_no_new_privs, 1, 0, 0, 0)
        create, restrict = 444, 446  # Landlock: a handled right that no rule grants is gone
        version = libc.syscall(create, None, ctypes.c_size_t(0), 1)
        execute_write, make_remove = 0b11, sum(1 << i for i in range(4, 13 + (version > 1) + (version > 2)))
        rights = (ctypes.c_uint64 * 2)(execute_write | make_remove, 0b11 if version > 3 else 0)
        ruleset = libc.syscall(create, rights, ctypes.c_size_t(16 if version > 3 else 8), 0) if version > 0 else -1
        if ruleset >= 0:
            libc.syscall(restrict, ruleset, 0)
            os.close(ruleset)
    null = os.open(os.devnull, os.O_RDONLY)
    for stream in (1, 2):  # what a scorer prints must not be taken for an answer
        os.dup2(null, stream)
    sys.stdout = sys.stderr = io.StringIO()


_armed: list = []  # the task in work


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
        text, task = source if isinstance(source, str) else source.decode(), _armed.pop()
        try:
            source = ast.parse("0" if text == "from sympy import *" else text, mode="eval")  # sympy begins with it
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False
        finally:
            _armed.append(task)
    return all(isinstance(n, COMPUTES) or (isinstance(n, ast.Name) and "__" not in n.id)
               or (isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id in FUNCTIONS)
               for n in ast.walk(source))


if __name__ == "__main__":
    main()
