"""Nemotron-4 340B's alignment (NVIDIA 2024, arXiv 2406.11704, section 3). docs/methods.md sets it beside the paper."""

from strop.trainer.method_recipes import NemotronRecipe
from strop.trainer.methods.run import Run
from strop.trainer.run.artifacts import Artifact


def nemotron(run: Run, recipe: NemotronRecipe) -> Artifact:
    """Runs recipe.rounds rounds and returns the published model, a folder that plain transformers loads.

    Round 0 is SFT on code and then on the rest, round 1 DPO, and each later one RPO, whose targets are the differences
    in score. DPO and RPO start from the weights so far, which are also their reference, on pairs of completions that
    these weights and those before them wrote.
    """
    weights, history = run.start, []
    prompts = asked = run.prompts()
    run.evaluate(recipe.evaluate, prompts, {"base": weights}, name="baseline")
    if recipe.write_prompts.enabled:
        asked = run.write_prompts(recipe.write_prompts, weights, prompts)
    for n in run.rounds(recipe.rounds):
        samples = run.sample(recipe.sample, weights, asked, score=recipe.score)
        history.append((samples, run.score(recipe.score, samples, asked)))
        candidates = {"start": weights}
        if n == 0:
            policy = weights
            if recipe.code.enabled:
                best = run.select(recipe.select, asked, history, name="code-best", without="pairs",
                                  only=recipe.code_mix)
                policy = candidates["code"] = run.sft(recipe.code, best, policy, prompts, name="code").model
            best = run.select(recipe.select, asked, history, name="sft-best", without="pairs", only=recipe.general_mix)
            candidates["sft"] = run.sft(recipe.sft, best, policy, prompts).model
        else:
            pairs = run.select(recipe.select, asked, history, name="pairs", without="sft")
            name, section = ("dpo", recipe.dpo) if n == 1 else ("rpo", recipe.rpo)
            candidates[name] = run.prefer(section, pairs, weights, weights, prompts, name=name).model
        run.evaluate(recipe.evaluate, prompts, candidates)
        weights = run.promote(recipe.merge, candidates)
    return run.publish(weights)
