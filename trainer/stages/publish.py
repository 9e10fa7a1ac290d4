"""Publish: the promoted weights as a standalone folder, with a model card."""

import os
import shutil
from pathlib import Path

from strop.trainer.config import Recipe
from strop.trainer.reports.card import card_info, model_card
from strop.trainer.reports.reading import read_run
from strop.trainer.reports.statistics import round_results
from strop.trainer.run.files import write_json
from strop.trainer.run.store import Stage


def publish(stage: Stage, *, recipe: Recipe, bootstrap: int, scorers: dict[str, list[dict]], base: dict, weights: Path,
            promotions: list[dict]) -> None:
    """Links the promoted weights and writes README.md (the model card) and results.json.

    base: base_model, license, base_from_gguf and base_hash, for the card; scorers: of each source, for
    results.json."""
    for file in sorted(weights.iterdir()):
        if file.is_file() and file.name not in ("README.md", "results.json", "manifest.json"):
            place(file, stage.dir / file.name)
    run = read_run(stage.dir.parent)
    results = round_results(run.dir, promotions, run.base, bootstrap)
    write_json(stage.dir / "results.json", {"scorers": scorers, "promotions": promotions, "results": results})
    card = model_card(base | card_info(recipe, run, results, promotions))
    (stage.dir / "README.md").write_text(card, encoding="utf-8")


def place(file: Path, target: Path) -> None:
    """A hard link if the file system supports it, else a copy."""
    target.unlink(missing_ok=True)
    try:
        os.link(file.resolve(), target)
    except OSError:
        shutil.copyfile(file, target)
