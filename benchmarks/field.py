"""A round of SFT and DPO by Strop and by TRL, from the same samples: pass rate, time and memory at equal data and at
equal time.

    python -m benchmarks.field [RECIPE] [key=value ...] [--device cpu|cuda] [--seeds 3] [--ways WAY,WAY] [--write]

Strop samples once and selects SFT rows and pairs. Then for every seed, which orders the rows, each side trains on the
same tokens with the same losses, optimizer, schedule and rows per step, in a process of its own: TRL's SFTTrainer and
DPOTrainer in their fastest way here, which a few steps of each decide (--ways, e.g. "masters padding-free,masters
padded", decides without), and Strop twice: with the same epochs, and with as many more as TRL takes longer. Strop's
evaluator answers the test prompts with all weights. Times are those of whole stages, from loading weights to saving
them, the reference included, without imports.

--write puts the numbers into benchmarks/results/<device>/field.json; `python -m benchmarks.docs` makes the table of
docs/performance.md from it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from strop.trainer.cli import load_recipe, parse
from strop.trainer.config import Recipe
from strop.trainer.reports.statistics import paired_bootstrap
from strop.trainer.run.world import World

from . import measure as bench
from .field_sides import Job, as_json, check_recipe

# both sides learn from all tokens of a completion and check nothing on the way
SETTINGS = {"sft.eval_steps": 0, "dpo.eval_steps": 0, "dpo.mask_template_tokens": False, "sft.start": "base"}
SIDES = {"trl": "TRL", "strop": "Strop, same epochs", "strop-more": "Strop, same time"}
RESAMPLES = 10_000
# ROOT last: the folders beside benchmarks must not shadow installed packages
ROOT = str(Path(__file__).parents[1])
WORKER = ("import sys; sys.path.append(sys.argv[1]); from benchmarks.field_sides import main; "
          "main(*sys.argv[2:])")


class Phases:
    """Runs phases in processes of their own. Each result is kept in `work`, beside the run directory, and a second run
    reads it."""

    def __init__(self, run_dir: Path, work: Path):
        self.run_dir, self.work = run_dir, work
        work.mkdir(parents=True, exist_ok=True)

    def __call__(self, phase: str, job: Job) -> dict:
        name = job.name or phase
        given, target = self.work / f"{name}.in.json", self.work / f"{name}.json"
        if not (target.exists() and given.exists() and given.read_text() == as_json(job)):
            target.unlink(missing_ok=True)
            for folder in (*self.run_dir.glob(f"round-00/{name}-*"), *self.work.glob(f"{name}-*")):
                shutil.rmtree(folder)  # a stage that goes on would not take its time
            given.write_text(as_json(job))
            print(f"  {name} ...", flush=True)
            done = subprocess.run([sys.executable, "-P", "-c", WORKER, ROOT, phase, str(given), str(target)],
                                  capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{name} stopped:\n{(done.stdout + done.stderr)[-4000:]}")
        return json.loads(target.read_text())


def field(recipe: Recipe, seeds: int, ways: list[str] | None) -> dict:
    """The case of a recipe: what each side's seeds took, and what their weights are worth."""
    output = Path(recipe.output_dir).absolute()
    work = output / f"{recipe.name}.sides"
    run, base = Phases(output / recipe.name, work), Job(recipe.model_dump(mode="json") | {"output_dir": str(output)})
    found = run("shared", base)
    base = replace(base, work=str(work), start=found["start"], selected=found["selected"])
    tried = {} if ways else run("trial", replace(base, name="trial"))
    if not ways:
        ways = [fastest(tried[task]) for task in ("sft", "dpo")]
    sides: dict[str, list[dict]] = {side: [] for side in SIDES}
    for seed in range(seeds):
        first = {}
        for side in ("trl", "strop") if seed % 2 == 0 else ("strop", "trl"):
            first[side] = run(side, replace(base, name=f"{side}-{seed}", seed=seed, ways=tuple(ways)))
        check_losses(first["strop"]["losses"], first["trl"]["losses"])
        more = tuple(first["trl"][key] / first["strop"][key] for key in ("sft_seconds", "dpo_seconds"))
        first["strop-more"] = run("strop", replace(base, name=f"strop-more-{seed}", seed=seed, epochs=more))
        for side, result in first.items():
            sides[side].append(result)
    trained = tuple((f"{side} {seed} {task}", folder) for side, results in sides.items()
                    for seed, result in enumerate(results)
                    for task, folder in zip(("sft", "dpo"), result["weights"], strict=True))
    correct = run("evaluated", replace(base, trained=trained))
    return {"recipe": recipe.name.removeprefix("field-"), "model": recipe.model.path, "seeds": seeds,
            "dtype": recipe.dtype, "rows": found["rows"], "pairs": found["pairs"], "ways": list(ways), "tried": tried,
            "epochs": [recipe.sft.epochs, recipe.dpo.epochs], "batch": [recipe.sft.batch_size, recipe.dpo.batch_size],
            **summary(correct, {side: [{k: v for k, v in r.items() if k != "weights"} for r in results]
                                for side, results in sides.items()})}


