"""The method, top-down: prompts, then rounds of sample, score, select, SFT, DPO, merge, evaluate.

Every `run.stage(...)` gives an artifact: the one that stands if it is fresh, else a new one. The same code plans: then
nothing runs and an artifact that is yet to be made has no hash.
"""

from strop.trainer.chat import read_template
from strop.trainer.config import Recipe
from strop.trainer.models import Base
from strop.trainer.prompts import prompts as make_prompts
from strop.trainer.stages.dpo import check_loss, dpo
from strop.trainer.stages.evaluate import evaluate
from strop.trainer.stages.final import final
from strop.trainer.stages.merge import merge
from strop.trainer.stages.reference import reference
from strop.trainer.stages.sample import sample
from strop.trainer.stages.score import score
from strop.trainer.stages.select import select
from strop.trainer.stages.sft import sft
from strop.trainer.store import Artifact, Store, external, read_json, write_json


def run_recipe(run: Store, recipe: Recipe, base: Base) -> Artifact:
    """Runs all rounds and returns the final artifact: a folder that plain transformers loads."""
    keys = stage_keys(recipe)
    if recipe.dpo.enabled:
        check_loss(recipe.dpo)
    weights = start = external(base.path) if base.path.exists() else Artifact(base.path, None)
    prompts = first = None
    standing = {}  # evaluations: weight hash -> (evaluate artifact, name of the candidate in it)
    if recipe.data.sources:
        files = {s.name: external(s.path) for s in recipe.data.sources if s.path}
        prompts = run.stage("prompts", make_prompts, recipe, keys["prompts"], depends=files)
        first = run.stage("baseline", evaluate, recipe, keys["evaluate"], True, prompts=prompts,
                          candidates={"base": start})
        standing[start.hash] = (first, "base")
    history, promotions = [], []
    for r in range(recipe.rounds):
        name = f"round-{r:02}"
        if not run.plan:
            run.console.heading(f"round {r + 1} of {recipe.rounds}")
        if recipe.data.sources:
            samples = run.stage(f"{name}/sample", sample, recipe, keys["sample"], True, round=r, model=weights,
                                prompts=prompts)
            scores = run.stage(f"{name}/score", score, recipe, keys["score"], prompts=prompts, sample=samples)
            history.append((samples, scores))
        ready = {f"ready.{d.name}": external(d.path) for d in recipe.data.sft + recipe.data.preferences
                 if d.rounds == "all" or r in d.rounds}
        selected = run.stage(f"{name}/select", select, recipe, keys["select"], depends=ready, round=r,
                             prompts=prompts, history=history, model=start)

        tuned = aligned = None
        policy = weights if recipe.sft.start == "previous" else start
        if recipe.sft.enabled:
            tuned = run.stage(f"{name}/sft", sft, recipe, keys["sft"], True, select=selected, start=policy)
            policy = tuned.sub("model")
        if recipe.dpo.enabled:
            refer = {"sft": policy, "base": start, "previous": weights}[recipe.dpo.reference]
            table = run.stage(f"{name}/reference", reference, recipe, keys["reference"], True, select=selected,
                              model=refer)
            aligned = run.stage(f"{name}/dpo", dpo, recipe, keys["dpo"], True, select=selected, policy=policy,
                                reference=table, same_weights=refer.hash == policy.hash)
        merged = run.stage(f"{name}/merge", merge, recipe, keys["merge"], start=weights, sft=tuned, dpo=aligned)

        stops = {"start": weights, "sft": tuned and tuned.sub("model"), "dpo": aligned and aligned.sub("model"),
                 "merge": merged.sub("model")}
        stops = {stop: artifact for stop, artifact in stops.items() if artifact}
        if prompts:
            fresh = {a.hash or stop: stop for stop, a in reversed(stops.items())}  # equal weights: the first name stays
            fresh = {stop: stops[stop] for key, stop in fresh.items() if key not in standing}
            evaluated = run.stage(f"{name}/evaluate", evaluate, recipe, keys["evaluate"], True, prompts=prompts,
                                  candidates=dict(sorted(fresh.items())), start=start)
            standing |= {artifact.hash: (evaluated, stop) for stop, artifact in fresh.items()}
        chosen = promote(run, recipe, stops, standing)
        weights = stops[chosen]
        promotions.append({"round": r, "promoted": chosen, "hash": weights.hash, "candidates": {
            stop: [str(standing[a.hash][0].path.relative_to(run.run_dir)), standing[a.hash][1]]
            for stop, a in stops.items() if a.hash in standing}})
        if not run.plan and run.world.first:
            write_json(run.run_dir / "promotions.json", promotions)
            run.console.line(f"{name}: promoted {chosen}")
    run.verify([evaluated for evaluated, _ in standing.values()])
    last = run.stage("final", final, recipe, keys["final"], weights=weights, prompts=prompts,
                     base_name=base.name, license=base.license,
                     base_hash=start.hash, from_gguf=base.from_gguf, promotions=promotions)
    run.verify(last)
    return last


def promote(run: Store, recipe: Recipe, stops: dict[str, Artifact], standing: dict) -> str:
    """The name of the weights that go on: the best pass rate on the validation split, later ones winning ties."""
    if recipe.merge.promote == "last" or any(a.hash not in standing or a.hash is None for a in stops.values()):
        return "merge"

    def rate(stop: str) -> float:
        artifact, candidate = standing[stops[stop].hash]
        run.verify(artifact)
        return read_json(artifact.path / "summary.json")[candidate]["validation"]["pass_rate"]

    return max(reversed(stops), key=rate)


def stage_keys(recipe: Recipe) -> dict[str, dict]:
    """For each stage all of the recipe that its result depends on; a change there makes it and what follows stale."""
    r = recipe.model_dump(mode="json")
    sources = [{k: v for k, v in s.items() if k != "share"} for s in r["data"]["sources"]]
    shares = {s["name"]: s["share"] for s in r["data"]["sources"]}
    data, path = r["data"], r["model"]["chat_template"]
    template = {"chat_template": path and read_template(path)}
    numbers = {"dtype": r["dtype"], "device": r["device"]}
    training = numbers | {"attention": r["attention"]}
    dpo_rows = {k: r["dpo"][k] for k in ("max_tokens", "max_length", "mask_template_tokens", "epochs", "batch_size")}
    asking = {k: r["filter"][k] for k in ("near_duplicates", "decontaminate", "max_repetition")}
    merging = {k: v for k, v in r["merge"].items() if k != "promote"}
    evaluating = {k: v for k, v in r["evaluate"].items() if k != "bootstrap"}
    return {
        "prompts": {"sources": sources, "shares": shares, "validation": data["validation"], "test": data["test"],
                    "max_bad_rows": data["max_bad_rows"], "filter": asking, "seed": r["seed"]},
        "evaluate": {"evaluate": evaluating, "score": r["score"], **template, **numbers},
        "sample": {"sample": r["sample"], "shares": shares, "seed": r["seed"], **template, **numbers},
        "score": {"score": r["score"]},
        "select": {"select": r["select"], "filter": r["filter"], "sft": data["sft"], "preferences": data["preferences"],
                   "seed": r["seed"], "max_bad_rows": data["max_bad_rows"], **template},
        "sft": {"sft": r["sft"], "lora": r["lora"], "seed": r["seed"], **training},
        "reference": {"dpo": dpo_rows, "seed": r["seed"], **training},
        "dpo": {"dpo": r["dpo"], "lora": r["lora"], "seed": r["seed"], **training},
        "merge": {"merge": merging},
        "final": {k: v for k, v in r.items() if k not in ("output_dir", "log", "threads")},
    }
