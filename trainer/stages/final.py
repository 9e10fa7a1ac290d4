"""Final: the promoted weights as a folder of their own, with a model card of lineage and results."""

import os
import shutil
from pathlib import Path

from strop.trainer.card import card_info, model_card
from strop.trainer.config import Recipe
from strop.trainer.results import round_results
from strop.trainer.store import Stage, write_json


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
