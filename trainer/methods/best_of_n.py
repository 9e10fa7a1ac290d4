"""Best of n: K scored samples per prompt, from which `strop best-of` estimates what the best of n is worth."""

from strop.trainer.method_recipes import BestOfNRecipe
from strop.trainer.methods.run import Run
from strop.trainer.run.artifacts import Artifact


def best_of_n(run: Run, recipe: BestOfNRecipe) -> Artifact:
    """Returns the selection of the start weights' best samples. Nothing is trained: this is the policy that training on
    the best of K imitates."""
    prompts = run.prompts()
    for _ in run.rounds(recipe.rounds):
        samples = run.sample(recipe.sample, run.start, prompts, score=recipe.score)
        selected = run.select(recipe.select, prompts, [(samples, run.score(recipe.score, samples, prompts))])
    return selected
