"""Which weights a round promotes, from evaluations written by hand."""

import pytest

from strop.trainer.config import Recipe
from strop.trainer.methods.run import Run
from strop.trainer.models.folders import Base
from strop.trainer.run.artifacts import Artifact
from strop.trainer.run.console import Console
from strop.trainer.run.files import read_json, write_json
from strop.trainer.run.store import Store
from strop.trainer.run.world import World


def promote(tmp_path, measured: dict[str, tuple[float, float]], base=(0.1, 0.0), **merge):
    """The name promoted of candidates {name: (pass rate, cut share)}, and the refused ones. base: the run's start."""
    base_model = Base(tmp_path / "none", "m", True, None)
    recipe = Recipe.model_validate({"data": {"sources": [{"name": "s", "reasoning_gym": "chain_sum"}]}, "merge": merge})
    run = Run(Store(tmp_path, World(), Console(enabled=False)), recipe, base_model)
    run.start, run.round = Artifact(tmp_path / "none", "h-base"), 0
    evaluation = Artifact(tmp_path / "evaluate", "h-evaluation", {})
    evaluation.path.mkdir(exist_ok=True)
    write_json(evaluation.path / "manifest.json", {})
    found = {name: {"pass_rate": rate, "cut_share": cut, "mean_length": 5.0, "n": 100, "by_source": {}}
             for name, (rate, cut) in (measured | {"base": base}).items()}
    write_json(evaluation.path / "summary.json", {n: {"validation": f, "test": f} for n, f in found.items()})
    run.measured = {f"h-{name}": (evaluation, name) for name in (*measured, "base")}
    candidates = {name: Artifact(tmp_path / name, f"h-{name}") for name in measured}
    chosen = run.promote(run.recipe.merge, candidates)
    entry = read_json(tmp_path / "promotions.json")[0]
    assert chosen is candidates[entry["promoted"]]
    return entry["promoted"], entry.get("refused", {})


@pytest.mark.parametrize("how", ["best", "last"])
def test_weights_that_stopped_stopping_are_refused(tmp_path, how):
    found = {"start": (0.2, 0.02), "sft": (0.3, 0.1), "dpo": (0.5, 0.11), "merge": (0.4, 0.9)}
    name, refused = promote(tmp_path, found, promote=how)
    assert name == "sft" and refused.keys() == {"dpo", "merge"}
    assert refused["dpo"] == ("11.0% of its validation completions are cut by length, 0.0% before "
                              "(merge.max_cut_rise=0.1)")
    assert promote(tmp_path, found, promote=how, max_cut_rise=0.11)[0] == "dpo"
    assert promote(tmp_path, found, promote=how, max_cut_rise=1.0) == ({"best": "dpo", "last": "merge"}[how], {})


def test_the_rise_counts_from_the_lower_of_the_rounds_start_and_the_runs(tmp_path):
    found = {"start": (0.2, 0.3), "sft": (0.3, 0.35)}
    assert promote(tmp_path, found, base=(0.1, 0.5))[0] == "sft"
    assert promote(tmp_path, found, base=(0.1, 0.0))[0] == "start"  # no creeping up round by round


def test_the_start_of_the_round_may_always_go_on(tmp_path):
    assert promote(tmp_path, {"start": (0.2, 1.0), "sft": (0.9, 1.0)})[0] == "start"
    assert promote(tmp_path, {"start": (0.2, 1.0), "sft": (0.9, 0.05)}) == ("sft", {})
