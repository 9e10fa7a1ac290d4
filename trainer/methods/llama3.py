"""Llama 3's post-training (Dubey et al. 2024, arXiv 2407.21783, section 4). docs/methods.md sets it beside the
paper."""

from strop.trainer.method_recipes import Llama3Recipe
from strop.trainer.methods.run import Run
from strop.trainer.run.artifacts import Artifact


def llama3(run: Run, recipe: Llama3Recipe) -> Artifact:
    """Runs recipe.rounds rounds and returns the published model, a folder that plain transformers loads.

    A round collects preferences on answers of the best weights so far, trains a reward model on all preferences and
    SFT on the best of K completions by that model, both from the start weights, and DPO on the newest preferences from
    the SFT weights. Each of the three is an average over runs. The best candidate on the validation split goes on.
    """
    prompts, weights, annotated, groups, drawn = run.prompts(), run.start, [], [], []
    run.evaluate(recipe.evaluate, prompts, {"base": weights}, name="baseline")
    for _ in run.rounds(recipe.rounds):
        annotated.append(annotate(run, recipe, weights, prompts))
        everything = run.select(recipe.select, prompts, annotated, name="preferences", without="sft", so_far=True)
        newest = run.select(recipe.select, prompts, annotated[-1:], name="newest", without="sft")
        groups.append((annotated[-1][0], newest))
        reward = run.average("reward", [run.reward(section, everything, run.start, groups, **how)
                                        for section, how in recipe.runs("reward")])

        samples = run.sample(recipe.sample, weights, prompts)
        rewards = run.score(recipe.score, samples, prompts, name="rewards", models={"reward": reward.model})
        drawn.append((samples, rewards))
        best = run.select(recipe.select, prompts, drawn, name="best", rewards=["reward"], without="pairs")
        sft = run.average("sft", [run.sft(section, best, run.start, prompts, **how)
                                  for section, how in recipe.runs("sft")])

        dpo = run.average("dpo", [run.prefer(section, newest, sft.model, sft.model, prompts, **how)
                                  for section, how in recipe.runs("dpo")])
        candidates = {"start": weights, "sft": sft.model, "dpo": dpo.model}
        run.evaluate(recipe.evaluate, prompts, candidates)
        weights = run.promote(recipe.merge, candidates)
    return run.publish(weights)


def annotate(run: Run, recipe: Llama3Recipe, weights: Artifact, prompts: Artifact) -> tuple[Artifact, Artifact]:
    """(answers, scores): a few answers to each prompt and, with recipe.revise, edits of those that pairs chose."""
    answers = run.sample(recipe.annotate, weights, prompts, name="answers", score=recipe.score)
    scores = run.score(recipe.score, answers, prompts, name="annotations")
    if recipe.revise is None:
        return answers, scores
    chosen = run.select(recipe.select, prompts, [(answers, scores)], name="chosen", without="sft")
    edits = run.revise(recipe.revise, weights, answers, prompts, scores, name="edits", chosen=chosen)
    edited = run.gather({"drawn": answers, "edited": edits}, "edited")
    return edited, run.score(recipe.score, edited, prompts, name="edited-annotations")
