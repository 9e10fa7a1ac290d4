"""Online AI feedback (OAIF, Guo et al. 2024, arXiv 2402.04792): DPO on pairs that the policy itself writes."""

from strop.trainer.method_recipes import OnlineDpoRecipe
from strop.trainer.methods.run import Run
from strop.trainer.run.artifacts import Artifact


def online_dpo(run: Run, recipe: OnlineDpoRecipe) -> Artifact:
    """Returns the published model, a folder that plain transformers loads.

    Each step draws prompts, samples two completions of each from the current weights, lets the scorers (in the paper a
    judge) label them, and takes a DPO step against the start weights. The result is promoted if it is better than the
    start weights on the validation split.
    """
    prompts = run.prompts()
    run.evaluate(recipe.evaluate, prompts, {"base": run.start}, name="baseline")
    weights = run.start
    for _ in run.rounds(recipe.rounds):
        trained = run.online(recipe.online, weights, prompts)
        candidates = {"start": weights, "online": trained.model}
        run.evaluate(recipe.evaluate, prompts, candidates)
        weights = run.promote(recipe.merge, candidates)
    return run.publish(weights)
