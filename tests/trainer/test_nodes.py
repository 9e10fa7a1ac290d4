"""Two network namespaces as two nodes: a node that fails, is killed or is cut off ends the other one within a minute,
and the same command resumes, also on one node. Without shared storage each node has a copy of the run."""

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from strop.trainer.run.artifacts import list_files, read_manifest
from strop.trainer.run.nodes import LOST

REPO = Path(__file__).parents[2]
WITHIN = 60  # seconds

pytestmark = [pytest.mark.slow, pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None, reason="network namespaces need root and iproute2")]


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def network():
    """Names of two namespaces with a cable between them; `cut` and `mend` it."""
    tag = uuid.uuid4().hex[:6]
    names = [f"strop-{tag}-{n}" for n in range(2)]
    made = []
    try:
        for name in names:
            try:
                ip("netns", "add", name)
            except subprocess.CalledProcessError as e:
                pytest.skip(f"no network namespaces here: {e.stderr}")
            made.append(name)
        ip("link", "add", f"v{tag}0", "type", "veth", "peer", "name", f"v{tag}1")
        for n, name in enumerate(names):
            ip("link", "set", f"v{tag}{n}", "netns", name)
            ip("-n", name, "link", "set", f"v{tag}{n}", "name", "cable")
            ip("-n", name, "addr", "add", f"10.222.0.{n + 1}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def start(names, recipe, *overrides, folders=(REPO, REPO)):
    """torchrun on both nodes, one rank each, in these working directories."""
    env = os.environ | {"GLOO_SOCKET_IFNAME": "cable", "OMP_NUM_THREADS": "1"}
    return [subprocess.Popen(
        ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", f"--nnodes={len(names)}",
         "--nproc-per-node=1", f"--node-rank={n}", "--master-addr=10.222.0.1", "--master-port=29555",
         "-m", "strop.trainer.main", str(recipe), *overrides],
        cwd=folders[n], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
        for n, name in enumerate(names)]


def wait_for(path, processes, seconds=120):
    """path: may end in a pattern."""
    until = time.monotonic() + seconds
    while not [*path.parent.glob(path.name)]:
        assert time.monotonic() < until, f"{path} did not come"
        for process in processes:
            if process.poll() is not None:
                raise AssertionError(process.communicate())
        time.sleep(0.05)


def outcomes(processes, seconds):
    """[(exit status, stderr)] of processes that must end within `seconds`."""
    began, found = time.monotonic(), []
    try:
        for process in processes:
            _, errors = process.communicate(timeout=max(1, seconds - (time.monotonic() - began)))
            found.append((process.returncode, errors))
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return found


def worker_of(process) -> int:
    """The process of the rank that a node's torchrun started."""
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])


def test_cut_off_node_ends_both_and_the_run_resumes(network, tiny_recipe):
    run_dir = tiny_recipe.parent / "runs" / "tiny"
    running = start(network, tiny_recipe)
    wait_for(run_dir / "round-00" / "sample" / "manifest.json", running)
    ip("-n", network[1], "link", "set", "cable", "down")
    (first, first_errors), (second, second_errors) = outcomes(running, WITHIN)
    assert first != 0 and second != 0
    assert "node 1" in first_errors and "has not answered for" in first_errors
    assert "no connection to node 0 (10.222.0.1)" in second_errors
    assert "Traceback" not in first_errors + second_errors
    assert all("the same command resumes" in errors.splitlines()[-1] for errors in (first_errors, second_errors))

    ip("-n", network[1], "link", "set", "cable", "up")
    again = outcomes(start(network, tiny_recipe, "rounds=1"), 180)
    assert [code for code, _ in again] == [0, 0], again
    assert (run_dir / "final" / "model.safetensors").exists()


def test_killed_rank_ends_both_nodes_and_one_node_resumes(network, tiny_recipe):
    run_dir = tiny_recipe.parent / "runs" / "tiny"
    running = start(network, tiny_recipe)
    wait_for(run_dir / "round-00" / "sample" / "manifest.json", running)
    os.kill(worker_of(running[1]), signal.SIGKILL)
    (first, first_errors), (second, second_errors) = outcomes(running, WITHIN)
    assert first != 0 and second != 0
    assert "was killed by SIGKILL" in second_errors.splitlines()[-1]
    assert "the same command resumes" in first_errors.splitlines()[-1]

    done = outcomes(start(network[:1], tiny_recipe, "rounds=1"), 180)
    assert done[0][0] == 0, done
    assert (run_dir / "final" / "model.safetensors").exists()


