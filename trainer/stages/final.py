"""Final: the promoted weights as a folder of their own, with a model card of lineage and results."""

import os
import shutil
from collections import Counter
from pathlib import Path

from strop.trainer.card import model_card
from strop.trainer.config import Recipe
from strop.trainer.results import round_results
from strop.trainer.store import Stage, read_json, read_table, versions, write_json


def final(stage: Stage, recipe: Recipe, *, weights: Path, prompts: Path | None, base_name: str, base_hash: str,
          license: str | None, from_gguf: bool, promotions: list[dict]) -> None:
    """Links the promoted weights, writes README.md (the card) and results.json."""
    for file in sorted(weights.iterdir()):
        if file.is_file() and file.name not in ("README.md", "results.json", "manifest.json"):
            place(file, stage.dir / file.name)
    run_dir = stage.dir.parent
    results = round_results(run_dir, promotions, recipe.evaluate.bootstrap) if prompts else []
    write_json(stage.dir / "results.json", {"promotions": promotions, "results": results})
    base = {"base_model": base_name, "base_from_gguf": from_gguf, "license": license}
    card = model_card(base | card_info(recipe, run_dir, results, base_hash, prompts, promotions))
    (stage.dir / "README.md").write_text(card, encoding="utf-8")


def place(file: Path, target: Path) -> None:
    """A hard link where the file system allows one, else a copy."""
    target.unlink(missing_ok=True)
    try:
        os.link(file.resolve(), target)
    except OSError:
        shutil.copyfile(file, target)


def card_info(recipe: Recipe, run_dir: Path, results: list[dict], base_hash: str, prompts: Path | None,
              promotions: list[dict]) -> dict:
    rounds = []
    for p in promotions:
        folder = run_dir / f"round-{p['round']:02}"
        manifests = [read_json(m) for m in folder.glob("*/manifest.json")]
        rounds.append({"round": folder.name, "promoted": p["promoted"], "stages": {
            m["stage"].split("/")[1]: {"hash": m["key"], "counts": m["counts"], "seconds": m["seconds"]}
            for m in sorted(manifests, key=lambda m: m["created"])}})
    counts = Counter(read_table(prompts / "prompts.parquet")["source"].to_pylist()) if prompts else Counter()
    named = [("base" if r["round"] is None else f"round {r['round']} {r['stop']}", r) for r in results]
    return {
        "name": recipe.name, "seed": recipe.seed,
        "recipe": recipe.model_dump(mode="json", exclude={"output_dir"}), "rounds": rounds, "versions": versions(),
        "results": [{"candidate": name, "split": split, "n": r[split]["n"], "pass_rate": r[split]["pass_rate"]}
                    for name, r in named for split in ("validation", "test")],
        "gains": [{"candidate": name, "over": over, **r[key]} for name, r in named if "part" in r
                  for key, over in (("over_base", "base"), ("part", r["before"]))],
        "sources": [{"name": s.name, "origin": s.reasoning_gym or Path(s.path).name, "prompts": counts[s.name],
                     "verifier": s.verifier or "reasoning_gym"} for s in recipe.data.sources],
        "hashes": {"base weights": base_hash} | {f"round {p['round']} promoted": p["hash"] for p in promotions},
    }
