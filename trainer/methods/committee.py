"""Iterative teaching committee (iTeC) and MDLOO of the Apple foundation models (arXiv 2407.21075, section 4)."""

from strop.trainer.method_recipes import CommitteeRecipe
from strop.trainer.methods.run import Run
from strop.trainer.run.artifacts import Artifact


def committee(run: Run, recipe: CommitteeRecipe) -> Artifact:
    """Runs recipe.rounds rounds and returns the published model, a folder that plain transformers loads.

    In each round all models of the committee answer the same prompts: the start weights, and the latest models of
    rejection sampling (sft), DPO and online RL. Of each prompt the best completion, whichever model wrote it, goes to
    SFT, and with the worst to DPO. Then three models are trained: SFT on the best completions, DPO on the pairs, and
    MDLOO on its own completions, the last two from the SFT model. They are the next round's committee, and the best of
    them on the validation split is promoted.
    """
    weights, history, members = run.start, [], {}
    prompts = run.prompts()
    run.evaluate(recipe.evaluate, prompts, {"base": weights}, name="baseline")
    for _ in run.rounds(recipe.rounds):
        samples = run.sample(recipe.sample, {"start": run.start} | members, prompts)
        history.append((samples, run.score(recipe.score, samples, prompts)))
        selected = run.select(recipe.select, prompts, history)

        policy = weights if recipe.sft.start == "previous" else run.start
        members = {}
        if recipe.sft.enabled:
            policy = members["sft"] = run.sft(recipe.sft, selected, policy, prompts).model
        reference = {"sft": policy, "base": run.start, "previous": weights}[recipe.dpo.reference]
        if recipe.dpo.enabled:
            members["dpo"] = run.prefer(recipe.dpo, selected, policy, reference, prompts).model
        if recipe.online.enabled:
            members["online"] = run.online(recipe.online, policy, prompts, policy).model

        candidates = {"start": weights} | members
        run.evaluate(recipe.evaluate, prompts, candidates)
        weights = run.promote(recipe.merge, candidates)
    return run.publish(weights)
