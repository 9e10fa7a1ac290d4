"""Out of memory in a training step: the step runs again in smaller microbatches and ends with the same weights."""

import json
import os
import subprocess
import sys

import pytest
import torch
from stagecalls import dpo, reference, sft
from test_training import run_sft
from training import Log, largest_difference, recipe_of, select_of, stage_in

from strop.kernels import Group
from strop.trainer.errors import UserError
from strop.trainer.main import main
from strop.trainer.run.console import Console
from strop.trainer.training.batch import Example, microbatches
from strop.trainer.training.logprobs import Scorer


class FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.fixture(params=["forward", "backward", "the host"])
def small_memory(request, monkeypatch):
    """Sets the most tokens of a microbatch that memory holds; returns the sizes that failed. Backward fails behind the
    layers' first gradients."""
    failed, real = [], Scorer.hidden

    def set_limit(limit: int) -> list[int]:
        def hidden(self, groups):
            if groups.num_tokens <= limit or not torch.is_grad_enabled():
                return real(self, groups)
            failed.append(groups.num_tokens)
            if request.param == "forward":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            if request.param == "the host":
                raise RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory")
            layer = self.base.get_decoder().layers[0]
            handle = layer.register_forward_hook(lambda _, __, out: FailsBackward.apply(out))
            try:
                return real(self, groups)
            finally:
                handle.remove()

        monkeypatch.setattr(Scorer, "hidden", hidden)
        return failed

    return set_limit


class Heard(Console):
    def __init__(self):
        super().__init__(enabled=False)
        self.warnings = []

    def warn(self, text):
        self.warnings.append(text)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_that_runs_out_of_memory_ends_with_the_same_weights(tmp_path, tiny_model, small_memory, dtype):
    def trained(name, heard=None):
        recipe, log = recipe_of(dtype=dtype, sft={"batch_size": 6, "lr": 1e-3, "epochs": 2, "max_tokens": 64}), Log()
        stage = stage_in(tmp_path / name, "round-00/sft", log)
        stage.console = heard or stage.console
        sft(stage, recipe, select=select_of(tmp_path / "select", 12), start=tiny_model)
        return stage, log

    whole, log = trained("whole")
    failed, heard = small_memory(40), Heard()
    split, split_log = trained("split", heard)
    assert len(failed) == 1 and failed[0] > 40, "later steps begin with the smaller budget"
    assert len(heard.warnings) == 1 and f"step 1: out of memory in a microbatch of {failed[0]} tokens" in \
        heard.warnings[0] and f"at most {-(-failed[0] // 2)} (sft.max_tokens=64)" in heard.warnings[0]
    exact = {"rtol": 1e-5, "atol": 1e-6} if dtype == "float32" else {"rtol": 0.02, "atol": 0.02}
    for one, other in zip(log.rows, split_log.rows, strict=True):
        for name in ("loss", "grad_norm", "mean_token_accuracy"):
            torch.testing.assert_close(other[name], one[name], **exact)
    assert largest_difference(whole.dir / "model", split.dir / "model") < (1e-5 if dtype == "float32" else 0.02)
    assert split.counts["microbatches"] > whole.counts["microbatches"]


def test_a_resumed_stage_remembers(tmp_path, tiny_model, small_memory):
    failed = small_memory(40)
    how = {"max_tokens": 64, "batch_size": 6, "checkpoint_steps": 1}
    with pytest.raises(KeyboardInterrupt):
        run_sft(tmp_path, "run", tiny_model, Log(stop_at=2), **how)
    assert len(failed) == 1
    run_sft(tmp_path, "run", tiny_model, **how)
    assert len(failed) == 1
    run_sft(tmp_path, "run", tiny_model, **how | {"max_tokens": 63})  # another setting is tried as it is
    assert len(failed) == 2


def test_a_row_that_does_not_fit_alone_is_named(tmp_path, tiny_model, small_memory):
    small_memory(10)
    with pytest.raises(UserError) as error:
        run_sft(tmp_path, "run", tiny_model, max_tokens=64)
    said = str(error.value)
    assert "\n" not in said and "out of memory with row r0" in said and "lower sft.max_length" in said


