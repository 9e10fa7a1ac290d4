"""Predicted memory against stages that really run, and the tables that docs/memory.md shows."""

import re

import pytest

from benchmarks import fits, memory


@pytest.mark.parametrize("name", fits.TABLES)
def test_the_page_has_the_tables_that_the_command_makes(name):
    text = fits.PAGE.read_text(encoding="utf-8")
    there = re.search(f"<!-- begin {name} -->\n(.*?)<!-- end {name} -->", text, re.S)[1]
    assert there.strip() == fits.TABLES[name]().strip(), "python -m benchmarks.fits"


def test_kept_measurements_are_within_15_percent():
    rows = re.findall(r"\| ([+-]\d+)% \|$", fits.measured(), re.M)
    assert len(rows) >= 15 and max(abs(int(row)) for row in rows) <= 15


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft, 2048 tokens", "sft, LoRA", "dpo, 4096 tokens, checkpointing",
                                  "reward, random Llama", "reference, 4096 tokens", "sample, K 8"])
def test_a_stage_takes_what_is_predicted(name, tmp_path):
    case = memory.CASES[name]
    result = memory.measured(case, memory.model_of(case["model"], tmp_path / "model"), tmp_path / "case")
    real, ours = result["measured"]["growth"], sum(result["predicted"].values())
    assert ours == pytest.approx(real, rel=0.15), memory.line(name, result)