def test_error_of_one_rank_is_shown_on_every_node(network, tiny_recipe):
    """Only rank 0 reads the prompts, so the other node can know of the mistake only from it."""
    with open(tiny_recipe.parent / "prompts.jsonl", "a") as f:
        f.write("{not json\n")
    (first, first_errors), (second, second_errors) = outcomes(start(network, tiny_recipe), WITHIN)
    assert first != 0 and second != 0
    said = first_errors.splitlines()[-1]
    assert said.startswith("error: ") and "prompts.jsonl" in said
    host = os.uname().nodename
    assert second_errors.splitlines()[-1] == f"error: node 0 ({host}): {said.removeprefix('error: ')}"
    assert LOST < WITHIN


def artifacts(run_dir):
    """{stage: {file: hash}} of a run directory whose files have the hashes of their manifests."""
    found = {}
    for path in run_dir.rglob("manifest.json"):
        manifest = read_manifest(path.parent)
        files = {name: entry for name, entry in list_files(path.parent).items() if name != "manifest.json"}
        assert files == manifest["files"], path
        found[manifest["stage"]] = {name: entry["hash"] for name, entry in files.items() if name != "README.md"}
    return found


def kill(processes):
    for process in processes:
        os.killpg(process.pid, signal.SIGKILL)
    for process in processes:
        process.communicate()
    time.sleep(2)  # workers end with their torchrun


def test_nodes_without_shared_storage_keep_copies(network, tiny_recipe, tmp_path):
    """Whole, killed and resumed, also with nodes exchanged: the bits are those of a run with shared storage."""
    def on(*names):
        for name in names:
            (tmp_path / name).mkdir(exist_ok=True)
        return start(network, tiny_recipe, "output_dir=runs", "rounds=1", "dpo.batch_size=1",
                     folders=[tmp_path / name for name in names])

    def finish(*names):
        done = outcomes(on(*names), 240)
        assert [code for code, _ in done] == [0, 0], done
        runs = [tmp_path / name / "runs" / "tiny" for name in names]
        found = [artifacts(run) for run in runs]
        assert found[0] == found[1]
        for path in runs[0].rglob("manifest.json"):
            assert path.read_bytes() == (runs[1] / path.relative_to(runs[0])).read_bytes()
        assert not [path for run in runs for path in run.rglob("*.partial")]
        for name in ("plan.json", "promotions.json", "config.yaml", "metrics.jsonl", "report.html"):
            assert (runs[0] / name).read_bytes() == (runs[1] / name).read_bytes()
        return found[0]

    whole = finish("shared", "shared")
    assert "round-00/dpo" in whole
    assert finish("whole-0", "whole-1") == whole

    running = on("a", "b")
    wait_for(tmp_path / "b" / "runs" / "tiny" / "round-00" / "sample.partial" / "shard-00001.parquet", running)
    kill(running)
    assert not (tmp_path / "a" / "runs" / "tiny" / "round-00" / "sample.partial" / "shard-00001.parquet").exists()
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    shutil.copytree(tmp_path / "b", tmp_path / "d")
    running = on("a", "b")
    work = Path("runs") / "tiny" / "round-00" / "dpo.partial" / "work"
    wait_for(tmp_path / "a" / work / "step-*", running)
    kill(running)
    points = [[*(tmp_path / name / work).glob("step-*")] for name in ("a", "b")]
    assert points[0] and not points[1]
    assert finish("b", "a") == whole  # exchanged
    assert finish("d", "c") == whole
    assert finish("d", "c") == whole  # all is up to date


def test_file_that_a_node_lacks_ends_both(network, tiny_recipe, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.copy(tiny_recipe, tmp_path / name / "tiny.yaml")
    prompts = tiny_recipe.parent / "prompts.jsonl"
    shutil.copy(prompts, tmp_path / "a")
    settings = "output_dir=runs", "data.sources.0.path=prompts.jsonl"
    host, folders = os.uname().nodename, [tmp_path / "a", tmp_path / "b"]
    for code, errors in outcomes(start(network, "tiny.yaml", *settings, folders=folders), 180):
        assert code != 0
        assert f"{host}: prompts.jsonl: no such file" in errors.splitlines()[-1]

    (tmp_path / "b" / "prompts.jsonl").write_text(prompts.read_text() + "\n")
    for code, errors in outcomes(start(network, "tiny.yaml", *settings, folders=folders), 180):
        assert code != 0
        assert f"{host}: prompts.jsonl: is not what it is on node 0" in errors.splitlines()[-1]
