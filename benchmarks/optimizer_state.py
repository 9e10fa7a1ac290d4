"""What cheaper forms of the optimizer's state cost in quality: SFT and DPO of the quickstart with each.

    python -m benchmarks.optimizer_state [--recipe quickstart] [--seeds 0 1 2] [--forms float32 int8 ...]
                                         [--runs FOLDER] [--results FILE] [--set KEY=VALUE ...]

For each seed one round up to the selection; then every form trains SFT and DPO on the same rows from the same weights.
`other order` is float32 with its rows in another order: what differs as much as that is noise. Gains are pass rates of
DPO's weights minus those of float32 on the test split, by paired bootstrap over the prompts of all seeds. Losses are
means over the last quarter of the steps. The same command continues, and more forms or seeds only add their stages.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean

import numpy as np
import yaml

import strop
from strop.trainer.reports.statistics import correct, paired_bootstrap
from strop.trainer.run.artifacts import read_manifest

FORMS: dict[str, dict] = {  # keys of sft and dpo
    "float32": {}, "other order": {}, "split": {"masters": "split"}, "bfloat16": {"moments": "bfloat16"},
    "int8": {"moments": "int8"}, "int8, split": {"moments": "int8", "masters": "split"}, "muon": {"optimizer": "muon"},
}


def run_seed(recipe: str, seed: int, forms: list[str], folder: Path, overrides: dict) -> dict[str, dict]:
    """Form -> the test split's pass rates by prompt after SFT and after DPO, losses and seconds of both."""
    keys = {"name": f"seed-{seed}", "seed": seed, "output_dir": str(folder), "log.tensorboard": False}
    found = {}
    with strop.open_run(recipe, keys | overrides) as run:
        r, start, prompts = run.recipe, run.start, run.prompts()
        for _ in run.rounds(1):
            samples = run.sample(r.sample, start, prompts)
            selected = run.select(r.select, prompts, [(samples, run.score(r.score, samples, prompts))])
            for form in forms:
                name, order = form.replace(", ", "-").replace(" ", "-"), 1000 + seed if form == "other order" else None
                sft, dpo = (section.model_copy(update=FORMS[form]) for section in (r.sft, r.dpo))
                tuned = run.sft(sft, selected, start, prompts, name=f"{name}-sft", seed=order)
                preferred = run.prefer(dpo, selected, tuned.model, tuned.model, prompts, name=f"{name}-dpo", seed=order)
                candidates = {"sft": tuned.model, "dpo": preferred.model}
                run.evaluate(r.evaluate, prompts, candidates, name=f"{name}-evaluate")
                # weights that equal those of another form were evaluated with that one
                found[form] = {stage: measured(run.store.run_dir, *run.measured[trained.model.hash], trained)
                               for stage, trained in (("sft", tuned), ("dpo", preferred))}
    return found


def measured(run_dir: Path, evaluation, candidate: str, trained) -> dict:
    where = (evaluation.path.relative_to(run_dir).as_posix(), candidate)
    stage = trained.path.relative_to(run_dir).as_posix()
    with open(run_dir / "metrics.jsonl") as f:
        losses = [row["loss"] for row in map(json.loads, f) if row["stage"] == stage and "loss" in row]
    return {"correct": correct(run_dir, where, "test"), "loss": fmean(losses[-max(1, len(losses) // 4):]),
            "steps": len(losses), "seconds": read_manifest(trained.path)["seconds"]}


def report(seeds: dict[int, dict]) -> dict[str, dict]:
    """Form -> means over seeds of both stages, and the gain over float32 after DPO with its 95 % interval."""
    rows = {}
    for form in next(iter(seeds.values())):
        mine = [found[form] for found in seeds.values()]
        row = {stage: {"pass_rate": fmean(fmean(m[stage]["correct"].values()) for m in mine)} | {
                   key: fmean(m[stage][key] for m in mine) for key in ("loss", "steps", "seconds")}
               for stage in ("sft", "dpo")}
        pairs = [(m["dpo"]["correct"][i], found["float32"]["dpo"]["correct"][i])
                 for m, found in zip(mine, seeds.values(), strict=True) for i in sorted(m["dpo"]["correct"])]
        new, old = np.array(pairs, float).T
        rows[form] = row | dict(zip(("gain", "low", "high"), paired_bootstrap(new, old, 20_000, 0), strict=True))
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="quickstart", help="name or file of a recipe of method rounds")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS, help="float32 always runs")
    parser.add_argument("--runs", type=Path, default=Path("runs/optimizer-state"), help="folder of the run directories")
    parser.add_argument("--results", type=Path, help="JSON file for the results")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="keys of the recipe")
    options = parser.parse_args(arguments)
    keys = {key: yaml.safe_load(value) for key, _, value in (pair.partition("=") for pair in options.set)}
    forms = list(dict.fromkeys(["float32", *options.forms]))
    rows = report({seed: run_seed(options.recipe, seed, forms, options.runs, keys) for seed in options.seeds})
    print("| state | SFT, test | DPO, test | over float32, points | SFT loss | DPO loss | SFT and DPO, s |\n"
          "|---|---|---|---|---|---|---|")
    for form, row in rows.items():
        gain = "" if form == "float32" else " to ".join(f"{100 * row[key]:+.1f}" for key in ("low", "high"))
        gain = f"{100 * row['gain']:+.1f} ({gain})" if gain else ""
        print(f"| {form} | {row['sft']['pass_rate']:.1%} | {row['dpo']['pass_rate']:.1%} | {gain} | "
              f"{row['sft']['loss']:.4f} | {row['dpo']['loss']:.4f} | "
              f"{row['sft']['seconds'] + row['dpo']['seconds']:.0f} |")
    if options.results:
        options.results.write_text(json.dumps({"seeds": options.seeds, "set": keys, "forms": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
