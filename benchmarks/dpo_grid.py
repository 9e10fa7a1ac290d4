"""What DPO adds to SFT in a recipe with dpo.pairs=policy, against the same time spent on more SFT.

    python -m benchmarks.dpo_grid [--recipe on-policy] [--seeds 1 2 3 4 5] [--arms policy more-sft ...]
                                  [--arm NAME KEY=VALUE ...] [--set KEY=VALUE ...] [--runs FOLDER] [--results FILE]

For each seed: one round up to SFT, then K completions of other prompts by the SFT weights. Every arm starts from these
SFT weights. DPO arms pair the new completions (`round`: those from before SFT), `more-sft` arms fine-tune on the best
of them. --arm adds an arm by the keys that it changes (select.*, and dpo.* or sft.*). Gains are pass rates minus those
of the SFT weights, with a bootstrap interval over the prompts of all seeds; a prompt that several seeds tested is
drawn with all of its results. Everything is kept in run directories: the same command continues, and more arms or
seeds only add their stages.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import fmean

import numpy as np
import yaml

import strop
from strop.trainer.errors import UserError
from strop.trainer.reports.statistics import correct
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
    "more-sft-2": {"sft": {"epochs": 1.5}, "select": {"sft_per_prompt": 2}},
    "more-sft-wide": {"sft": {"epochs": 1}, "select": {"sft_per_prompt": 4}},
}
SPLITS = ("validation", "test")
RESAMPLES = 20_000


def parsed(pairs: list[str]) -> dict:
    return {key: yaml.safe_load(value) for key, _, value in (pair.partition("=") for pair in pairs)}


def arm_of(name: str, pairs: list[str]) -> dict[str, dict]:
    """The sections of an arm with keys such as dpo.lr. Raises UserError on keys of other sections."""
    sections: dict[str, dict] = defaultdict(dict)
    for key, value in parsed(pairs).items():
        section, _, field = key.partition(".")
        if section not in ("select", "sft", "dpo") or not field:
            raise UserError(f"--arm {name}: {key} is no key of select, sft or dpo")
        sections[section][field] = value
    if "sft" in sections and "dpo" in sections:
        raise UserError(f"--arm {name}: an arm has keys of sft or of dpo, not of both")
    return dict(sections)


def run_seed(recipe: str, seed: int, arms: dict[str, dict], folder: Path, overrides: dict) -> dict[str, dict]:
    """Arm -> its pass rates by prompt, cut share, length, seconds and passes; `base` and `sft` too."""
    keys = {"name": f"seed-{seed}", "seed": seed, "output_dir": str(folder), "log.tensorboard": False}
    with strop.open_run(recipe, keys | overrides) as run:
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
            for arm, how in arms.items():
                section = changed(r.select, how.get("select"))
                if how.get("pairs") == "round":
                    pairs, before = first, []
                else:
                    pairs, before = run.select(section, prompts, new, name=f"{arm}-select"), [samples]
                if "sft" in how:
                    done = run.sft(changed(r.sft, how["sft"]), pairs, policy, name=arm)
                else:
                    done = run.prefer(changed(r.dpo, how.get("dpo")), pairs, policy, policy, name=arm)
                    before = [*before, run.store.run_dir / f"round-00/{arm}-reference"]
                made[arm] = ([*before, done], run.evaluate(r.evaluate, prompts, {arm: done.model},
                                                           name=f"evaluate-{arm}"))
        return {arm: measured(run.store.run_dir, arm, *found) for arm, found in made.items()}


def changed(section, keys: dict | None):
    """The section with other values, checked."""
    return type(section).model_validate(section.model_dump() | (keys or {}))


def passes(manifests: list[dict]) -> int:
    """Tokens that went through the model to train on them: three times where trained, forward and backward, and once
    for the log-probs of the reference. Unlike seconds it does not depend on the machine."""
    return sum({"training": 3, "log-probs": 1}.get(m["kind"], 0) * m["counts"].get("tokens", 0) for m in manifests)


def measured(run_dir: Path, arm: str, stages: list, evaluation) -> dict:
    where = (evaluation.path.relative_to(run_dir).as_posix(), arm)
    summary = read_json(evaluation.path / "summary.json")[arm]
    manifests = [read_manifest(getattr(stage, "path", stage)) for stage in stages]
    counts = manifests[-1]["counts"] if manifests else {}
    return {"correct": {split: correct(run_dir, where, split) for split in SPLITS},
            "cut_share": summary["test"]["cut_share"], "mean_length": summary["test"]["mean_length"],
            "seconds": sum(m["seconds"] for m in manifests), "passes": passes(manifests),
            "counts": {k: counts[k] for k in ("rows", "pairs", "steps") if k in counts}}


def pooled(seeds: dict[int, dict], arm: str, against: str, split: str) -> dict:
    """Pass rate of an arm minus that of another, over the prompts of every seed that has both: `gain`, its 95 %
    bootstrap interval `low` to `high` over distinct prompts, the number of differences `n` and of `prompts`."""
    found: dict[str, list[int]] = defaultdict(list)
    for arms in seeds.values():
        if arm in arms and against in arms:
            new, old = (arms[name]["correct"][split] for name in (arm, against))
            for i in new:
                found[i].append(int(new[i]) - int(old[i]))
    # prompts with the same sum and number of differences are exchangeable, see paired_bootstrap
    kinds, counts = np.unique([(sum(d), len(d)) for d in found.values()], axis=0, return_counts=True)
    drawn = np.random.default_rng(0).multinomial(len(found), counts / len(found), size=RESAMPLES)
    low, high = np.quantile((drawn @ kinds[:, 0]) / (drawn @ kinds[:, 1]), [0.025, 0.975])
    total, n = counts @ kinds
    return {"gain": float(total / n), "low": float(low), "high": float(high), "n": int(n), "prompts": len(found)}


def report(seeds: dict[int, dict], keys: dict[str, dict]) -> dict:
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
            "seconds": fmean(m["seconds"] for m in mine), "passes": fmean(m["passes"] for m in mine),
            "counts": [m["counts"] for m in mine], "keys": keys.get(arm, {})}
        if arm not in ("base", "sft"):
            rows[arm]["over"] = {other: {split: pooled(seeds, arm, other, split) for split in SPLITS}
                                 for other in arms if other.startswith("more-sft") and other != arm}
    return rows


def points(gain: dict | None) -> str:
    return f"{100 * gain['gain']:+.1f} [{100 * gain['low']:+.1f}, {100 * gain['high']:+.1f}]" if gain else ""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="on-policy", help="a shipped recipe, or a file")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--arms", nargs="*", default=["policy", "more-sft"], choices=ARMS)
    parser.add_argument("--arm", nargs="+", action="append", default=[], metavar=("NAME", "KEY=VALUE"))
    parser.add_argument("--runs", type=Path, help="folder of the run directories. Default: runs/dpo-grid-RECIPE")
    parser.add_argument("--results", type=Path, help="JSON file for the results")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="keys of the recipe")
    options = parser.parse_args(arguments)
    keys = parsed(options.set)
    arms = {name: ARMS[name] for name in options.arms} | {name: arm_of(name, pairs) for name, *pairs in options.arm}
    folder = options.runs or Path(f"runs/dpo-grid-{Path(options.recipe).stem}")
    seeds = {seed: run_seed(options.recipe, seed, arms, folder, keys) for seed in options.seeds}
    rows = report(seeds, arms)
    for arm, row in rows.items():
        over = {other: gains["test"] for other, gains in row.get("over", {}).items()}
        print(f"{arm:18} test {row['pass_rate']['test']:6.1%}  over SFT {points(row['over_sft']['test']):22} "
              f"validation {points(row['over_sft']['validation']):22} "
              f"{''.join(f'over {other} {points(more)}  ' for other, more in over.items())}"
              f"cut {row['cut_share']:.1%}  "
              f"length {row['mean_length']:.1f}  {row['seconds']:.0f} s  {row['passes'] / 1000:.0f}k tokens")
    if options.results:
        found = {"recipe": options.recipe, "seeds": options.seeds, "set": keys, "arms": rows}
        options.results.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
