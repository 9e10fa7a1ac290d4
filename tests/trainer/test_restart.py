"""Out of memory on one rank among collectives: all ranks start again by themselves, in smaller microbatches."""

import json
import os
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from torch.distributed import HashStore
from training import largest_difference, stage_in

from strop.kernels import Group
from strop.trainer.config import Sft
from strop.trainer.errors import UserError
from strop.trainer.run import restart
from strop.trainer.run.world import World
from strop.trainer.training.batch import Example
from strop.trainer.training.splitting import Budget


@pytest.fixture
def program(monkeypatch):
    """This process passes for the program under torchrun. Returns what would have replaced it: (command, reason)."""
    replaced = []
    monkeypatch.setattr(restart, "_is_program", True)
    monkeypatch.setattr(restart, "LOOK", 0.01)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    for name in (restart.COUNT, restart.REASON):
        monkeypatch.setenv(name, "")  # to be put back
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "listdir", lambda folder: [])  # its files stay open
    monkeypatch.setattr(os, "execv", lambda path, command: replaced.append((command, restart.reason())))
    return replaced


def rows(*sizes: int) -> list[Example]:
    return [Example(f"r{i}", Group([1], [[2] * (size - 1)])) for i, size in enumerate(sizes)]


def test_a_rank_that_cannot_repeat_its_step_alone_asks_for_a_restart(tmp_path, program, monkeypatch):
    stage = stage_in(tmp_path, "round-00/sft")
    budget = Budget(stage, Sft(max_tokens=64))
    with pytest.raises(restart.Restart) as error:
        budget.lower(3, rows(20, 21), alone=False)
    assert str(error.value) == (
        "round-00/sft: step 3: out of memory in a microbatch of 41 tokens; the run starts again from the newest resume "
        "point, with at most 21 (sft.max_tokens=64)")
    assert Budget(stage, Sft(max_tokens=64)).tokens == 21, "remembered"
    with pytest.raises(UserError, match=r"out of memory with row r0 alone, .*lower sft.max_length, .*--plan"):
        budget.lower(3, rows(21), alone=False)
    for why in ({restart.COUNT: str(restart.MOST)}, {"TORCHELASTIC_USE_AGENT_STORE": "False"}):
        with monkeypatch.context() as patch, pytest.raises(UserError, match="the same command resumes"):
            stage.world = World(size=2)
            for name, value in why.items():
                patch.setenv(name, value)
            budget.lower(3, rows(5, 6), alone=False)
    monkeypatch.setattr(restart, "_is_program", False)  # a script or notebook is never replaced
    assert not restart.possible(World())


def test_one_process_replaces_itself(program):
    with pytest.raises(restart.Restart), restart.watched(World()):
        raise restart.Restart("why")
    assert program == [([sys.executable, *sys.orig_argv[1:]], "why")] and restart.count() == 1
    assert restart.name().endswith("/1")


def test_ranks_leave_together(program):
    """All have seen the request before one goes, and all go for the reason of the first that asked."""
    store, worlds = HashStore(), [World(rank=rank, size=3) for rank in range(3)]
    watches = [restart.Watch(world, store) for world in worlds[:2]]
    threading.Thread(target=watches[1].ask, args=("why",), daemon=True).start()
    threading.Thread(target=watches[0].ask, args=("why",), daemon=True).start()
    until = time.monotonic() + 10
    while not (store.check(["ready"]) and store.add("ready", 0) == 2) and time.monotonic() < until:
        time.sleep(0.01)
    assert not program
    watches.append(restart.Watch(worlds[2], store))
    for watch in watches:
        watch.thread.join(timeout=10)
        assert not watch.thread.is_alive() and watch.asked()
    assert len(program) == 3 and program[0][1] == "why"


def test_after_one_ranks_mistake_the_others_say_nothing(program, monkeypatch):
    store = HashStore()
    monkeypatch.setattr("torch.distributed.TCPStore", lambda *_, **__: store)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    with pytest.raises(RuntimeError, match="closed"), restart.watched(World(size=2)):
        raise RuntimeError("Connection closed by peer")
    with pytest.raises(UserError), restart.watched(World(rank=1, size=2)):
        raise UserError("a mistake")
    with pytest.raises(SystemExit) as error, restart.watched(World(size=2)):
        raise RuntimeError("Connection closed by peer")
    assert error.value.code == 1 and not program


