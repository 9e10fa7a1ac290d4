"""SIGINT, SIGTERM and SIGHUP end a run at a safe point, with one line, and the same command resumes it."""

import os
import signal
import time

import pytest

# a stage is in the middle once this file holds this text
AFTER = {"sample": ("round-00/sample.partial/shard-00001.parquet", ""), "sft": ("metrics.jsonl", '"round-00/sft"')}
KEYS = {"sample": ("rounds=1", "sample.shard_prompts=2"),
        "sft": ("rounds=1", "sft.epochs=20", "sft.checkpoint_steps=1000")}


def stop_when(pid, path, text, number):
    """Sends the signal once `path` holds `text`."""
    while not path.exists() or (text and text not in path.read_text()):
        os.kill(pid, 0)  # it has not ended by itself
        time.sleep(0.001)
    os.kill(pid, number)


@pytest.mark.parametrize("stage, number", [("sample", signal.SIGTERM), ("sft", signal.SIGINT)])
def test_a_signal_stops_at_a_safe_point_and_the_run_resumes(launcher, strop, tiny_recipe, tmp_path, stage, number):
    run_dir, out, err = tmp_path / "runs" / "tiny", tmp_path / "out", tmp_path / "err"
    pid = launcher.start(argv=[str(tiny_recipe), *KEYS[stage]], log=str(out), errors=str(err))
    file, text = AFTER[stage]
    stop_when(pid, run_dir / file, text, number)
    assert launcher.wait() == 128 + number
    assert err.read_text().splitlines()[-2:] == ["stopping at the next safe point; again to stop at once",
                                                 "stopped; the same command resumes"]
    assert "Traceback" not in out.read_text() + err.read_text()
    if stage == "sft":
        (kept,) = (run_dir / "round-00/sft.partial/work").glob("step-*")
        assert int(kept.name[5:]) >= 1  # saved because it stopped: the next resume point was far
    again = strop(tiny_recipe, *KEYS[stage])
    assert again.returncode == 0, again.stderr
    assert ("resumed at step" if stage == "sft" else "completions) done before") in again.stdout


def test_a_terminal_that_goes_away_stops_the_run(launcher, tiny_recipe, tmp_path):
    main, worker = os.openpty()
    pid = launcher.start(argv=[str(tiny_recipe), "sample.shard_prompts=1"], log=os.ttyname(worker))
    shard = tmp_path / "runs/tiny/round-00/sample.partial/shard-00001.parquet"
    while not shard.exists():
        os.kill(pid, 0)
        os.read(main, 4096)
    os.close(worker)
    os.close(main)
    os.kill(pid, signal.SIGHUP)
    assert launcher.wait() == 128 + signal.SIGHUP
