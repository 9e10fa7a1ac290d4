"""Self-distillation on the model's own corrections: answers that it got wrong, rewritten by what their scorers said
(the error feedback of Llama 3's code data, arXiv 2407.21783, section 4.3.1)."""

from strop.trainer.method_recipes import SelfDistillRecipe
from strop.trainer.methods.run import Run
from strop.trainer.run.artifacts import Artifact


def self_distill(run: Run, recipe: SelfDistillRecipe) -> Artifact:
    """Runs recipe.rounds rounds and returns the published model, a folder that plain transformers loads.

    A round samples K completions per prompt from the promoted weights, scores them, has the same weights revise those
    that are not correct, and scores the revisions. SFT learns a prompt's best completion or revision; DPO prefers a
    revision that is correct to the completion that it revises.
    """
    weights, history = run.start, []
    prompts = run.prompts()
    run.evaluate(recipe.evaluate, prompts, {"base": weights}, name="baseline")
    for _ in run.rounds(recipe.rounds):
        drawn = run.sample(recipe.sample, weights, prompts, name="draft", score=recipe.score)
        scores = run.score(recipe.score, drawn, prompts, name="draft-score")
        corrected = run.revise(recipe.revise, weights, drawn, prompts, scores)
        samples = run.gather({"drawn": drawn, "corrected": corrected}, "sample")
        history.append((samples, run.score(recipe.score, samples, prompts)))
        selected = run.select(recipe.select, prompts, history, corrections=True)

        candidates, trained = {"start": weights}, {}
        policy = weights if recipe.sft.start == "previous" else run.start
        if recipe.sft.enabled:
            trained["sft"] = run.sft(recipe.sft, selected, policy, prompts)
            policy = candidates["sft"] = trained["sft"].model
        if recipe.dpo.enabled:
            reference = {"sft": policy, "base": run.start, "previous": weights}[recipe.dpo.reference]
            trained["dpo"] = run.prefer(recipe.dpo, selected, policy, reference, prompts)
            candidates["dpo"] = trained["dpo"].model
        candidates["merge"] = run.merge(recipe.merge, weights, trained).model

        run.evaluate(recipe.evaluate, prompts, candidates)
        weights = run.promote(recipe.merge, candidates)
    return run.publish(weights)