def test_a_training_that_ends_is_watched_no_more(program):
    watch = restart.Watch(World(size=2), HashStore())
    watch.ended.set()
    watch.thread.join(timeout=10)
    assert not watch.thread.is_alive() and not program


# rank 1 runs out of memory in microbatches of more than `limit` tokens, once it has had `spared` of them
SCRIPT = """
import os, sys, torch
from strop.trainer.main import main
from strop.trainer.training.logprobs import Scorer
real, seen = Scorer.hidden, []
def hidden(self, groups):
    if torch.is_grad_enabled() and groups.num_tokens > {limit} and os.environ["RANK"] == "1":
        seen.append(groups.num_tokens)
        if len(seen) > {spared}:
            raise torch.OutOfMemoryError("CUDA out of memory")
    return real(self, groups)
Scorer.hidden = hidden
sys.exit(main())
"""
RECIPE = """
output_dir: {folder}/runs
rounds: 1
dtype: float32
threads: 1
device: cpu
model: {{path: {model}}}
data: {{sft: [{{name: ready, path: {folder}/ready.jsonl}}]}}
sft: {{batch_size: 12, lr: 1.0e-3, epochs: 2, max_tokens: 256, checkpoint_steps: 1, eval_steps: 0}}
dpo: {{enabled: false}}
log: {{tensorboard: false}}
"""


def trained(folder: Path, model: Path, name: str, *keys: str, limit: int = 1 << 30, spared: int = 0
            ) -> subprocess.CompletedProcess:
    """A run on two ranks, under torchrun."""
    rows = [{"prompt": f"say {i}", "completion": "word " * (3 + i % 4)} for i in range(36)]
    (folder / "ready.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "ranks.yaml").write_text(RECIPE.format(folder=folder, model=model))
    script = folder / f"{name}.py"
    script.write_text(SCRIPT.format(limit=limit, spared=spared))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(script),
               str(folder / "ranks.yaml"), f"name={name}", *keys]
    return subprocess.run(command, capture_output=True, text=True, timeout=400,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "CI": "true"})


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "spared", "restarts"), [
    (["engine.kind=fsdp"], 5, 1),
    (["engine.kind=deepspeed", "engine.zero_stage=2"], 0, 2)], ids=["fsdp", "zero-2"])
def test_all_ranks_go_on_in_smaller_microbatches(tiny_model, tmp_path, engine, spared, restarts):
    if "deepspeed" in engine[0] and not find_spec("deepspeed"):
        pytest.skip("DeepSpeed is not installed: pip install 'strop[deepspeed]'")
    limit = 130 if restarts == 1 else 70
    split = trained(tmp_path, tiny_model, "split", *engine, limit=limit, spared=spared)
    said = split.stdout + split.stderr
    assert split.returncode == 0, said
    lines = [line for line in said.splitlines() if "out of memory" in line]
    assert len(lines) == restarts and "Traceback" not in said and "error" not in said, said
    for line in lines:
        assert line.startswith("warning: round-00/sft: step ") and "tokens on rank 1; all ranks start again from the " \
            "newest resume point, with at most" in line
    assert "sft: resumed at step" in said, said
    kept = json.loads((tmp_path / "runs/split/max_tokens-1.json").read_text())["sft"]
    assert kept[0] == 256 and kept[1] <= limit
    small = trained(tmp_path, tiny_model, "small", *engine, f"sft.max_tokens={limit}")
    assert small.returncode == 0, small.stdout + small.stderr
    weights = [tmp_path / f"runs/{name}/round-00/sft" for name in ("small", "split")]
    assert largest_difference(weights[0] / "model", weights[1] / "model") < 1e-5
    steps = [json.loads((folder / "manifest.json").read_text())["counts"]["steps"] for folder in weights]
    assert steps[0] == steps[1] == 6


@pytest.mark.slow
def test_a_row_that_does_not_fit_alone_ends_the_run_in_one_line(tiny_model, tmp_path):
    """After halving down to it: each restart halves, so there are few."""
    done = trained(tmp_path, tiny_model, "single", "engine.kind=fsdp", limit=10)
    said = done.stdout + done.stderr
    assert done.returncode == 1 and "Connection closed" not in said, said
    assert 1 <= said.count("all ranks start again") <= 5
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "alone" in errors[0] and "sft.activation_checkpointing=true" in errors[0]
