"""Judging text in a child process: regular expressions, computer algebra and the scorers of a library.

Data can make such code run forever, fill the memory or reach for files. The child has a limit on memory and on CPU time
per task, a deleted working directory, no secrets of the environment and no inherited files. It does not import from the
user's working directory. An audit hook lets a task evaluate arithmetic only, and start, connect or write nothing. On
Linux the kernel also forbids writing and executing files (Landlock, 5.13 or newer) and TCP (6.7), gives the child an
empty network where the user may make one, and ends it with its parent.
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

    def ask(self, kind: str, task: dict, seconds: float) -> dict | None:
        """The child's answer to `task`; None if it took more than `seconds` of CPU time, or the child died of it.

        Raises UserError with the child's message if the child cannot start or load what `kind` needs.
        """
        message = json.dumps({"kind": kind, "seconds": seconds, "task": task}).encode() + b"\n"
        with self._lock:
            for _ in range(2):  # once more if the child had died before it got the task
                if self._process is None or self._process.poll() is not None:
                    self._start(kind)
                with contextlib.suppress(BrokenPipeError):
                    self._process.stdin.write(message)
                    self._process.stdin.flush()
                    # the wall clock only ends a task that waits
                    answer = json.loads(self._line(120 + 20 * seconds) or b"null")
                    if answer is not None and "error" in answer:
                        raise UserError(f"verifier {kind} cannot load what it needs: {answer['error']}")
                    return answer
            return None

    def close(self) -> None:
        if self._process is not None:
            with contextlib.suppress(OSError), self._process:
                self._process.kill()
        self._process = None

    def _start(self, kind: str) -> None:
        self.close()
        path = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if os.path.isabs(p)]
        environment = {k: os.environ[k] for k in KEPT_ENVIRONMENT if k in os.environ} | {
            "PYTHONPATH": os.pathsep.join(path), "PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0",
            "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        command = [sys.executable, "-P", "-m", "strop.trainer.scoring.sandbox"]
        with tempfile.TemporaryDirectory() as empty, tempfile.TemporaryFile() as stderr:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr,
                                             env=environment, cwd=empty, start_new_session=True)
            atexit.register(self.close)
            if not self._line(120.0):
                stderr.seek(0)
                lines = stderr.read().decode(errors="replace").strip().splitlines() or ["no answer within 120 s"]
                raise UserError(f"verifier {kind} cannot start its process ({' '.join(command)}): {lines[-1]}; that "
                                "command, run by hand, must start and wait")

    def _line(self, seconds: float) -> bytes:
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            line = self._process.stdout.readline() if selector.select(seconds) else b""
        if not line.endswith(b"\n"):
            self.close()
            return b""
        return line


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
