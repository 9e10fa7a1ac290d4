"""InstructGPT (Ouyang et al. 2022, arXiv 2203.02155) beside the best of n by the same reward model (Stiennon et al.
2020, arXiv 2009.01325). docs/methods.md sets it beside the paper."""

from strop.trainer.method_recipes import InstructGptRecipe
from strop.trainer.methods.run import Run
from strop.trainer.run.artifacts import Artifact


def instructgpt(run: Run, recipe: InstructGptRecipe) -> Artifact:
    """Returns the published model, a folder that plain transformers loads.

    SFT on demonstrations, a reward model from the SFT weights on ranked answers of theirs, and online training against
    it with a KL penalty to the SFT weights (section 3.5). Then the SFT weights and the policy answer the test prompts,
    and the comparison draws the best of n by the reward model and the policy, by what the scorers of data.sources say.
    """
    prompts = run.prompts()
    run.evaluate(recipe.evaluate, prompts, {"base": run.start}, name="baseline")
    for _ in run.rounds(recipe.rounds):
        samples = run.sample(recipe.sample, run.start, prompts, score=recipe.score)
        demonstrations = run.select(recipe.select, prompts, [(samples, run.score(recipe.score, samples, prompts))],
                                    without="pairs")
        tuned = run.sft(recipe.sft, demonstrations, run.start, prompts).model

        answers = run.sample(recipe.annotate, tuned, prompts, name="answers", score=recipe.score)
        ranked = run.score(recipe.score, answers, prompts, name="annotations")
        preferences = run.select(recipe.select, prompts, [(answers, ranked)], name="preferences", without="sft")
        reward = {"reward": run.reward(recipe.reward, preferences, tuned, [(answers, preferences)]).model}
        policy = run.online(recipe.online, tuned, prompts, models=reward).model

        compared = run.sample(recipe.compare, {"sft": tuned, "online": policy}, prompts, name="compared", split="test")
        scores = run.score(recipe.score, compared, prompts, name="compared-scores")
        rewards = run.score(recipe.score, compared, prompts, name="compared-rewards", models=reward)
        run.compare(prompts, compared, scores, rewards, tuned, {"online": policy})

        candidates = {"start": run.start, "sft": tuned, "online": policy}
        run.evaluate(recipe.evaluate, prompts, candidates)
        weights = run.promote(recipe.merge, candidates)
    return run.publish(weights)
