"""Llama 2's rejection sampling (Touvron et al. 2023, arXiv 2307.09288, section 3). docs/methods.md sets it beside the
paper."""

from strop.trainer.method_recipes import Llama2Recipe
from strop.trainer.methods.run import Run
from strop.trainer.run.artifacts import Artifact


def llama2(run: Run, recipe: Llama2Recipe) -> Artifact:
    """Runs recipe.rounds rounds and returns the published model, a folder that plain transformers loads.

    A round collects preferences on answers of the newest weights, trains a reward model for helpfulness and one for
    safety on all preferences so far, draws K completions per prompt, and fine-tunes the newest weights on each prompt's
    best completion of all rounds by the newest reward models. There is no PPO.
    """
    prompts, weights, annotated, drawn = run.prompts(), run.start, [], []
    run.evaluate(recipe.evaluate, prompts, {"base": weights}, name="baseline")
    for _ in run.rounds(recipe.rounds):
        answers = run.sample(recipe.annotate, weights, prompts, name="answers", score=recipe.score)
        annotated.append((answers, run.score(recipe.score, answers, prompts, name="annotations")))
        models = {}
        for kind, names in recipe.about.items():
            pairs = run.select(recipe.select, prompts, annotated, name=f"{kind}-pairs", without="sft", so_far=True,
                               only=dict.fromkeys(names, 1.0))
            models[kind] = run.reward(recipe.reward, pairs, run.start, name=kind).model

        drawn.append(run.sample(recipe.sample, weights, prompts))
        pool = [(samples, run.score(recipe.score, samples, prompts, name=f"rewards-{r:02}", models=models,
                                    safety=recipe.safety)) for r, samples in enumerate(drawn)]
        best = run.select(recipe.select, prompts, pool, name="best", rewards=[*models, "reward"], without="pairs")
        tuned = run.sft(recipe.sft, best, weights, prompts)

        candidates = {"start": weights, "sft": tuned.model}
        run.evaluate(recipe.evaluate, prompts, candidates)
        weights = run.promote(recipe.merge, candidates)
    return run.publish(weights)
