import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from training import largest_difference

from strop.trainer.store import read_json, read_table

REPO = Path(__file__).parents[2]


def strop(recipe, *arguments, ranks=0):
    torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}"] if ranks else []
    command = [sys.executable, *torchrun, str(REPO / "trainer" / "main.py"), str(recipe), *arguments]
    return subprocess.run(command, text=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
                          timeout=300)


def test_two_rounds_resume_and_recompute(tiny_recipe, tmp_path):
    run = tmp_path / "runs" / "tiny"
    planned = strop(tiny_recipe, "--plan")
    assert planned.returncode == 0 and not run.exists(), planned.stderr
    assert planned.stdout.count("to run") == 19
    first = strop(tiny_recipe)
    assert first.returncode == 0, first.stdout + first.stderr
    for stage in ("prompts", "baseline", "final", *(f"round-0{r}/{s}" for r in (0, 1) for s in (
            "sample", "score", "select", "sft", "reference", "dpo", "merge", "evaluate"))):
        assert (run / stage / "manifest.json").exists(), stage
    assert (run / "report.html").exists() and (run / "metrics.jsonl").exists() and (run / "config.yaml").exists()
    assert "round-01: promoted" in first.stdout and "gain over base" in first.stdout
    assert not list(run.rglob("work")) and not list(run.rglob("*.partial"))

    again = strop(tiny_recipe)
    assert again.returncode == 0 and again.stdout.count("done before, kept") == 19

    changed = strop(tiny_recipe, "dpo.beta=0.3", "--plan")
    assert "dpo.beta: 0.1 -> 0.3" in changed.stdout
    lines = {w[0]: w[1] for w in (line.split() for line in changed.stdout.splitlines()) if len(w) > 1}
    assert lines["round-00/sft"] == "done" and lines["round-00/dpo"] == lines["round-01/sample"] == "stale"


def test_final_folder_is_plain_transformers(tiny_recipe, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = strop(tiny_recipe, "rounds=1")
    assert done.returncode == 0, done.stderr
    final = tmp_path / "runs" / "tiny" / "final"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "say 1"}], add_generation_prompt=True,
                                        return_tensors="pt", return_dict=True)
    assert torch.isfinite(model(**ids).logits).all()
    assert "base_model:" in (final / "README.md").read_text()
    assert read_json(final / "results.json")["promotions"][0]["candidates"]["start"] == ["baseline", "base"]


def test_two_ranks_do_what_one_does(tiny_recipe, tmp_path):
    one = strop(tiny_recipe, "rounds=1", "name=one")
    two = strop(tiny_recipe, "rounds=1", "name=two", ranks=2)
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    a, b = tmp_path / "runs" / "one", tmp_path / "runs" / "two"
    for table in ("prompts/prompts", "round-00/score/scores", "round-00/select/sft", "round-00/select/pairs",
                  "baseline/results", "round-00/sample/shard-00003"):
        assert read_table(a / f"{table}.parquet").equals(read_table(b / f"{table}.parquet")), table
    for stage in ("sft", "dpo"):
        assert largest_difference(a / "round-00" / stage / "model", b / "round-00" / stage / "model") < 1e-5
    assert read_json(b / "round-00/sample/manifest.json")["ranks"] == 2


def test_killed_runs_go_on_and_end_with_the_same_weights(tiny_recipe, tmp_path):
    whole = strop(tiny_recipe, "name=whole", "rounds=1")
    assert whole.returncode == 0, whole.stderr
    run = tmp_path / "runs" / "killed"
    # one kill inside sampling, one inside training: when the file is there, the stage is still at work
    for seen in ("round-00/sample.partial/shard-00000.parquet", "round-00/sft.partial/work/step-000001"):
        process = subprocess.Popen([sys.executable, str(REPO / "trainer" / "main.py"), str(tiny_recipe), "name=killed",
                                    "rounds=1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not (run / seen).exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        process.kill()
        process.wait()
        stage = seen.split("/")[1].removesuffix(".partial")
        assert (run / seen).exists() and not (run / "round-00" / stage).exists(), seen
    again = strop(tiny_recipe, "name=killed", "rounds=1")
    assert again.returncode == 0, again.stderr
    assert "round-00/sft: resumed at step" in again.stdout and "round-00/sample: done before, kept" in again.stdout
    assert largest_difference(run / "final", tmp_path / "runs" / "whole" / "final") == 0.0


@pytest.mark.parametrize("argument, message", [
    ("model.path=/nowhere", "model.path=/nowhere: no such folder"),
    ("data.sources.0.path=gone.jsonl", "gone.jsonl: no such file"),
    ("sft.max_length=3", "sft.parquet: no row is left to train on"),
])
def test_a_users_mistake_is_a_line_and_no_traceback(tiny_recipe, argument, message):
    done = strop(tiny_recipe, argument, "rounds=1")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(errors) == 1 and message in errors[0] and "Traceback" not in done.stderr
