"""SIGINT, SIGTERM and SIGHUP end a run at a safe point, with one line, and the same command resumes it."""

import os
import signal
import subprocess
import sys
import time

import pytest

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
# a stage is in the middle once this file holds this text
AFTER = {"sample": ("round-00/sample.partial/shard-00001.parquet", ""), "sft": ("metrics.jsonl", '"round-00/sft"')}
KEYS = ("sample.shard_prompts=1", "sft.epochs=40", "sft.checkpoint_steps=1000")


def start(recipe, *more):
    return subprocess.Popen([sys.executable, "-m", "strop.trainer.main", str(recipe), "rounds=1", *more],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)


def stop_when(process, path, text, number):
    """Sends the signal once `path` holds `text`, and waits for the process to end."""
    while not path.exists() or (text and text not in path.read_text()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    process.send_signal(number)
    process.wait(timeout=60)


@pytest.mark.parametrize("stage, number", [("sample", signal.SIGTERM), ("sft", signal.SIGINT)])
def test_a_signal_stops_at_a_safe_point_and_the_run_resumes(tiny_recipe, tmp_path, stage, number):
    run_dir = tmp_path / "runs" / "tiny"
    process = start(tiny_recipe, *KEYS)
    file, text = AFTER[stage]
    stop_when(process, run_dir / file, text, number)
    out, err = process.communicate()
    assert process.returncode == 128 + number
    assert err.splitlines()[-2:] == ["stopping at the next safe point; again to stop at once",
                                     "stopped; the same command resumes"]
    assert "Traceback" not in out + err
    if stage == "sft":
        (kept,) = (run_dir / "round-00/sft.partial/work").glob("step-*")
        assert int(kept.name[5:]) >= 1  # saved because it stopped: the next resume point was far
    again = start(tiny_recipe, *KEYS)
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert ("resumed at step" if stage == "sft" else "completions) done before") in out


def test_a_terminal_that_goes_away_stops_the_run(tiny_recipe, tmp_path):
    main, worker = os.openpty()
    process = subprocess.Popen([sys.executable, "-m", "strop.trainer.main", str(tiny_recipe), "sample.shard_prompts=1"],
                               stdout=worker, stderr=worker, env=ENVIRONMENT)
    os.close(worker)
    shard = tmp_path / "runs/tiny/round-00/sample.partial/shard-00001.parquet"
    while not shard.exists():
        assert process.poll() is None
        os.read(main, 4096)
    os.close(main)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=60) == 128 + signal.SIGHUP
