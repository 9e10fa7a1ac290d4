"""WARP: weight averaged rewarded policies (Ramé et al. 2024, arXiv 2406.16768). docs/methods.md sets it beside the
paper."""

from strop.trainer.method_recipes import WarpRecipe
from strop.trainer.methods.run import Run
from strop.trainer.run.artifacts import Artifact


def warp(run: Run, recipe: WarpRecipe) -> Artifact:
    """Runs recipe.rounds rounds and returns the published model, a folder that plain transformers loads.

    In each round two policies are trained online from the same weights, each with its own order of prompts and its own
    EMA as the anchor of its KL penalty. Spherical interpolation merges their differences to the start, and a step back
    towards the start gives the weights that the next round begins with.
    """
    weights, prompts = run.start, run.prompts()
    run.evaluate(recipe.evaluate, prompts, {"base": weights}, name="baseline")
    for _ in run.rounds(recipe.rounds):
        trained = {name: run.online(recipe.online, weights, prompts, name=name, seed=recipe.seed + i)
                   for i, name in enumerate(("online-0", "online-1"))}
        section = recipe.merge.model_copy(update={"members": list(trained)})
        merged = run.merge(section, weights, trained).model
        candidates = {"start": weights} | {name: made.model for name, made in trained.items()} | {"merge": merged}
        run.evaluate(recipe.evaluate, prompts, candidates)
        weights = run.promote(recipe.merge, candidates)
    return run.publish(weights)
