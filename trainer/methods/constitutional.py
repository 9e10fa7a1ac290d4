"""Constitutional AI (Bai et al. 2022, arXiv 2212.08073): SFT on revised answers, then pairs that a model judges."""

from strop.trainer.config import Merge
from strop.trainer.method_recipes import ConstitutionalRecipe
from strop.trainer.methods.run import Run
from strop.trainer.run.artifacts import Artifact


def constitutional(run: Run, recipe: ConstitutionalRecipe) -> Artifact:
    """Returns the published model, a folder that plain transformers loads.

    Supervised stage (section 3): the start weights answer, criticize each answer by a random principle and rewrite it,
    revise.times times, and are fine-tuned on the last revisions. Preference stage (section 4): the fine-tuned weights
    answer sample.k times, the scorers of data.sources compare the answers, as a rule a judge with the start weights,
    and DPO learns from best-worst pairs. The paper trains a preference model on them and then PPO.
    """
    prompts = run.prompts()
    run.evaluate(recipe.evaluate, prompts, {"base": run.start}, name="baseline")
    for _ in run.rounds(recipe.rounds):
        drafts = recipe.sample.model_copy(update={"k": recipe.revise.per_prompt})
        answers = run.sample(drafts, run.start, prompts, name="draft")
        revised = run.revise(recipe.revise, run.start, answers, prompts)
        tuned = run.sft(recipe.sft, run.select(recipe.select, prompts, [(revised, None)], name="revised"), run.start,
                        prompts).model

        samples = run.sample(recipe.sample, tuned, prompts, score=recipe.score)
        scores = run.score(recipe.score, samples, prompts)
        pairs = run.select(recipe.select, prompts, [(samples, scores)])
        reference = {"sft": tuned, "base": run.start, "previous": run.start}[recipe.dpo.reference]
        aligned = run.prefer(recipe.dpo, pairs, tuned, reference, prompts).model

        candidates = {"start": run.start, "sft": tuned, "dpo": aligned}
        run.evaluate(recipe.evaluate, prompts, candidates)
        weights = run.promote(Merge(promote="last"), candidates)
    return run.publish(weights)
