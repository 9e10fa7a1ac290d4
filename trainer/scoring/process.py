"""A child process that answers a JSON line with a JSON line, and starts again after it had to be killed."""

import atexit
import contextlib
import json
import os
import selectors
import subprocess
import sys
import tempfile
import threading

from strop.trainer.errors import UserError

START_SECONDS = 120.0


class Process:
    """Runs `python -P -m MODULE ARGUMENTS`, started when first asked. Safe to call from threads.

    name: for messages. environment: all that it gets, besides what keeps Python from writing and from the user's
    working directory. The child's first line says that it is ready; what it writes to stderr before is its excuse.
    """

    def __init__(self, name: str, module: str, arguments: list[str], environment: dict[str, str]):
        self.name, self.command = name, [sys.executable, "-P", "-m", module, *arguments]
        self.environment = environment
        self.first: object = None  # what the first line says
        self._process: subprocess.Popen | None = None
        self._lock = threading.Lock()

    def ask(self, message: dict, seconds: float) -> object:
        """The answer to `message`; None if it took more than `seconds` of wall time, or the child died of it.

        Raises UserError with the child's message if it cannot start."""
        line = json.dumps(message).encode() + b"\n"
        with self._lock:
            for _ in range(2):  # once more if the child had died before it got the message
                if self._process is None or self._process.poll() is not None:
                    self._start()
                with contextlib.suppress(BrokenPipeError):
                    self._process.stdin.write(line)
                    self._process.stdin.flush()
                    return json.loads(self._line(seconds) or b"null")
            return None

    def close(self) -> None:
        if self._process is not None:
            with contextlib.suppress(OSError), self._process:
                self._process.kill()
        self._process = None

    def _start(self) -> None:
        self.close()
        path = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if os.path.isabs(p)]
        environment = self.environment | {"PYTHONPATH": os.pathsep.join(path), "PYTHONDONTWRITEBYTECODE": "1"}
        with tempfile.TemporaryDirectory() as empty, tempfile.TemporaryFile() as stderr:
            self._process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr,
                                             env=environment, cwd=empty, start_new_session=True)
            atexit.register(self.close)
            line = self._line(START_SECONDS)
            if not line:
                stderr.seek(0)
                lines = stderr.read().decode(errors="replace").strip().splitlines()
                raise UserError(f"{self.name} cannot start its process ({' '.join(self.command)}): "
                                f"{lines[-1] if lines else f'no answer within {START_SECONDS:.0f} s'}; that command, "
                                "run by hand, must start and wait")
            self.first = json.loads(line)

    def _line(self, seconds: float) -> bytes:
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            line = self._process.stdout.readline() if selector.select(seconds) else b""
        if not line.endswith(b"\n"):
            self.close()
            return b""
        return line
