"""The experiments that are one command each, with tiny settings."""

import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

from strop.trainer.run.tables import read_table

sys.path.append(str(Path(__file__).parents[2]))
from benchmarks import collapse, field


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


@pytest.mark.slow
def test_one_command_trains_and_evaluates_all_sides(tiny_recipe, tmp_path, capsys):
    pytest.importorskip("trl")
    arguments = [str(tiny_recipe), "rounds=1", "sample.k=16", "--seeds", "2", "--device", "cpu"]
    assert field.main(arguments) == 0
    first = capsys.readouterr().out
    assert first.count(" ...\n") == 9 and first.splitlines()[-3].startswith("TRL | ")
    folder = tmp_path / "runs/field-tiny.sides"
    ours, theirs = (json.loads((folder / f"{side}-1.json").read_text()) for side in ("strop", "trl"))
    assert ours["steps"] == theirs["steps"] and ours["losses"] == pytest.approx(theirs["losses"], rel=0.1)
    assert ours["peak_bytes"] > 1 << 20 < theirs["peak_bytes"]
    assert field.main(arguments) == 0  # all of it is kept
    assert capsys.readouterr().out == first[first.index("recipe `tiny`"):]
