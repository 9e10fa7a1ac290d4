"""Method warp: two anchored runs from the same weights, merged and drawn back towards them, in every round."""

import pytest
import torch
from test_online import recipe_file
from training import weights_of

from strop.trainer.cli import load_recipe
from strop.trainer.errors import UserError
from strop.trainer.methods.running import plan, train
from strop.trainer.models import averaging
from strop.trainer.run.console import Console

KEYS = {"rounds": 2, "online.steps": 2, "merge.max_cut_rise": 1.0}


@pytest.fixture
def recipe(tiny_recipe):
    return load_recipe(recipe_file(tiny_recipe, "warp", lr=1e-2), KEYS)


def test_its_stages_are_the_papers(recipe):
    made = {s["stage"]: s["inputs"] for s in plan(recipe)}
    for at, start in (("round-00", "outside"), ("round-01", "round-00/merge/model")):
        for name in ("online-0", "online-1"):
            assert made[f"{at}/{name}"]["policy"] == start and "reference" not in made[f"{at}/{name}"]
        assert made[f"{at}/merge"] == {"start": start} | {f"trained.{name}": f"{at}/{name}"
                                                           for name in ("online-0", "online-1")}
    assert (recipe.online.anchor, recipe.online.ema_decay, recipe.merge.interpolate) == ("ema", 0.99, 0.3)
    for key, value in (("merge.members", ["sft", "dpo"]), ("merge.method", "average"), ("dpo.lr", 0.5)):
        with pytest.raises(UserError, match="is not read by method warp"):
            load_recipe(recipe, {key: value})


@pytest.mark.slow
def test_a_round_begins_with_the_merged_weights(recipe):
    threads = torch.get_num_threads()
    run = train(recipe, console=Console(enabled=False))
    torch.set_num_threads(threads)
    start = weights_of(run.dir / "round-00/merge/model")
    a, b = (weights_of(run.dir / f"round-01/online-{i}/model") for i in (0, 1))
    merged = weights_of(run.dir / "round-01/merge/model")
    assert any(not torch.equal(a[name], b[name]) for name in a)
    for name, tensor in merged.items():
        expected = averaging.toward(start[name], averaging.warp(start[name], a[name], b[name], 0.5), 0.3)
        torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-7)
    assert [p["promoted"] for p in run.promotions] == ["merge", "merge"]
    rows = [run.table(f"round-00/online-{i}/rollouts", "step-000001")["prompt_id"].to_pylist() for i in (0, 1)]
    assert rows[0] != rows[1]  # each has its own order of prompts
