"""`strop best-of`: unbiased estimates from stored samples, their bounds, and the figure."""

import io
import itertools
import math
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import make_run

from strop.trainer.errors import UserError
from strop.trainer.main import main
from strop.trainer.reports.best_of import best_of, chances, curve, kl_bound, wins_over_one
from strop.trainer.run.console import Console

SAMPLE = st.tuples(st.sampled_from([0.0, 0.5, 1.0, 2.0]), st.sampled_from([0.0, 1.0]))
SAMPLES = st.lists(SAMPLE, min_size=2, max_size=7)


def by_enumeration(samples, n):
    """Mean second value of the best of every n of the samples; equally good ones share."""
    found = []
    for drawn in itertools.combinations(samples, n):
        best = [value for score, value in drawn if score == max(s for s, _ in drawn)]
        found.append(sum(best) / len(best))
    return sum(found) / len(found)


@settings(max_examples=60, deadline=None)
@given(SAMPLES, st.data())
def test_estimates_are_the_mean_over_all_draws(samples, data):
    n = data.draw(st.integers(1, len(samples) - 1))
    table = np.array(samples)
    chance = chances(table[:, 0], n)
    assert chance.sum() == pytest.approx(1) and chance @ table[:, 1] == pytest.approx(by_enumeration(samples, n))
    wins = [by_enumeration([(s, (v > value) + 0.5 * (v == value)) for s, v in samples[:i] + samples[i + 1:]], n)
            for i, (_, value) in enumerate(samples)]
    assert wins_over_one(table, n) == pytest.approx(sum(wins) / len(wins))


def test_the_estimate_is_unbiased():
    """Of a policy that is right with probability p, whatever K was drawn: 1 - (1 - p)^n."""
    draw, p, n = np.random.default_rng(0), 0.3, 3
    found = [chances(right, n) @ right for right in (draw.random((20_000, 5)) < p).astype(float)]
    assert np.mean(found) == pytest.approx(1 - (1 - p)**n, abs=4 * np.std(found) / len(found)**0.5)


def test_bounds_and_rows():
    assert [kl_bound(n) for n in (1, 10, 30)] == pytest.approx([0.0, 1.403, 2.4345], abs=5e-4)
    rows = [{"prompt_id": f"p{p}", "sample_index": k, "score": float(p + 10 * k), "correct": k == 4}
            for p in range(3) for k in range(5)]
    rows += [{"prompt_id": "short", "sample_index": 0, "score": 1.0, "correct": True},
             {"prompt_id": "p0", "sample_index": 5, "score": None, "correct": False}]
    found = curve(rows)
    assert [r["n"] for r in found] == [1, 2, 4, 5] and {(r["prompts"], r["left_out"]) for r in found} == {(3, 1)}
    assert [r["pass_rate"] for r in found] == pytest.approx([0.2, 0.4, 0.8, 1.0])
    assert [r["win_bound"] for r in found] == pytest.approx([1 / 2, 2 / 3, 4 / 5, 5 / 6])
    assert found[0]["win_rate"] == pytest.approx(0.5) and found[-1]["win_rate"] is None  # no sample is left to beat
    assert all(r["win_rate"] <= r["win_bound"] + 1e-9 for r in found[:-1])
    assert curve([]) == [] and found[1]["kl_bound"] == pytest.approx(math.log(2) - 0.5)


def test_one_command_writes_figure_and_table(tmp_path, capsys):
    run = make_run(tmp_path / "demo")
    assert main(["best-of", str(run)]) == 0
    shown, text = capsys.readouterr().out, (run / "best_of.md").read_text()
    assert "round 00, 80 prompts" in text and "| 8 |" in text and "round 01" in shown
    figure = ElementTree.parse(run / "best_of.svg").getroot()
    assert len([e for e in figure if e.tag.endswith("svg")]) == 3
    assert "bound n/(n+1)" in (run / "best_of.svg").read_text()
    with pytest.raises(UserError, match="no scored samples"):
        best_of(Console(file=io.StringIO(), plain=True), str(make_run(tmp_path / "early", until="baseline")))


def test_the_method_samples_and_scores_and_trains_nothing(tiny_recipe, tmp_path):
    text = tiny_recipe.read_text().replace("rounds: 2", "method: best_of_n")
    keep = [line for line in text.splitlines() if not line.startswith(("sft:", "dpo:", "evaluate:"))]
    tiny_recipe.write_text("\n".join(keep))
    assert main([str(tiny_recipe)]) == 0 and main(["best-of", str(tmp_path / "runs" / "tiny")]) == 0
    assert "| 8 |" in (tmp_path / "runs" / "tiny" / "best_of.md").read_text()
    assert main([str(tiny_recipe), "sft.lr=1.0e-3"]) == 1