def fastest(tried: dict[str, float | str]) -> str:
    """TRL's fastest way of those that ran. Raises SystemExit if none did."""
    ran = {way: seconds for way, seconds in tried.items() if not isinstance(seconds, str)}
    if not ran:
        raise SystemExit(f"TRL does not run here: {tried}")
    return min(ran, key=ran.get)


def check_losses(ours: list[float], theirs: list[float]) -> None:
    """Raises SystemExit unless the mean losses over the same rows are about the same: the sides differ in their order
    and in rounding alone."""
    for task, a, b in zip(("SFT", "DPO"), ours, theirs, strict=True):
        if not abs(a - b) <= 0.1 * max(a, b):
            raise SystemExit(f"the sides do not train alike: mean loss of {task} {a:.4f} by Strop, {b:.4f} by TRL")


def summary(correct: dict[str, dict[str, bool]], sides: dict[str, list[dict]]) -> dict:
    """Pass rates with 95 % intervals over test prompts, of the mean over seeds, beside what the sides took. correct:
    {"base" or "SIDE SEED TASK": {prompt_id: whether it is right}}; sides: {side: a result per seed}."""
    ids = sorted(correct["base"])

    def rates(side: str, task: str) -> np.ndarray:
        return np.mean([[correct[f"{side} {seed} {task}"][i] for i in ids] for seed in range(len(sides[side]))], axis=0)

    def interval(new: np.ndarray, old: np.ndarray | None = None) -> dict:
        zeros = np.zeros(len(ids))
        return dict(zip(("value", "low", "high"), paired_bootstrap(new, zeros if old is None else old, RESAMPLES, 0),
                        strict=True))

    start = np.array([correct["base"][i] for i in ids], dtype=float)
    return {"prompts": len(ids), "base": interval(start), "sides": {side: {
        "pass_rate": interval(rates(side, "dpo")), "sft_pass_rate": interval(rates(side, "sft")),
        "over_trl": interval(rates(side, "dpo"), rates("trl", "dpo")), "seeds": results}
        for side, results in sides.items()}}


def lines(case: dict) -> list[list[str]]:
    """A row per side for the table, the start weights first."""
    def percent(found: dict, sign: str = "") -> str:
        return (f"{100 * found['value']:{sign}.1f} ({100 * found['low']:{sign}.1f} to {100 * found['high']:{sign}.1f})")

    def span(values: list[float], form: str = ".0f") -> str:
        texts = list(dict.fromkeys(f"{v:{form}}" for v in (min(values), max(values))))
        return " to ".join(texts)

    rows = [["start", "", percent(case["base"]), "", "", "", ""]]
    for side, title in SIDES.items():
        found = case["sides"][side]
        seeds = found["seeds"]
        rows.append([title, percent(found["sft_pass_rate"]), percent(found["pass_rate"]),
                     "" if side == "trl" else percent(found["over_trl"], "+"),
                     " + ".join(span([s[key] for s in seeds]) for key in ("sft_seconds", "dpo_seconds")),
                     " + ".join(span([s["steps"][i] for s in seeds]) for i in (0, 1)),
                     span([s["peak_bytes"] / 2**30 for s in seeds], ".1f")])
    return rows


HEADER = ["", "after SFT, %", "after DPO, %", "over TRL", "SFT + DPO, s", "steps", "peak, GiB"]


def title(case: dict) -> str:
    sft, dpo = case["ways"]
    return (f"recipe `{case['recipe']}`, {case['model']}, {case['dtype']}, {case['rows']} rows and {case['pairs']} "
            f"pairs, {case['prompts']} test prompts, {case['seeds']} seed{'s' * (case['seeds'] > 1)}; TRL: SFT {sft}, "
            f"DPO {dpo}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="*", default=["quickstart"], help="a recipe of method rounds, and key=value")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="by default a GPU if there is one")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ways", help="TRL's way for SFT and for DPO, instead of a trial")
    parser.add_argument("--write", action="store_true", help="keep the results")
    options = parser.parse_intermixed_args(arguments)
    recipe = parse(options.recipe).recipe
    recipe = load_recipe(recipe, SETTINGS | {"name": f"field-{recipe.name}"} | (
        {"device": options.device} if options.device else {}))
    check_recipe(recipe)
    device = torch.device("cuda" if recipe.device != "cpu" and torch.cuda.is_available() else "cpu")
    recipe = World(device=device).settle_dtype(recipe).model_copy(update={"device": device.type})
    case = field(recipe, options.seeds, options.ways and options.ways.split(","))
    print(title(case))
    for row in (HEADER, *lines(case)):
        print(" | ".join(row), flush=True)
    if options.write:
        bench.keep_cases("field.json", device, {f"{case['recipe']} {case['model']}": case}, add=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
