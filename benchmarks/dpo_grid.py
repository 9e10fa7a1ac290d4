"""What DPO adds to SFT in the recipe on-policy, against the same time spent on more SFT.

    python -m benchmarks.dpo_grid [--seeds 1 2 3 4 5] [--arms policy more-sft ...] [--runs FOLDER] [--results FILE]
                                  [--set KEY=VALUE ...]

For each seed: one round up to SFT, then K completions of other prompts by the SFT weights. Every arm starts from these
SFT weights. DPO arms pair the new completions (`round`: those from before SFT), `more-sft` arms fine-tune on the best
of them. Gains are pass rates minus those of the SFT weights, by paired bootstrap over the prompts of all seeds.
Everything is kept in run directories: the same command continues, and more arms or seeds only add their stages.
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
from strop.trainer.run.files import read_json

LONG = {"epochs": 3, "lr": 3e-5, "nll_weight": 0.2}
ONE = {"pairs_per_prompt": 1}
ARMS: dict[str, dict] = {  # sections and their keys that differ from the recipe's
    "policy": {},
    "policy-nll-0.2": {"dpo": {"nll_weight": 0.2}},
    "policy-3e-6": {"dpo": {"lr": 3e-6, "nll_weight": 0.2}},
    "policy-beta-0.5": {"dpo": {"lr": 2e-5, "beta": 0.5}},
    "policy-2-epochs": {"dpo": LONG | {"epochs": 2}, "select": {"pairs_per_prompt": 3}},
    "policy-3-epochs": {"dpo": LONG, "select": ONE},
    "policy-3-epochs-5e-5": {"dpo": LONG | {"lr": 5e-5}, "select": ONE},
    "round": {"pairs": "round", "select": ONE},
    "round-3-epochs": {"pairs": "round", "dpo": LONG, "select": ONE},
    "more-sft": {"sft": {"epochs": 2}},
    "more-sft-4": {"sft": {"epochs": 4}},
    "more-sft-wide": {"sft": {"epochs": 1}, "select": {"sft_per_prompt": 4}},
}
SPLITS = ("validation", "test")


def run_seed(seed: int, arms: list[str], folder: Path, overrides: dict) -> dict[str, dict]:
    """Arm -> its pass rates by prompt, cut share, length and seconds; `base` and `sft` too."""
    keys = {"name": f"seed-{seed}", "seed": seed, "output_dir": str(folder), "log.tensorboard": False}
    with strop.open_run("on-policy", keys | overrides) as run:
        r, weights, prompts = run.recipe, run.start, run.prompts()
        made = {"base": ([], run.evaluate(r.evaluate, prompts, {"base": weights}, name="baseline"))}
        for _ in run.rounds(1):
            samples = run.sample(r.sample, weights, prompts)
            old = [(samples, run.score(r.score, samples, prompts))]
            first = run.select(r.select, prompts, old)
            trained = run.sft(r.sft, first, weights)
            policy = trained.model
            made["sft"] = ([trained], run.evaluate(r.evaluate, prompts, {"sft": policy}, name="evaluate-sft"))
            samples = run.sample(r.sample, policy, prompts, name="dpo-sample")
            new = [(samples, run.score(r.score, samples, prompts, name="dpo-score"))]
            for arm in arms:
                how = ARMS[arm]
                section = r.select.model_copy(update=how.get("select", {}))
                if how.get("pairs") == "round":
                    pairs, before = first, []
                else:
                    pairs, before = run.select(section, prompts, new, name=f"{arm}-select"), [samples]
                if "sft" in how:
                    done = run.sft(r.sft.model_copy(update=how["sft"]), pairs, policy, name=arm)
                else:
                    done = run.prefer(r.dpo.model_copy(update=how.get("dpo", {})), pairs, policy, policy, name=arm)
                    before = [*before, run.store.run_dir / f"round-00/{arm}-reference"]
                made[arm] = ([*before, done], run.evaluate(r.evaluate, prompts, {arm: done.model},
                                                           name=f"evaluate-{arm}"))
        return {arm: measured(run.store.run_dir, arm, *found) for arm, found in made.items()}


def measured(run_dir: Path, arm: str, stages: list, evaluation) -> dict:
    where = (evaluation.path.relative_to(run_dir).as_posix(), arm)
    summary = read_json(evaluation.path / "summary.json")[arm]
    manifests = [read_manifest(getattr(stage, "path", stage)) for stage in stages]
    counts = manifests[-1]["counts"] if manifests else {}
    return {"correct": {split: correct(run_dir, where, split) for split in SPLITS},
            "cut_share": summary["test"]["cut_share"], "mean_length": summary["test"]["mean_length"],
            "seconds": sum(m["seconds"] for m in manifests),
            "counts": {k: counts[k] for k in ("rows", "pairs", "steps") if k in counts}}


def pooled(seeds: dict[int, dict], arm: str, against: str, split: str) -> dict:
    """Pass rate of an arm minus that of another, over the prompts of every seed that has both."""
    new, old = [], []
    for found in seeds.values():
        if arm in found and against in found:
            a, b = (found[name]["correct"][split] for name in (arm, against))
            new += [a[i] for i in sorted(a)]
            old += [b[i] for i in sorted(a)]
    value, low, high = paired_bootstrap(np.array(new, float), np.array(old, float), 20_000, 0)
    return {"gain": value, "low": low, "high": high, "n": len(new)}


def report(seeds: dict[int, dict]) -> dict:
    arms = list(dict.fromkeys(arm for found in seeds.values() for arm in found))
    rows = {}
    for arm in arms:
        mine = [found[arm] for found in seeds.values() if arm in found]
        rows[arm] = {
            "pass_rate": {split: fmean(fmean(m["correct"][split].values()) for m in mine) for split in SPLITS},
            "over_sft": {split: pooled(seeds, arm, "sft", split) for split in SPLITS},
            "by_seed": {seed: {split: fmean(found[arm]["correct"][split].values())
                               - fmean(found["sft"]["correct"][split].values()) for split in SPLITS}
                        for seed, found in seeds.items() if arm in found},
            "cut_share": fmean(m["cut_share"] for m in mine), "mean_length": fmean(m["mean_length"] for m in mine),
            "seconds": fmean(m["seconds"] for m in mine), "counts": [m["counts"] for m in mine],
            "keys": ARMS.get(arm, {})}
        if "more-sft" in arms and arm not in ("base", "sft", "more-sft"):
            rows[arm]["over_more_sft"] = {split: pooled(seeds, arm, "more-sft", split) for split in SPLITS}
    return rows


def points(gain: dict | None) -> str:
    return f"{100 * gain['gain']:+.1f} [{100 * gain['low']:+.1f}, {100 * gain['high']:+.1f}]" if gain else ""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--arms", nargs="+", default=["policy", "more-sft"], choices=ARMS)
    parser.add_argument("--runs", type=Path, default=Path("runs/dpo-grid"), help="folder of the run directories")
    parser.add_argument("--results", type=Path, help="JSON file for the results")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="keys of the recipe")
    options = parser.parse_args(arguments)
    keys = {key: yaml.safe_load(value) for key, _, value in (pair.partition("=") for pair in options.set)}
    seeds = {seed: run_seed(seed, options.arms, options.runs, keys) for seed in options.seeds}
    rows = report(seeds)
    for arm, row in rows.items():
        print(f"{arm:18} test {row['pass_rate']['test']:6.1%}  over SFT {points(row['over_sft']['test']):22} "
              f"validation {points(row['over_sft']['validation']):22} "
              f"over more SFT {points(row.get('over_more_sft', {}).get('test')):22} cut {row['cut_share']:.1%}  "
              f"length {row['mean_length']:.1f}  {row['seconds']:.0f} s")
    if options.results:
        options.results.write_text(json.dumps({"seeds": options.seeds, "set": keys, "arms": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
