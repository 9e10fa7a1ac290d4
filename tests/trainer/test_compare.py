"""`strop compare`: what differs, pass rates paired by prompt, and cost."""

import io
import re
import shutil

import pyarrow as pa
import pytest
import yaml
from runs import make_run

from strop.trainer.errors import UserError
from strop.trainer.reports.compare import compare, differences
from strop.trainer.reports.reading import read_run
from strop.trainer.reports.statistics import gain
from strop.trainer.run.console import Console
from strop.trainer.run.files import read_json, write_json
from strop.trainer.run.tables import read_table, write_table


@pytest.fixture
def two(tmp_path):
    """A run, and another one with other keys whose final weights are right where the first one's were wrong."""
    a = make_run(tmp_path / "a")
    b = tmp_path / "b"
    shutil.copytree(a, b)
    config = yaml.safe_load((b / "config.yaml").read_text())
    config |= {"name": "other", "seed": 4, "dpo": {"enabled": True, "beta": 0.3}}
    (b / "config.yaml").write_text(yaml.safe_dump(config))
    path = b / "round-01/evaluate/results.parquet"
    rows = read_table(path).to_pylist()
    for row in rows:
        row["correct"] = row["correct"] or row["candidate"] == "dpo"
    write_table(path, pa.Table.from_pylist(rows))
    manifest = read_json(b / "round-01/sft/manifest.json")
    write_json(b / "round-01/sft/manifest.json", manifest | {"seconds": 385.0})
    return a, b


def table(runs):
    console = Console(file=io.StringIO(), plain=True)
    compare(console, *map(str, runs))
    return console.file.getvalue()


def row(text, *start):
    """Cells of the first line that starts with these cells."""
    lines = [re.split(r"\s{2,}", line) for line in text.splitlines()]
    return next(cells for cells in lines if cells[:len(start)] == list(start))


def test_keys_that_differ_and_no_others(two):
    text = table(two)
    assert row(text, "seed") == ["seed", "3", "4"] and row(text, "dpo.beta") == ["dpo.beta", "-", "0.3"]
    assert differences([read_run(p) for p in two]) == [("seed", [3, 4]), ("dpo.beta", ["-", 0.3])]
    assert "warning" not in text


def test_pass_rates_are_paired_by_prompt(two):
    text = table(two)
    before = read_json(two[0] / "round-01/evaluate/summary.json")["dpo"]["test"]["pass_rate"]
    assert row(text, "weights") == ["weights", "round 1 dpo", "round 1 dpo"]
    assert row(text, "prompts") == ["prompts", "160", "160"]
    assert row(text, "pass rate")[1].startswith(f"{100 * before:.1f} % [")
    assert row(text, "pass rate")[2].startswith("100.0 % [")
    assert row(text, "over demo")[1] == "-" and row(text, "over demo")[2].startswith(f"{100 * (1 - before):+.1f} [")
    assert row(text, "prompts in common") == ["prompts in common", "-", "160"]
    assert row(text, "", "sums")[3] == row(text, "", "products")[3] != row(text, "", "sums")[2]


def test_cost_is_that_of_the_manifests(two):
    text = table(two)
    assert row(text, "time in stages") == ["time in stages", "10:24", "15:24"]  # 300 s more of SFT
    assert row(text, "", "training") == ["", "training", "5:08", "10:08"]
    assert row(text, "sampled tokens") == ["sampled tokens", "54,000", "54,000"]
    assert row(text, "trained tokens") == ["trained tokens", "10,000", "10,000"]
    assert row(text, "optimizer steps") == ["optimizer steps", "160", "160"]  # of SFT and of DPO
    assert row(text, "state") == ["state", "finished", "finished"]


def test_prompts_that_only_one_run_has_are_left_out_of_the_difference():
    old = {"p1": True, "p2": False, "p3": False, "gone": True}
    new = {"p1": True, "p2": True, "p3": False, "new": False}
    found = gain(new, old, 2000)
    assert found["n"] == 3 and found["gain"] == pytest.approx(1 / 3) and found["low"] == 0.0 < found["high"] <= 1.0
    assert gain(new, {"x": True}, 10) is None


def test_keys_that_change_the_measure_are_said(two):
    config = yaml.safe_load((two[1] / "config.yaml").read_text())
    config["evaluate"]["max_new_tokens"] = 8
    (two[1] / "config.yaml").write_text(yaml.safe_dump(config))
    assert "warning: evaluate.max_new_tokens differ: the pass rates below are not comparable" in table(two)


def test_a_run_without_results_and_the_same_run_twice(two, tmp_path):
    young = make_run(tmp_path / "young", until="prompts")
    text = table([two[0], young])
    assert str(young) in text and "not evaluated yet" in text  # both are called demo: told apart by their paths
    with pytest.raises(UserError, match="the same run twice"):
        table([two[0], two[0]])
