"""Rounds of rejection sampling, SFT and DPO: the loop that the published methods have in common."""

from strop.trainer.config import Recipe
from strop.trainer.methods.run import Run
from strop.trainer.run.artifacts import Artifact


def rounds(run: Run, recipe: Recipe) -> Artifact:
    """Runs recipe.rounds rounds and returns the published model, a folder that plain transformers loads.

    A round samples K completions per prompt from the promoted weights, scores them, selects the best for SFT and
    best-worst pairs for preference training, fine-tunes, runs DPO against the SFT weights, averages weights, and
    promotes the candidate with the best validation pass rate. Without data.sources it trains on ready data alone.
    """
    weights, history = run.start, []
    asked = prompts = run.prompts() if recipe.data.sources else None
    if prompts:
        run.evaluate(recipe.evaluate, prompts, {"base": weights}, name="baseline")
    for _ in run.rounds(recipe.rounds):
        if prompts:
            if recipe.write_prompts.enabled:
                asked = run.write_prompts(recipe.write_prompts, weights, asked)
            samples = run.sample(recipe.sample, weights, asked, score=recipe.score)
            history.append((samples, run.score(recipe.score, samples, asked)))
        selected = run.select(recipe.select, asked, history)

        candidates, trained = {"start": weights}, {}
        policy = weights if recipe.sft.start == "previous" else run.start
        if recipe.sft.enabled:
            trained["sft"] = run.sft(recipe.sft, selected, policy, prompts)
            policy = candidates["sft"] = trained["sft"].model
        if recipe.dpo.enabled:
            pairs = selected
            if recipe.dpo.pairs == "policy" and prompts and policy is not weights:
                samples = run.sample(recipe.sample, policy, asked, name="dpo-sample", score=recipe.score)
                scores = run.score(recipe.score, samples, asked, name="dpo-score")
                pairs = run.select(recipe.select, asked, [(samples, scores)], name="dpo-select")
            reference = {"sft": policy, "base": run.start, "previous": weights}[recipe.dpo.reference]
            trained["dpo"] = run.prefer(recipe.dpo, pairs, policy, reference, prompts)
            candidates["dpo"] = trained["dpo"].model
        candidates["merge"] = run.merge(recipe.merge, weights, trained).model

        if prompts:
            run.evaluate(recipe.evaluate, prompts, candidates)
        weights = run.promote(recipe.merge, candidates)
    return run.publish(weights)