def test_dpo_splits_between_pairs(tmp_path, tiny_model, small_memory):
    recipe = recipe_of(dpo={"batch_size": 6, "lr": 1e-3, "max_tokens": 128})
    select, table, stages = select_of(tmp_path / "select", 12), stage_in(tmp_path / "reference", "reference"), []
    reference(table, recipe, select=select, model=tiny_model)
    for name in ("whole", "split"):
        stages.append(stage_in(tmp_path / name, "round-00/dpo", Log()))
        dpo(stages[-1], recipe, select=select, policy=tiny_model, reference=table.dir, same_weights=True)
        failed = small_memory(70)
    assert failed and largest_difference(stages[0].dir / "model", stages[1].dir / "model") < 1e-5


def test_any_other_error_is_raised(tmp_path, tiny_model, monkeypatch):
    def broken(*_):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(Scorer, "hidden", broken)
    monkeypatch.setattr("strop.trainer.stages.sft.probe", lambda *_: True)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run_sft(tmp_path, "run", tiny_model)


def test_a_row_over_a_lowered_budget_is_a_microbatch_of_its_own():
    rows = [Example(str(n), Group([1], [[2] * (n - 1)])) for n in (3, 9, 2, 12)]
    assert microbatches(rows, [0, 1, 2, 3], [1] * 4, 8, 1) == [[[0, 2], [1], [3]]]


@pytest.mark.parametrize("small_memory", ["backward"], indirect=True)
def test_the_run_remembers_for_its_next_round(tiny_recipe, tmp_path, small_memory, capsys):
    failed = small_memory(120)
    assert main([str(tiny_recipe), "sft.max_tokens=256", "dpo.max_tokens=512", "sft.eval_steps=0",
                 "dpo.eval_steps=0"]) == 0
    kept = json.loads((tmp_path / "runs/tiny/max_tokens-0.json").read_text())
    assert kept.keys() <= {"sft", "dpo"} and kept
    shown = capsys.readouterr().out
    assert shown.count("out of memory in a microbatch") == len(failed)
    assert not any(f"round-01/{stage}: step 1: out of memory" in shown for stage in kept)


RANKS = """
import sys, torch
sys.path.insert(0, {tests!r})
from strop.trainer.training.logprobs import Scorer
from strop.trainer.main import main
import os
real, failed = Scorer.hidden, []
def hidden(self, groups):
    if torch.is_grad_enabled() and groups.num_tokens > {limit} and os.environ["RANK"] == "1":
        failed.append(groups.num_tokens)
        raise torch.OutOfMemoryError("CUDA out of memory")
    return real(self, groups)
Scorer.hidden = hidden
status = main(sys.argv[1:])
assert len(failed) > 0 or {limit} > 10**6 or os.environ["RANK"] == "0"
sys.exit(status)
"""


@pytest.mark.slow
def test_ranks_that_run_out_of_memory_alone_do_not_wait_forever(tiny_recipe, tmp_path):
    """Rank 1 alone runs out of memory; both end with the weights of a run that never did."""
    def run(name: str, limit: int) -> None:
        script = tmp_path / f"{name}.py"
        script.write_text(RANKS.format(tests=os.path.dirname(__file__), limit=limit))
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(script),
                   str(tiny_recipe), f"name={name}", "rounds=1", "sft.eval_steps=0", "dpo.eval_steps=0",
                   "sft.batch_size=12", "device=cpu"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr

    run("whole", 1 << 30)
    run("split", 100)  # more than any pair, less than half of a batch
    runs = tmp_path / "runs"
    assert (runs / "split/max_tokens-1.json").exists() and not (runs / "split/max_tokens-0.json").exists()
    assert largest_difference(runs / "whole/round-00/sft/model", runs / "split/round-00/sft/model") < 1e-5


def test_sampling_out_of_memory_names_the_batch_size(tiny_recipe, monkeypatch, capsys):
    """A smaller batch may round otherwise, so its size counts in the stage's key and is not changed unasked."""
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("strop.trainer.sampling.in_process.Batch.step", full)
    assert main([str(tiny_recipe), "evaluate.batch_size=6"]) == 1
    shown = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    said = "evaluate.batch_size=6: out of memory while sampling; set evaluate.batch_size=3"
    assert len(shown) == 1 and said in shown[0]
