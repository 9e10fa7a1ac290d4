"""Under torchrun our error line comes last, and a killed worker is one line."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from strop.trainer import launch

REPO = Path(__file__).parents[2]
MAIN = str(REPO / "trainer" / "main.py")


def torchrun(*arguments, ranks=1, env=None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", *arguments]
    env = {**os.environ, **(env or {})}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=REPO, env=env)


@pytest.mark.parametrize("ranks", [1, 2])
def test_error_line_is_last_and_alone(ranks):
    done = torchrun("trainer/main.py", "nonsense=1", ranks=ranks)
    assert done.returncode == 1
    assert done.stderr == "error: command line: nonsense=1: unknown key; did you mean seed?\n"


def test_killed_worker_is_one_line(tmp_path):
    """Rank 1 kills itself where the program starts; torchrun ends rank 0."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, time\nif os.environ.get('RANK') == '1':\n    os.kill(os.getpid(), 9)\n"
        "if os.environ.get('RANK') == '0':\n    time.sleep(60)\n"
    )
    done = torchrun("trainer/main.py", ranks=2, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1
    assert done.stderr == (
        "error: rank 1 was killed by SIGKILL, probably because memory ran out; the same command resumes the run\n"
    )


def test_crash_keeps_the_workers_traceback_only(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\nclass Broken:\n    def __getattr__(self, name):\n        raise RuntimeError('a bug')\n"
        "if 'RANK' in os.environ:\n    sys.modules['strop.trainer.cli'] = Broken()\n"
    )
    done = torchrun("trainer/main.py", "--help", env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "RuntimeError: a bug"
    assert done.stderr.count("Traceback") == 1


def test_another_program_under_torchrun_is_left_alone(tmp_path):
    (tmp_path / "main.py").write_text("raise SystemExit(3)\n")
    done = torchrun(str(tmp_path / "main.py"))
    assert done.returncode == 1 and "ChildFailedError" in done.stderr


def test_stopped_torchrun_says_so_in_one_line(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, time\nif 'RANK' in os.environ:\n    print('ready', flush=True)\n    time.sleep(60)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=1", "-m", "strop.trainer.main"]
    process = subprocess.Popen(command, cwd=REPO, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert errors == "stopped by SIGTERM; the same command resumes the run\n"


@pytest.mark.parametrize(("argv", "ours"), [
    (["python", "/env/bin/torchrun", "--nproc-per-node=2", MAIN, "mine.yaml"], True),
    (["python", "-u", "/env/bin/torchrun", "-m", "strop.trainer.main"], True),
    (["python", "-m", "torch.distributed.run", MAIN], True),
    (["python", "/env/bin/torchrun", "--no-python", "strop", "mine.yaml"], True),
    (["python", "/env/bin/torchrun", "main.py"], False),
    (["python", "/env/bin/torchrun", "--rdzv-id", "strop", "other.py"], False),
    (["python", "-u", MAIN, "mine.yaml"], False),
    (["python", "/env/bin/strop", "mine.yaml"], False),
    (["python", "-m", "pytest"], False),
    (["python"], False),
    ([], False),
])
def test_which_command_lines_are_ours(argv, ours):
    assert launch.starts_strop(argv) is ours


def child_failed(**failures):
    """ChildFailedError with rank_N=(seconds, exit code)."""
    error = type("ChildFailedError", (Exception,), {"__module__": "torch.distributed.elastic.multiprocessing.errors"})()
    error.failures = {
        int(name.removeprefix("rank_")): SimpleNamespace(timestamp=at, exitcode=code)
        for name, (at, code) in failures.items()
    }
    return error


def test_what_is_said_of_which_failure():
    assert launch.last_words(child_failed(rank_0=(5, 1))) == ""
    assert launch.last_words(child_failed(rank_0=(5, 1), rank_1=(5, -15))) == ""
    assert launch.last_words(child_failed(rank_0=(5, 1), rank_1=(35, -9))) == ""  # did not end when told to
    lost = launch.last_words(child_failed(rank_0=(5, 1), rank_1=(5, -9)))  # rank 0 lost its connection to rank 1
    assert lost.startswith("error: rank 1 was killed by SIGKILL, probably because memory ran out")
    assert launch.last_words(child_failed(rank_0=(5, -11))).startswith("error: rank 0 was killed by SIGSEGV;")
    assert launch.last_words(child_failed(rank_0=(5, -15))).startswith("error: rank 0 was killed by SIGTERM;")
    assert launch.last_words(RuntimeError("torchrun's own")) is None


def test_elsewhere_it_does_nothing_and_takes_no_time(monkeypatch):
    hook = sys.excepthook
    started = time.perf_counter()
    for _ in range(100):
        launch.quiet_launcher()
    assert time.perf_counter() - started < 0.1  # a millisecond each
    assert sys.excepthook is hook
    monkeypatch.setattr(launch, "starts_strop", lambda argv: 1 / 0)
    launch.quiet_launcher()


def test_it_is_registered_with_torch():
    from importlib.metadata import entry_points

    assert "strop.trainer.launch:quiet_launcher" in {e.value for e in entry_points(group="torch.backends")}
