"""A reward model of pairs: ready-made ones, and pairs of completions that the start weights write."""

from strop.trainer.method_recipes import RewardRecipe
from strop.trainer.methods.run import Run
from strop.trainer.run.artifacts import Artifact


def reward(run: Run, recipe: RewardRecipe) -> Artifact:
    """Returns the trained reward model, a sequence classifier with one output that plain transformers loads.

    Without data.sources it trains on data.preferences alone. With sources it samples K completions per prompt, scores
    them and adds the pairs that select makes, or with reward.pairs=all every pair of them.
    """
    prompts = run.prompts() if recipe.data.sources else None
    for _ in run.rounds(recipe.rounds):
        samples, history = None, []
        if prompts:
            samples = run.sample(recipe.sample, run.start, prompts, score=recipe.score)
            history = [(samples, run.score(recipe.score, samples, prompts))]
        selected = run.select(recipe.select, prompts, history)
        trained = run.reward(recipe.reward, selected, run.start, [(samples, selected)] if samples else [])
    return trained.model
