"""The scripts for a GPU machine, without one: every case up to its first CUDA call."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import attention, measure
from benchmarks.gpu import cases, collect, kernels, steps, tiles
from benchmarks.step_sides import small_tokenizer

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = [ROOT / "benchmarks" / "gpu" / f"{name}.sh" for name in ("tests", "train", "sample")]
# What a case may print without a GPU.
GOOD = re.compile(r"reached the first CUDA call|ran on |left out: |[\d,]+ tokens/s|a decode step")


def run(script: Path, tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    settings = {"PYTHON": sys.executable, "OUT": str(tmp_path), "CARRIED": str(tmp_path / "nothing"),
                "OMP_NUM_THREADS": "1"}
    return subprocess.run([script, *arguments], env=os.environ | settings | environment, capture_output=True, text=True)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_options(script: Path, tmp_path: Path):
    subprocess.run(["bash", "-n", script], check=True)
    ran = run(script, tmp_path, "--unknown")
    assert ran.returncode == 2 and "unknown option --unknown" in ran.stderr


def test_a_script_stops_at_its_limit_and_says_what_it_left_out(tmp_path: Path):
    started = time.monotonic()
    ran = run(SCRIPTS[2], tmp_path, "--dry-run", LIMIT="1")
    assert time.monotonic() - started < 20
    assert ran.stdout.count("left out, ") == 2, ran.stdout


@pytest.mark.slow
def test_dry_run_of_the_tests(tmp_path: Path):
    ran = run(SCRIPTS[0], tmp_path, "--dry-run")
    assert ran.returncode == 0, ran.stdout[-4000:]
    assert int(re.search(r"(\d+) passed", ran.stdout)[1]) > 100


@pytest.mark.slow
def test_dry_run_of_training(tmp_path: Path):
    pytest.importorskip("trl")
    pytest.importorskip("liger_kernel")
    ran = run(SCRIPTS[1], tmp_path, "--dry-run")
    assert ran.returncode == 0, ran.stdout[-6000:]
    for side in ("strop", "trl masters", "trl autocast"):
        for job in steps.jobs(side, True):
            name = f"{side} {job.task} {job.prompt}:{job.completion}"
            line = re.search(rf"{re.escape(name)}: (.*)", ran.stdout)
            assert line and GOOD.search(line[1]), (name, line)
            if side != "strop":
                assert float(re.search(r"first losses (\S+) apart", line[1])[1]) < 1e-3
    for _, case, names in kernels.chosen():
        for name in names:
            line = re.search(rf"{re.escape(f'{case.name}: {name}')}: (.*)", ran.stdout)
            assert line and GOOD.search(line[1]), (case.name, name, line)
    assert ran.stdout.count("sm_90") == len(tiles.CANDIDATES)
    assert len(re.findall(r"^optimizer: .* ms, host .* of a copy's rate", ran.stdout, re.MULTILINE)) == 6
    sides = re.findall(r"^(?:strop|masters|autocast): (strop|trl \w+) \w+ \d", ran.stdout, re.MULTILINE)
    assert sides == ["strop"] * 4 + ["trl masters"] * 4 + ["trl autocast"] * 4, "one at a time has the GPU"


@pytest.mark.slow
def test_dry_run_of_sampling(tmp_path: Path):
    ran = run(SCRIPTS[2], tmp_path, "--dry-run")
    assert ran.returncode == 0, ran.stdout[-4000:]
    assert len(re.findall(r"(?:Strop|transformers), \d+ rows.*a decode step", ran.stdout)) == 6


def test_the_tests_have_every_file_that_needs_a_gpu():
    pattern = re.search(r"grep -lE '(.*?)'", SCRIPTS[0].read_text())[1]
    found = {path.name for path in (ROOT / "tests").rglob("test_*.py") if re.search(pattern, path.read_text())}
    assert {path.name for path in (ROOT / "tests").rglob("test_*_gpu.py")} | {"test_gpu.py", "test_csrc.py"} <= found


def test_the_parts_of_training_begin_their_cases_within_their_limit(monkeypatch):
    """In less than the 200 s that all may take: imports and the first model come before."""
    parts = re.findall(r"^part \w+ (\d+) (\S+)", SCRIPTS[1].read_text(), re.MULTILINE)
    assert sum(int(seconds) for seconds, _ in parts) == 175 and len(parts) == 7
    assert {module.split(".")[-1] for _, module in parts} == {"steps", "optimizer", "tiles", "kernels"}
    monkeypatch.setenv("DEADLINE", str(time.time() + 1000))
    cases.wait_for_turn(cases.parser("").parse_args(["--seconds", "20"]))
    assert 15 < cases.seconds_left() <= 20
    cases.wait_for_turn(cases.parser("").parse_args(["--seconds", "500"]))
    assert cases.seconds_left() <= 20, "the script's own limit stays"
    cases.wait_for_turn(cases.parser("").parse_args([]))
    assert cases.seconds_left() <= 20


def test_jobs_fill_the_microbatches():
    for side in ("strop", "trl masters"):
        for job in steps.jobs(side, False):
            rows = 2 * job.trl_pairs if job.task == "dpo" else job.trl_pairs
            assert job.rows % job.trl_pairs == 0
            assert rows * (job.prompt + job.completion) <= job.max_tokens == 8192


def test_a_failed_case_costs_itself_alone(capsys, monkeypatch):
    running = cases.Cases(dry=True)
    assert running.run("good", lambda: "fine")
    assert not running.run("bad", lambda: 1 / 0)
    assert running.run("gpu", lambda: torch.zeros(1, device="cuda")) and running.failed == 1
    monkeypatch.setenv("DEADLINE", str(time.time() - 1))
    assert not running.run("late", lambda: "never")
    assert running.failed == 1
    out = capsys.readouterr().out
    assert "good: fine" in out and "bad: FAILED: ZeroDivisionError" in out and "late: left out" in out


def test_a_case_is_written_when_both_sides_have_it(tmp_path: Path):
    ours, theirs = (steps.jobs(side, True)[0] for side in ("strop", "trl masters"))
    from benchmarks.step_sides import model_folder

    record = {"seconds": 2.0, "all_seconds": [2.0], "peak_bytes": 1, "losses": [0.7]}
    steps.keep(tmp_path, ours, record | {"flops": 10.0}, 5.0, model_folder("tiny"))
    assert "cases" not in json.loads((tmp_path / "train_step.json").read_text())
    text = steps.keep(tmp_path, theirs, record | {"seconds": 6.0}, 5.0, model_folder("tiny"))
    (case,) = json.loads((tmp_path / "train_step.json").read_text())["cases"].values()
    assert "3.00 times the time of strop" in text
    assert case["strop"]["seconds"] == 2.0 and case["peer"]["seconds"] == 6.0 and case["side"] == "trl masters"
    faster = record | {"seconds": 1.5, "flops": 10.0}
    steps.keep(tmp_path, replace(ours, side="strop compiled"), faster, 5.0, model_folder("tiny"))
    (case,) = json.loads((tmp_path / "train_step.json").read_text())["cases"].values()
    assert case["strop"]["seconds"] == 1.5 and case["of"] == "strop compiled" and case["peer"]["seconds"] == 6.0


def test_tile_candidates_start_with_what_is_used():
    from strop.kernels._triton import attention_launch

    for (kernel, size), found in tiles.CANDIDATES.items():
        assert found[0] == attention_launch.blocks(kernel, size, 2, 9) and len(set(found)) == len(found)
    assert {attention.HEADS[case.head][2] for shapes in tiles.SHAPES.values() for case in shapes} == {64, 128}


def test_what_travels_has_a_version():
    assert set(collect.PACKAGES) <= set(collect.pins())
    assert 0 < collect.tree_bytes() < collect.LIMIT
    # a model of several 10 MB must not be needed
    assert not [name for name in collect.PACKAGES if "smollm" in name]
    tokenizer = small_tokenizer()
    assert tokenizer.eos_token_id is not None and tokenizer("a b")["input_ids"]


def test_the_commit_travels_without_git(monkeypatch):
    def no_git(*_, **__):
        raise OSError

    monkeypatch.setattr(measure.subprocess, "run", no_git)
    assert measure.commit() == "unknown"
    monkeypatch.setenv("STROP_COMMIT", "abc")
    assert measure.commit() == "abc"
