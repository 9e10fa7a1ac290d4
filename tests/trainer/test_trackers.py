"""Trackers switch on by one key, keep a run's id, and never stop a run; the real ones are tried offline."""

import io
import json
import os
import subprocess
import sys
import types

import pytest
from training import recipe_of

from strop.trainer.cli import parse
from strop.trainer.errors import UserError
from strop.trainer.run.console import Console
from strop.trainer.run.metrics import open_metrics, read_metrics


class Fake(types.ModuleType):
    """A tracker's module: keeps what it is told."""

    def __init__(self, name):
        super().__init__(name)
        self.inits, self.rows, self.metrics, self.finished = [], [], [], 0

    def init(self, **how):
        self.inits.append(how)

    def define_metric(self, name, step_metric):
        self.metrics.append((name, step_metric))

    def log(self, row):
        self.rows.append(row)

    def finish(self):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
    fake = Fake("wandb")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def opened(run_dir, to, enabled=True):
    console = Console(file=io.StringIO())
    return open_metrics(recipe_of(log={"report_to": to, "tensorboard": False}), run_dir, console, enabled)


def test_steps_and_stages_reach_the_tracker_under_one_id(wandb, tmp_path):
    for _ in range(2):  # the second time is a resumed run
        metrics = opened(tmp_path / "run", "wandb")
        metrics.log("round-00/sft", 3, {"loss": 2.0})
        metrics.stage_done({"stage": "round-00/evaluate", "counts": {"sft/test": 0.5}, "seconds": 2.0})
        metrics.close()
    first, second = wandb.inits
    assert first["id"] == second["id"] == json.loads((tmp_path / "run/trackers.json").read_text())["wandb"]
    assert first["project"] == "strop" and first["resume"] == "allow" and first["config"]["sft"]["lr"] == 1e-5
    assert wandb.rows[:2] == [{"round-00/sft/step": 3, "round-00/sft/loss": 2.0},
                              {"stages/round-00/evaluate/sft/test": 0.5, "stages/round-00/evaluate/seconds": 2.0}]
    assert ("round-00/sft/*", "round-00/sft/step") in wandb.metrics and wandb.finished == 2


def test_nothing_is_opened_unless_the_key_asks(wandb, tmp_path):
    opened(tmp_path, []).close()
    opened(tmp_path / "other", "wandb", enabled=False).close()  # other ranks
    assert wandb.inits == [] and not (tmp_path / "trackers.json").exists() and not (tmp_path / "other").exists()


def test_a_tracker_that_fails_is_dropped_and_the_record_is_whole(wandb, tmp_path, monkeypatch):
    def fail(row):
        raise OSError("the network is gone\nand more")

    metrics = opened(tmp_path, "wandb")
    monkeypatch.setattr(wandb, "log", fail)
    for step in (1, 2, 3):
        metrics.log("a", step, {"loss": step})
    metrics.close()
    said = metrics.console.file.getvalue()
    assert said.count("the network is gone; tracker disabled") == 1 and "and more" not in said
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_one_that_is_missing_or_does_not_start_is_one_line(wandb, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(UserError, match=r"log\.report_to=trackio: trackio is not installed: pip install trackio"):
        opened(tmp_path, ["trackio"])
    monkeypatch.setattr(wandb, "init", lambda **how: (_ for _ in ()).throw(RuntimeError("no key\nlong story")))
    with pytest.raises(UserError) as e:
        opened(tmp_path, ["wandb"])
    assert "no key" in str(e.value) and "\n" not in str(e.value)


def test_the_key_takes_one_name_or_several():
    def of(text):
        return parse(["smoke", f"log.report_to={text}"]).recipe.log.report_to

    assert of("wandb") == ["wandb"] and of("[wandb, trackio]") == ["wandb", "trackio"]
    assert parse(["smoke"]).recipe.log.report_to == []
    with pytest.raises(UserError, match=r"log\.report_to"):
        of("mlflow")


OFFLINE = """\
import sys; sys.path.insert(0, sys.argv[1])
import test_trackers as t
from pathlib import Path
for step in (1, 2):  # the second time is a resumed run
    metrics = t.opened(Path(sys.argv[2]), sys.argv[3])
    metrics.log("round-00/sft", step, {"loss": 2.0 / step})
    metrics.close()
    assert "warning" not in metrics.console.file.getvalue(), metrics.console.file.getvalue()
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_the_real_one_works_offline(name, tmp_path):
    pytest.importorskip(name)
    offline = os.environ | {"WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1",
                            "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", OFFLINE, os.path.dirname(__file__), str(tmp_path / "run"), name],
                          env=offline, text=True, capture_output=True, timeout=180)
    assert done.returncode == 0, done.stderr
    if name == "wandb":
        assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))) == 2
    else:
        assert list((tmp_path / "trackio").glob("*.db"))
