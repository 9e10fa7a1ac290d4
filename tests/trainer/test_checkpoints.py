"""Resume points that are written while training goes on."""

import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from stagecalls import sft
from test_mirror import on_two_nodes
from training import Log, recipe_of, select_of, stage_in

from strop.trainer.errors import UserError
from strop.trainer.run import mirror
from strop.trainer.run.files import read_json
from strop.trainer.run.world import World
from strop.trainer.training import checkpoint
from strop.trainer.training.checkpoint import Checkpoints, Saved, checkpoints_in


class Gate:
    """save_file, which waits at each call until it is opened; a call in `fails` raises an error."""

    def __init__(self, monkeypatch, fails: dict[int, Exception] | None = None):
        self.real, self.calls, self.fails = checkpoint.save_file, 0, fails or {}
        self.gates = [threading.Event() for _ in range(9)]
        monkeypatch.setattr(checkpoint, "save_file", self.save)

    def save(self, *args):
        self.calls += 1
        assert self.gates[self.calls - 1].wait(60)
        if self.calls in self.fails:
            raise self.fails[self.calls]
        self.real(*args)

    def open(self, *which: int) -> None:
        for i in which:
            self.gates[i - 1].set()


def begin(points: Checkpoints, work: Path, step: int, value: torch.Tensor) -> None:
    points.begin(work, {"step": step, "steps": 9}, dict, {"master/w": value})


def held(work: Path) -> dict[str, list[float]]:
    """step -> the tensor that its resume point has."""
    return {point.name: Saved(point, list(read_json(point / "state.json")["files"])).read("master/w", 0, 3).tolist()
            for point in checkpoints_in(work)}


def test_what_is_written_is_the_state_at_its_step(monkeypatch, tmp_path):
    gate, points, value = Gate(monkeypatch), Checkpoints(World()), torch.arange(3.0)
    begin(points, tmp_path, 1, value)
    value += 10  # training goes on
    assert held(tmp_path) == {}
    threading.Timer(0.1, gate.open, [1]).start()
    begin(points, tmp_path, 2, value)  # waits for the first one
    value += 10
    assert held(tmp_path) == {"step-000001": [0, 1, 2]}  # which is there until the second one is whole
    gate.open(2)
    points.finish()
    assert held(tmp_path) == {"step-000002": [10, 11, 12]}


def test_an_error_is_raised_later_and_the_last_point_stays(monkeypatch, tmp_path):
    gate, points = Gate(monkeypatch, {2: OSError(28, "No space left on device")}), Checkpoints(World())
    gate.open(1, 2, 3)
    begin(points, tmp_path, 1, torch.arange(3.0))
    begin(points, tmp_path, 2, torch.ones(3))
    with pytest.raises(UserError, match=r"step-000002: cannot be written \(No space left on device\); free some space"):
        points.finish()
    assert held(tmp_path) == {"step-000001": [0, 1, 2]} and len(list(tmp_path.iterdir())) == 1
    begin(points, tmp_path, 3, torch.ones(3))
    points.finish()
    assert held(tmp_path) == {"step-000003": [1, 1, 1]}


def test_as_a_context_it_waits_for_the_last_one(monkeypatch, tmp_path):
    gate, points = Gate(monkeypatch, {3: OSError(28, "No space left on device")}), Checkpoints(World())
    threading.Timer(0.1, gate.open, [1, 2, 3]).start()
    with points:
        begin(points, tmp_path, 1, torch.ones(3))
    assert held(tmp_path) == {"step-000001": [1, 1, 1]}
    with pytest.raises(KeyError), points:
        begin(points, tmp_path, 2, torch.ones(3))
        raise KeyError
    assert held(tmp_path) == {"step-000002": [1, 1, 1]}
    with pytest.raises(KeyError), points:  # the first error is told
        begin(points, tmp_path, 3, torch.ones(3))
        raise KeyError


def test_a_stage_trains_on_meanwhile(monkeypatch, tiny_model, tmp_path):
    gate = Gate(monkeypatch)

    class Opening(Log):
        def log(self, stage, step, *args, **options):
            super().log(stage, step, *args, **options)
            if step == 3:
                gate.open(1, 2)  # the point of step 2 is still being written

    stage = stage_in(tmp_path, "sft", Opening())
    sft(stage, recipe_of(sft={"batch_size": 3, "checkpoint_steps": 2}), select=select_of(tmp_path / "select", 15),
        start=tiny_model)
    assert gate.calls == 2 and [point.name for point in checkpoints_in(stage.work)] == ["step-000004"]


def test_a_full_disk_ends_the_stage_at_a_later_step(monkeypatch, tiny_model, tmp_path):
    Gate(monkeypatch, {1: OSError(28, "No space left on device")}).open(1)
    stage = stage_in(tmp_path, "sft")
    with pytest.raises(UserError, match=r"work/step-000002: cannot be written"):
        sft(stage, recipe_of(sft={"batch_size": 3, "checkpoint_steps": 2}), select=select_of(tmp_path / "select", 15),
            start=tiny_model)


def test_nodes_without_shared_storage_write_a_part_each(tmp_path):
    def check(world, run_dir):
        mirror.begin(world, run_dir)
        assert mirror.is_on()
        stage = run_dir / "sft.partial"
        work, points = stage / "work", Checkpoints(world, dist.new_group(backend="gloo"))
        work.mkdir(parents=True)

        def write(step: int) -> None:
            part = torch.arange(2.0 - world.rank) + 2 * world.rank + step
            points.begin(work, {"step": step, "steps": 9}, dict, {"master/w": part}, {"master/w": 2 * world.rank})
            points.finish()

        write(1)
        write(2)
        mine = work / "step-000002" / f"state-0000{world.rank}-of-00002.safetensors"
        assert [p for p in work.rglob("*.safetensors")] == [mine]
        mirror.meet(stage)
        assert held(work) == {"step-000002": [2, 3, 4]}
        real = checkpoint.write_json
        if world.first:  # the other node's part has its name already
            def fail(path, value):
                raise OSError(28, "No space left on device")

            checkpoint.write_json = fail
        with pytest.raises(UserError, match="step-000003: cannot be written"):
            write(3)
        checkpoint.write_json = real
        mirror.meet(stage)
        assert held(work) == {"step-000002": [2, 3, 4]}
        write(4)
        mirror.meet(stage)
        assert held(work) == {"step-000004": [4, 5, 6]} and len(list(work.glob("step-*"))) == 1

    on_two_nodes(tmp_path, check)
