"""Runs of the program in processes of their own, forked from one that has all libraries loaded: they start at once,
and they can be made to die at precise places.

`python killing.py` reads one job a line from stdin (JSON: argv, log, errors, env, code, run_dir, ranks, fired, only)
and forks for each. The fork is a job of its own: a process group, with several `ranks` an agent and its workers as
torchrun has them. `log` gets its output, and its errors too without a file `errors`; `env` is added to its environment;
`code` is executed before it begins. With a `run_dir`, named points are put around what the program does. A job with a
`fired` file SIGKILLs its whole group at the first point whose name matches `only` and is not in the file, and notes it
there; so the same job, started again and again, dies at every point once and then finishes. The answers are
{"pid": ...} once it has begun and {"status": ...} once it has ended.
"""

import contextlib
import gc
import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path


class Job:
    """The points of one process."""

    def __init__(self, task: dict):
        self.run_dir, self.only = Path(task["run_dir"]), re.compile(task.get("only", ""))
        self.fired = Path(task["fired"]) if task.get("fired") else None
        self.stage, self.draws, self.lock = "start", 0, threading.Lock()

    def point(self, name: str, before_death=None) -> None:
        """Dies here, with all of the job, unless it has done so before. `before_death` leaves half a file behind."""
        name = f"{self.stage}: {name}"
        with self.lock:  # resume points are written on a thread
            self._point(name, before_death)

    def _point(self, name: str, before_death) -> None:
        if self.fired is None or not self.only.search(name) or name in self.fired.read_text().splitlines():
            return
        with open(self.fired, "a") as f:
            f.write(name + "\n")
        if before_death:
            before_death()
        os.killpg(0, signal.SIGKILL)

    def name(self, path) -> str:
        """A path as points call it: below the run directory, without process numbers and random letters."""
        path = Path(path)
        text = path.relative_to(self.run_dir).as_posix() if self.run_dir in path.parents else path.name
        return re.sub(r"\.\d+\.tmp$", "", re.sub(r"\.(model|ema|step-\d+)-\w+", r"\1", text))

    def install(self) -> None:
        from strop.trainer.models import averaging
        from strop.trainer.run import files, store
        from strop.trainer.sampling import in_process
        from strop.trainer.training import checkpoint, local, masters

        def around(owner, attribute: str, before=None, after=None) -> None:
            real = getattr(owner, attribute)

            def wrapped(*args, **kwargs):
                if before:
                    before(*args)
                result = real(*args, **kwargs)
                if after:
                    after(*args)
                return result

            setattr(owner, attribute, wrapped)

        def enters(_, stage, *rest):
            self.stage, self.draws = stage.name, 0
            self.point("begins")

        def leaves(*args):
            self.point("has ended")
            self.stage = "between"

        def draws(*args):
            self.draws += 1
            if self.draws in (2, 40):
                self.point(f"token {self.draws} is drawn")

        def half(path):
            return lambda: os.truncate(path, os.path.getsize(path) // 2)

        def syncs(path):
            if path.suffix == ".tmp":
                self.point(f"half of {self.name(path)} is written", half(path))

        def tensors(_, path, *rest):
            self.point(f"half of {self.name(path)} is written", half(path))

        around(store.Store, "_run", enters, leaves)
        around(os, "replace", lambda a, b: self.point(f"{self.name(b)} is to be renamed"),
               lambda a, b: self.point(f"{self.name(b)} has been renamed"))
        around(files, "sync", syncs)
        around(checkpoint, "save_file", None, tensors)
        around(averaging, "write_tensors", None, tensors)
        around(in_process, "sample_tokens", draws)
        around(local.Engine, "step", lambda e: self.point(f"step {e.step_index} has its gradients"))
        around(masters.Masters, "step", None, lambda *_: self.point("the weights have moved, the step is not counted"))


def child(task: dict) -> None:
    """Runs the program and never returns."""
    from strop.trainer.main import main

    sys.stdout.reconfigure(line_buffering=os.isatty(1))
    exec(task.get("code", ""), {})
    if "run_dir" in task:
        Job(task).install()
    code = 70
    try:
        code = main(task["argv"])
    except BaseException:
        sys.excepthook(*sys.exc_info())
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        code = 120  # as Python itself ends
    os._exit(code)


def agent(task: dict) -> None:
    """What torchrun is to its workers: starts them, and ends them all when one fails."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ranks, workers = task["ranks"], []
    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            child(task)
        workers.append(pid)
    worst = 0
    for _ in workers:
        _, status = os.wait()
        worst = worst or status
        if status:
            time.sleep(0.5)  # torchrun looks at its workers now and then
            for pid in workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    os._exit(1 if worst else 0)


def serve() -> None:
    for name in ("strop.trainer.main", "strop.trainer.methods.running", "strop.trainer.reports.html", "pyarrow.dataset",
                 "transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto",
                 "transformers.models.auto.tokenization_auto"):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # shared with the forks: none of them looks for garbage in it
    out = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        task = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, 0)
            for stream, path in ((1, task["log"]), (2, task.get("errors", task["log"]))):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.environ |= task.get("env", {})
            agent(task) if task.get("ranks") else child(task)
        print(json.dumps({"pid": pid}), file=out, flush=True)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"status": os.waitstatus_to_exitcode(status)}), file=out, flush=True)


class Launcher:
    """The process that forks the jobs, one at a time."""

    def __init__(self):
        self.running: int | None = None
        self.process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "CI": "true"})

    def start(self, **task) -> int:
        """The job's process id, which is also that of its group."""
        self._end()
        print(json.dumps(task), file=self.process.stdin, flush=True)
        self.running = json.loads(self.process.stdout.readline())["pid"]
        return self.running

    def wait(self) -> int:
        """The exit code of the job, or minus the signal that ended it."""
        status = json.loads(self.process.stdout.readline())["status"]
        self.running = None
        return status

    def run(self, folder: Path, *arguments, ranks: int = 0, env: dict | None = None) -> subprocess.CompletedProcess:
        """The program from start to end; `folder` is where its output is kept."""
        argv, files = [*map(str, arguments)], [folder / "stdout", folder / "stderr"]
        for file in files:
            file.unlink(missing_ok=True)
        self.start(argv=argv, log=str(files[0]), errors=str(files[1]), ranks=ranks, env=env or {})
        return subprocess.CompletedProcess(argv, self.wait(), *(file.read_text() for file in files))

    def _end(self) -> None:
        """Ends the job that a failed test has left."""
        if self.running is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.running, signal.SIGKILL)
            self.wait()

    def close(self) -> None:
        self._end()
        self.process.stdin.close()
        self.process.wait(timeout=30)


if __name__ == "__main__":
    serve()
