"""Judging text in a child process that can be killed: for regular expressions, computer algebra and foreign scorers.

What a model writes can make such code run for ever, eat all memory or reach for files. The child has a time limit per
task, a memory limit, may not write files, sees no secrets of the environment, and dies with its parent.
"""

import atexit
import contextlib
import ctypes
import json
import os
import resource
import selectors
import signal
import subprocess
import sys
import threading

from strop.trainer.errors import UserError

LOAD_SECONDS = 120.0
MEMORY_BYTES = 4 << 30
KEPT_ENVIRONMENT = ("PATH", "PYTHONPATH", "VIRTUAL_ENV", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR")


class Child:
    """One child process, started when first asked, and again after it had to be killed. Safe to call from threads."""

    def __init__(self):
        self._process: subprocess.Popen | None = None
        self._lock = threading.Lock()
        self._loaded: set[str] = set()

    def ask(self, kind: str, task: dict, seconds: float) -> dict | None:
        """The child's answer to `task`, or None if it gave none within `seconds` or died of it.

        Raises UserError with the child's message if what `kind` needs is not installed.
        """
        with self._lock:
            for _ in range(2):  # once more if the child had died before it got the task
                if self._process is None or self._process.poll() is not None:
                    self._start()
                if kind not in self._loaded:
                    answer = self._exchange({"load": kind}, LOAD_SECONDS)
                    if answer is None:
                        raise UserError(f"the process that runs verifier {kind} could not start")
                    if "error" in answer:
                        raise UserError(answer["error"])
                    self._loaded.add(kind)
                with contextlib.suppress(BrokenPipeError):
                    return self._exchange({"kind": kind, **task}, seconds)
            return None

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()
        self._process = None
        self._loaded.clear()

    def _start(self) -> None:
        self.close()
        environment = {k: os.environ[k] for k in KEPT_ENVIRONMENT if k in os.environ}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "strop.trainer.scoring.sandbox"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, env=environment | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"})
        atexit.register(self.close)

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


def _confine() -> None:
    for what, limit in (("AS", MEMORY_BYTES), ("FSIZE", 0), ("CORE", 0)):
        with contextlib.suppress(ValueError, OSError):  # macOS has no limit on address space
            resource.setrlimit(getattr(resource, f"RLIMIT_{what}"), (limit, limit))
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def main() -> None:
    """The child: one JSON task a line in, one JSON answer a line out."""
    from strop.trainer.scoring.rules import ISOLATED

    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a scorer prints must not be taken for an answer
    _confine()
    for line in sys.stdin.buffer:
        task = json.loads(line)
        try:
            if "load" in task:
                ISOLATED[task["load"]](None)
                answer = {}
            else:
                answer = ISOLATED[task.pop("kind")](task)
        except ImportError as e:
            answer = {"error": str(e)}
        except (Exception, RecursionError, MemoryError):
            answer = {"score": 0.0, "extracted": None}
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


if __name__ == "__main__":
    main()
