"""The experiment of replacing against accumulating data, with tiny settings."""

import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

from strop.trainer.run.tables import read_table

sys.path.append(str(Path(__file__).parents[2]))
from benchmarks import collapse


@pytest.mark.slow
def test_one_command_makes_runs_table_and_figure(tiny_recipe, tmp_path):
    threads = torch.get_num_threads()
    collapse.main([str(tiny_recipe), "sample.prompts=12", "sample.k=4", "sft.batch_size=8"])
    torch.set_num_threads(threads)
    folder = tmp_path / "runs"
    rows = {way: read_table(folder / f"collapse-{way}" / "round-03/select/sft.parquet").to_pylist()
            for way in collapse.WAYS}
    assert {row["origin"] for row in rows["replace"]} == {"round-03"}
    assert {row["origin"] for row in rows["accumulate"]} == {f"round-{r:02}" for r in range(4)}
    text = (folder / "collapse" / "collapse.md").read_text()
    assert [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| ")] == [
        "| round", "| 0", "| 1", "| 2", "| 3", "| 4"]
    figure = ElementTree.parse(folder / "collapse" / "collapse.svg").getroot()
    assert len([e for e in figure if e.tag.endswith("svg")]) == 3
