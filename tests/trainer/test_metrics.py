import io
import json
import math

import pytest

from strop.trainer.run.console import Console
from strop.trainer.run.metrics import Metrics, read_metrics, step_line


def make(run_dir, **options):
    return Metrics(run_dir, Console(file=io.StringIO()), **({"tensorboard": False} | options))


def steps(run_dir, stage):
    return [row["step"] for row in read_metrics(run_dir / "metrics.jsonl") if row["stage"] == stage]


def test_step_line_reads_well():
    values = {"grad_norm": 0.8, "loss": 1.234, "learning_rate": 1e-5, "tokens_per_second": 1234.4, "rewards/chosen": 1}
    assert (step_line("round-00/sft", 12, values, 40)
            == "round-00/sft  step 12/40  loss 1.234  lr 1.0e-05  grad_norm 0.8  1,234 tok/s")
    assert step_line("s", 1, {"loss": math.nan, "rewards/accuracies": 0.5}) == "s  step 1  loss nan  accuracy 50%"


def test_rows_are_flat_strict_json_and_the_console_has_a_line_each(tmp_path):
    metrics = make(tmp_path)
    metrics.log("round-00/sft", 1, {"loss": 2.0, "grad_norm": math.inf, "entropy": math.nan}, total=2)
    metrics.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    row = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert row.pop("time") > 1e9
    assert row == {"stage": "round-00/sft", "step": 1, "loss": 2.0, "grad_norm": None, "entropy": None}
    assert metrics.console.file.getvalue() == "round-00/sft  step 1/2  loss 2  grad_norm inf\n"


def test_a_reserved_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'step' of stage sft"):
        make(tmp_path).log("sft", 1, {"step": 3})


def test_going_back_takes_the_later_steps_of_that_stage_out(tmp_path):
    metrics = make(tmp_path)
    for step in (1, 2, 3):
        metrics.log("a", step, {"loss": step})
        metrics.log("b", step, {"loss": step})
    metrics.close()
    again = make(tmp_path)
    again.log("a", 2, {"loss": 20})
    again.log("b", 4, {"loss": 4})
    again.close()
    assert steps(tmp_path, "a") == [1, 2] and steps(tmp_path, "b") == [1, 2, 3, 4]
    assert [r["loss"] for r in read_metrics(tmp_path / "metrics.jsonl") if r["stage"] == "a"] == [1, 20]
    again = make(tmp_path)
    again.rewind("b", 0)
    again.close()
    assert steps(tmp_path, "a") == [1, 2] and steps(tmp_path, "b") == []


def test_a_line_cut_by_a_kill_is_healed(tmp_path):
    metrics = make(tmp_path)
    metrics.log("a", 1, {"loss": 1})
    metrics.close()
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"stage": "a", "step": 2, "ti')
    again = make(tmp_path)
    again.log("a", 2, {"loss": 2})
    again.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]


def test_other_ranks_write_nothing(tmp_path):
    metrics = make(tmp_path, enabled=False)
    metrics.log("a", 1, {"loss": 1})
    metrics.rewind("a", 0)
    metrics.close()
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_holds_what_the_record_holds_also_after_going_back(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = make(tmp_path, tensorboard=True)
    for step in (1, 2, 3):
        metrics.log("round-00/dpo", step, {"rewards/margins": step / 2})
    metrics.writer.close()  # the first is killed; its thread would write its file anew after ten seconds
    again = make(tmp_path, tensorboard=True)
    again.log("round-00/dpo", 3, {"rewards/margins": 7.0, "loss": math.nan})
    again.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["round-00/dpo/loss", "round-00/dpo/rewards/margins"]
    assert [(e.step, e.value) for e in events.Scalars("round-00/dpo/rewards/margins")] == [(1, 0.5), (2, 1.0), (3, 7.0)]
