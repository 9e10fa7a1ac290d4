"""SIGKILL to the whole job at named places and at random moments: the same command goes on, to the same bits."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from training import largest_difference

from strop.trainer.run.artifacts import list_files
from strop.trainer.run.files import read_json
from strop.trainer.run.metrics import read_metrics
from strop.trainer.run.tables import read_table

REPO = Path(__file__).parents[2]
TIMES = {"final/README.md", "final/results.json"}  # the card tells how long the stages took


@pytest.fixture
def recipe(tiny_recipe):
    """Two microbatches a step, a snapshot, an average, a resume point after every step."""
    text = tiny_recipe.read_text().replace("checkpoint_steps: 1", "checkpoint_steps: 1, snapshots: 1")
    tiny_recipe.write_text(text + "merge: {method: average}\n")
    return tiny_recipe


def job(recipe: Path, name: str, *arguments, **keys) -> dict:
    return {"argv": [str(recipe), f"name={name}", *arguments], "log": str(recipe.with_name(f"{name}.log")),
            "run_dir": str(recipe.parent / "runs" / name)} | keys


def finish(launcher, task: dict, times: int = 1) -> int:
    """Starts the job until it is not killed any more; how often it was."""
    for killed in range(1000):
        launcher.start(**task)
        if (status := launcher.wait()) != -signal.SIGKILL:
            assert status == 0, Path(task["log"]).read_text()[-3000:]
            return killed
    raise AssertionError(f"killed for ever: {Path(task['log']).read_text()[-3000:]}")


def contents(run: Path) -> dict[str, str]:
    """Every file of every artifact, and its hash."""
    return {f"{m.parent.relative_to(run).as_posix()}/{name}": entry["hash"] for m in run.rglob("manifest.json")
            for name, entry in read_json(m)["files"].items()}


def same_end(a: Path, b: Path) -> None:
    """Both runs have the same artifacts, to the bit, and the same logged steps; nothing of the kills is left."""
    assert (a / "final/model.safetensors").read_bytes() == (b / "final/model.safetensors").read_bytes()
    one, two = contents(a), contents(b)
    assert one.keys() == two.keys()
    assert {name for name in one if one[name] != two[name]} <= TIMES
    for run in (a, b):
        for manifest in run.rglob("manifest.json"):
            entries = read_json(manifest)["files"]
            assert {k: v for k, v in list_files(manifest.parent).items() if k in entries} == entries
    rows = [[(r["stage"], r["step"], r["loss"]) for r in read_metrics(run / "metrics.jsonl")] for run in (a, b)]
    assert rows[0] == rows[1] and max(Counter(r[:2] for r in rows[0]).values()) == 1
    left = [p for p in b.rglob("*") if p.name == "work" or p.suffix in (".partial", ".tmp")
            or (p.name.startswith(".") and p.name not in (".key", ".lock"))]
    assert not left, left


# stage boundaries, sampling, a training step, a checkpoint write, renames of a file, a checkpoint and an artifact
SOME = "|".join((
    "(/sample|/dpo|baseline|final): begins$", "sample: token 40", "sample: half of .*shard-00001",
    "sft: step 1 has", "dpo: the weights", "sft: half of .*state.safetensors",
    "sft: .*work/step-000001 (is to|has)", "score: .*scores.parquet has", "dpo: round-00/dpo (is to|has)",
    "merge: half of .*model.safetensors", "start: promotions.json is to", "final: has ended"))


@pytest.mark.parametrize("points, least", [
    pytest.param(SOME, 15, id="some"), pytest.param("", 200, id="all", marks=pytest.mark.slow)])
def test_killed_at_every_point_it_ends_with_the_same_bits(launcher, recipe, points, least):
    runs, fired = recipe.parent / "runs", recipe.with_name("fired")
    finish(launcher, job(recipe, "whole", "rounds=1"))
    fired.touch()
    killed = finish(launcher, job(recipe, "killed", "rounds=1", fired=str(fired), only=points))
    seen = fired.read_text()
    assert killed == len(seen.splitlines()) >= least, seen
    stages = ["baseline", "round-00/sample", "round-00/dpo", "final"] if points else [
        "prompts", "baseline-held-out", "baseline", "final", *(f"round-00/{s}" for s in (
            "sample", "score", "select", "sft", "reference", "dpo", "merge", "held-out", "evaluate"))]
    for stage in stages:
        assert f"{stage}: begins\n" in seen
    assert "token 40 is drawn" in seen and "state.safetensors is written" in seen and "has been renamed" in seen
    same_end(runs / "whole", runs / "killed")
    assert not (runs / "killed" / "stale").exists()


# of online training: a step's completions, and the gradients of the second epoch on others
ONLINE = "online: half of .*step-000002.parquet|online: step 5 has"


@pytest.fixture
def online_recipe(tiny_recipe):
    """Mirror descent of two epochs and a check of completions, resumed after every second step."""
    text = tiny_recipe.read_text().replace("rounds: 2", "method: committee\nrounds: 1")
    text = re.sub("(?m)^(sft|dpo): .*", r"\1: {enabled: false}", text)
    tiny_recipe.write_text(text + "online: {steps: 4, batch_size: 5, epochs: 2, max_new_tokens: 16, lr: 1.0e-3, "
                           "checkpoint_steps: 4, snapshots: 1, eval_steps: 4}\n")
    return tiny_recipe


@pytest.mark.parametrize("points, least", [
    pytest.param(ONLINE, 2, id="some"), pytest.param("online: ", 30, id="all", marks=pytest.mark.slow)])
def test_online_training_killed_or_on_two_ranks_is_the_same(launcher, online_recipe, points, least):
    runs, fired = online_recipe.parent / "runs", online_recipe.with_name("fired")
    finish(launcher, job(online_recipe, "whole"))
    fired.touch()
    assert finish(launcher, job(online_recipe, "killed", fired=str(fired), only=points)) >= least, fired.read_text()
    same_end(runs / "whole", runs / "killed")
    finish(launcher, job(online_recipe, "two", ranks=2))
    one, two = (runs / name / "round-00/online" for name in ("whole", "two"))
    assert largest_difference(one / "model", two / "model") < 1e-5
    for a, b in zip(sorted(one.glob("rollouts/*")), sorted(two.glob("rollouts/*")), strict=True):
        a, b = (read_table(path).to_pylist() for path in (a, b))
        for x, y in zip(a, b, strict=True):
            assert x.pop("logprobs") == pytest.approx(y.pop("logprobs"), abs=1e-4)
            assert x.pop("ref_logp") == pytest.approx(y.pop("ref_logp"), abs=1e-3)
            assert x == y
    logged = [[r for r in read_metrics(runs / name / "metrics.jsonl") if r["stage"].endswith("online")]
              for name in ("whole", "two")]
    same = ("loss", "grad_norm", "reward", "kl", "entropy", "learning_rate", "policy/approxkl", "eval/kl")
    for x, y in zip(*logged, strict=True):
        x, y = ({name: row[name] for name in same if name in row} for row in (x, y))
        assert x == pytest.approx(y, rel=1e-3, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [0, 2])
def test_killed_at_random_moments_it_ends_with_the_same_bits(launcher, recipe, ranks):
    runs, draw = recipe.parent / "runs", random.Random(ranks)
    started = time.monotonic()
    launcher.start(**job(recipe, "whole", ranks=ranks))
    assert launcher.wait() == 0, recipe.with_name("whole.log").read_text()[-3000:]
    seconds, killed, n = time.monotonic() - started, 0, 0
    while killed < 36:
        n += 1
        task = job(recipe, f"killed-{n}", ranks=ranks)
        for _ in range(12):
            pid = launcher.start(**task)
            time.sleep(draw.uniform(0.02, seconds / 4))
            with contextlib.suppress(ProcessLookupError):  # it was quicker
                os.killpg(pid, signal.SIGKILL)
            if (status := launcher.wait()) == 0:
                break
            assert status == -signal.SIGKILL, Path(task["log"]).read_text()[-3000:]
            killed += 1
        finish(launcher, task)
        same_end(runs / "whole", runs / f"killed-{n}")
    print(f"{killed} kills in {n} runs of {seconds:.1f} s")


def test_two_ranks_killed_together_go_on_and_no_orphan_writes(launcher, recipe):
    """First the whole job dies inside sampling and inside training; then its agent alone, as a killed torchrun."""
    runs, fired = recipe.parent / "runs", recipe.with_name("fired")
    finish(launcher, job(recipe, "whole", "rounds=1", ranks=2))
    fired.touch()
    points = "sample: token 40|sft: step 1 has|dpo: half of .*state.safetensors"
    task = job(recipe, "killed", "rounds=1", ranks=2, fired=str(fired), only=points)
    seen, run = set(), runs / "killed"
    while len(seen) < 3:
        launcher.start(**task)
        assert launcher.wait() == -signal.SIGKILL, Path(task["log"]).read_text()[-3000:]
        seen = set(fired.read_text().splitlines())
    agent = launcher.start(**task | {"only": "nothing"})
    workers = wait_for(lambda: children_of(agent), lambda found: len(found) == 2)
    wait_for(lambda: (run / "round-00/dpo").exists(), bool)
    os.kill(agent, signal.SIGKILL)
    assert launcher.wait() == -signal.SIGKILL
    wait_for(lambda: [pid for pid in workers if is_alive(pid)], lambda alive: not alive)
    assert not (run / "final").exists()  # what an orphan would have gone on to
    finish(launcher, job(recipe, "killed", "rounds=1", ranks=2))
    same_end(runs / "whole", run)


@pytest.mark.slow
def test_a_reward_model_killed_at_every_point_and_of_two_ranks_is_the_same(launcher, tiny_recipe):
    recipe = yaml.safe_load(tiny_recipe.read_text())
    rows = [{"prompt": f"say {i}", "chosen": f"{i}", "rejected": f"not {i + 1}", "margin": i % 3} for i in range(60)]
    pairs = tiny_recipe.with_name("pairs.jsonl")
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for key in ("sft", "dpo", "evaluate", "rounds"):
        del recipe[key]
    recipe |= {"method": "reward", "reward": {"pairs": "all", "margin": 1.0, "centering": 0.01, "batch_size": 8,
                                              "label_smoothing": 0.1, "lr": 1e-3, "checkpoint_steps": 1,
                                              "held_out": 0.3}}
    recipe["data"]["preferences"] = [{"name": "pairs", "path": str(pairs), "near_duplicates": False}]
    tiny_recipe.write_text(yaml.safe_dump(recipe))
    runs, fired = tiny_recipe.parent / "runs", tiny_recipe.with_name("fired")
    finish(launcher, job(tiny_recipe, "whole"))
    fired.touch()
    killed = finish(launcher, job(tiny_recipe, "killed", fired=str(fired), only="reward: "))
    assert killed > 40 and "step 1 has its gradients" in fired.read_text()
    assert contents(runs / "whole") == contents(runs / "killed")
    fired.write_text("")
    task = job(tiny_recipe, "two", ranks=2, fired=str(fired), only="reward: step 2 has|reward: half of .*state")
    while len(fired.read_text().splitlines()) < 2:
        launcher.start(**task)
        assert launcher.wait() == -signal.SIGKILL, Path(task["log"]).read_text()[-3000:]
    finish(launcher, task)
    one, two = (runs / name / "round-00/reward" for name in ("whole", "two"))
    assert largest_difference(one / "model", two / "model") < 1e-5
    held = [read_table(folder / "held_out.parquet").to_pylist() for folder in (one, two)]
    assert len(held[0]) > 10
    for a, b in zip(*held, strict=True):
        assert a | {"chosen": 0, "rejected": 0} == b | {"chosen": 0, "rejected": 0}
        assert (a["chosen"], a["rejected"]) == pytest.approx((b["chosen"], b["rejected"]), abs=1e-4)


@pytest.mark.parametrize("argument, said", [("data.test=500", "leave nothing to train on"),
                                            ("sft.max_length=3", "no row is left to train on")])
def test_of_two_ranks_one_says_what_is_wrong(launcher, recipe, argument, said):
    task = job(recipe, "wrong", argument, ranks=2)
    launcher.start(**task)
    assert launcher.wait() == 1
    text = Path(task["log"]).read_text()
    assert text.count("error: ") == 1 and said in text and "Traceback" not in text, text[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("engine", [
    ["engine.kind=fsdp"], ["engine.kind=deepspeed"], ["engine.kind=deepspeed", "engine.zero_stage=3"]], ids="-".join)
def test_killed_while_two_ranks_write_a_sharded_model_it_ends_with_the_same_bits(launcher, recipe, engine):
    if "engine.kind=deepspeed" in engine and not find_spec("deepspeed"):
        pytest.skip("DeepSpeed is not installed: pip install 'strop[deepspeed]'")
    runs, fired, ranks = recipe.parent / "runs", recipe.with_name("fired"), {"ranks": 2}
    points = r"/(sft|dpo): (half of .*(state-0000.-of-00002|model)|.*work/step-|step 1 has|the weights)"
    finish(launcher, job(recipe, "whole", "rounds=1", *engine, **ranks))
    fired.touch()
    killed = finish(launcher, job(recipe, "killed", "rounds=1", *engine, fired=str(fired), only=points, **ranks))
    assert killed >= 12 and "state-00001-of-00002.safetensors is written" in fired.read_text(), fired.read_text()
    same_end(runs / "whole", runs / "killed")


@pytest.mark.slow
def test_killed_torchrun_leaves_no_worker(recipe):
    run = recipe.parent / "runs" / "orphans"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", str(REPO / "trainer" / "main.py"),
               str(recipe), "name=orphans"]
    with open(recipe.with_name("log"), "w") as log:
        agent = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
    wait_for(lambda: list(run.glob("round-00/sample.partial/shard-*.parquet")), bool, 120)
    workers = children_of(agent.pid)
    agent.kill()
    agent.wait()
    assert len(workers) == 2
    wait_for(lambda: [pid for pid in workers if is_alive(pid)], lambda alive: not alive, 5)
    assert not (run / "round-00/sample").exists()


def wait_for(get, is_right, seconds: float = 60.0):
    """What `get` gives once it is right."""
    deadline = time.monotonic() + seconds
    while not is_right(found := get()):
        assert time.monotonic() < deadline, found
        time.sleep(0.002)
    return found


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid: int) -> bool:
    """Whether the process still runs; one that is dead and not yet reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False
