"""Two network namespaces as two nodes: a node that fails, is killed or is cut off ends the other one within a minute,
and the same command resumes, also on one node."""

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

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
    until = time.monotonic() + seconds
    while not path.exists():
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


def test_nodes_without_shared_storage_are_refused(network, tiny_recipe, tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    for code, errors in outcomes(start(network, tiny_recipe, "output_dir=runs", folders=folders), WITHIN):
        assert code != 0
        assert errors.splitlines()[-1].startswith("error: output_dir=runs: ")
        assert "storage that all nodes share" in errors
