"""Stage functions called with a whole recipe, as the methods' verbs call them with its sections."""

from dataclasses import replace
from pathlib import Path

from strop.trainer.data.samples import Judging
from strop.trainer.stages import evaluate as evaluate_stage
from strop.trainer.stages import merge as merge_stage
from strop.trainer.stages import online as online_stage
from strop.trainer.stages import preference, publish, results
from strop.trainer.stages import prompts as prompts_stage
from strop.trainer.stages import reference as reference_stage
from strop.trainer.stages import reward as reward_stage
from strop.trainer.stages import sample as sample_stage
from strop.trainer.stages import score as score_stage
from strop.trainer.stages import select as select_stage
from strop.trainer.stages import sft as sft_stage


def prompts(stage, recipe):
    prompts_stage.prompts(stage, data=recipe.data, filter=recipe.filter, seed=recipe.seed,
                          rules={s.name: [(c.rule, c.args) for c in s.scoring if c.rule] for s in recipe.data.sources},
                          files={s.name: s.path for s in recipe.data.sources if s.path})


def sample(stage, recipe, *, round, model, prompts):
    sample_stage.sample(stage, sample=recipe.sample, model=recipe.model, compute=recipe, seed=recipe.seed, round=round,
                        shares={s.name: s.share for s in recipe.data.sources}, weights=model, prompts=prompts)


def scoring(recipe) -> dict:
    sources = recipe.data.sources
    files = {c.python.rpartition(":")[0] for s in sources for c in s.scoring if c.python}
    return {"scorers": {s.name: s.scoring for s in sources},
            "columns": {s.name: (s.prompt_column, s.answer_column, s.prompt_template) for s in sources},
            "files": {file: Path(file) for file in files}}


def weights_of(recipe) -> dict:
    return {s.name: {c.name: c.weight for c in s.scoring} for s in recipe.data.sources}


def score(stage, recipe, **inputs):
    score_stage.score(stage, score=recipe.score, **scoring(recipe), **inputs)


def sources_of(recipe):
    return {s.name: {"prompt_template": s.prompt_template, "templated": s.templated} for s in recipe.data.sources}


def select(stage, recipe, *, model, **inputs):
    select_stage.select(stage, select=recipe.select, score=recipe.score, weights=weights_of(recipe),
                        filter=recipe.filter, data=recipe.data, model=recipe.model, sources=sources_of(recipe),
                        seed=recipe.seed, tokenizer=model, rows=recipe.dpo.rows,
                        files={kind: {d.name: d.path for d in getattr(recipe.data, kind) if d.used_in(inputs["round"])}
                               for kind in ("sft", "preferences")}, **inputs)


def rules(recipe):
    return select_stage.Rules(recipe.select, recipe.filter, recipe.seed, judging(recipe),
                              rows=recipe.dpo.rows)


def judging(recipe):
    return Judging(weights_of(recipe), recipe.select.by, recipe.score.correct_by, recipe.score.correct_at)


def training(recipe) -> dict:
    return {"lora": recipe.lora, "model": recipe.model, "compute": recipe, "log": recipe.log, "seed": recipe.seed}


def sft(stage, recipe, **inputs):
    sft_stage.sft(stage, sft=recipe.sft, **training(recipe), **inputs)


def dpo(stage, recipe, **inputs):
    preference.dpo(stage, dpo=recipe.dpo, **training(recipe), **inputs)


def reward(stage, recipe, **inputs):
    reward_stage.reward(stage, reward=recipe.reward, **training(recipe), **({"history": []} | inputs))


def online(stage, recipe, **inputs):
    online_stage.online(stage, online=recipe.online, **training(recipe), score=recipe.score, **scoring(recipe),
                        weights=weights_of(recipe), shares={s.name: s.share for s in recipe.data.sources}, **inputs)


def reference(stage, recipe, *, select, model):
    reference_stage.reference(stage, dpo=recipe.dpo, model=recipe.model, compute=recipe, seed=recipe.seed,
                              select=select, weights=model, rows=recipe.dpo.rows,
                              mismatches=recipe.dpo.loss == "kto")


def merge(stage, recipe, *, start, sft, dpo):
    trained = {name: folder for name, folder in (("sft", sft), ("dpo", dpo)) if folder}
    merge_stage.merge(stage, merge=recipe.merge, start=start, trained=trained)


def members_of(recipe, start, sft, dpo):
    return merge_stage.members_of(recipe.merge, start, {n: f for n, f in (("sft", sft), ("dpo", dpo)) if f})


def held_out(stage, recipe, **inputs):
    evaluate_stage.held_out(stage, evaluate=recipe.evaluate, model=recipe.model, compute=recipe, **inputs)


def evaluate(stage, recipe, **inputs):
    results.evaluate(stage, score=recipe.score, weights=weights_of(recipe), **scoring(recipe), **inputs)


def measure(stage, recipe, *, prompts, candidates, start=None):
    """Both stages of an evaluation, the first one in a folder beside the second's; returns the first."""
    folder = stage.dir.with_name(f"{stage.dir.name}-held-out")
    folder.mkdir(exist_ok=True)
    first = replace(stage, dir=folder, counts={})
    held_out(first, recipe, prompts=prompts, candidates=candidates, **({"start": start} if start else {}))
    if stage.world.size == 1 or (folder / "completions.parquet").exists():
        evaluate(stage, recipe, prompts=prompts, candidates=candidates, completions=folder)
    return first


def final(stage, recipe, **inputs):
    publish.publish(stage, recipe=recipe, bootstrap=recipe.evaluate.bootstrap, scorers={}, **inputs)
