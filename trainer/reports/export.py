"""`strop export`: the promoted model as a standalone folder: weights, tokenizer, card, and its parents' license."""

import importlib.metadata
import os
import shutil
import tempfile
from pathlib import Path

from strop.trainer.errors import UserError
from strop.trainer.method_recipes import recipe_of
from strop.trainer.reports.card import card_info, model_card
from strop.trainer.reports.reading import RunRecord, find_run, read_run
from strop.trainer.reports.rewards import reward_card
from strop.trainer.run.artifacts import check_file
from strop.trainer.run.files import read_json

LICENSE_FILES = ("LICENSE", "LICENCE", "NOTICE", "COPYING")
CARD = "README.md"


def export(console, argument: str, target: str) -> None:
    """Copies the newest promoted weights of a run, or its reward model, to `target`, a new folder that transformers
    loads.

    A finished run's final folder is copied as it is; an unfinished run's newest promoted weights get a new card. Raises
    UserError if `target` exists, nothing was promoted, or a file is damaged.
    """
    run, folder = read_run(find_run(argument)), Path(target)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: already exists; name a new folder")
    stage, prefix = promoted(run)
    files = {name: entry for name, entry in run.manifests[stage]["files"].items()
             if name.startswith(prefix) and "/" not in name.removeprefix(prefix) and name != "results.json"}
    if not any(name.endswith(".safetensors") for name in files):
        raise UserError(f"{run.dir / stage}: holds no weights; delete the folder and re-run the recipe")
    if not folder.parent.is_dir():
        raise UserError(f"{folder.parent}: no such folder; create it first")
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name, entry in files.items():
            check_file(run.dir / stage / name, entry, f"delete the folder {run.dir / stage} and re-run the recipe")
            shutil.copyfile(run.dir / stage / name, temporary / name.removeprefix(prefix))
        if not (temporary / CARD).exists():
            (temporary / CARD).write_text(card_of(run), encoding="utf-8")
        for source in parent_licenses(run):
            if not (temporary / source.name).exists():
                shutil.copyfile(source, temporary / source.name)
        temporary.chmod(0o755)
        os.replace(temporary, folder)
    except OSError as e:
        raise UserError(f"{folder}: cannot be written ({e.strerror}); nothing was exported") from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sizes = [p.stat().st_size for p in folder.iterdir()]
    console.line(f"{folder}: {len(sizes)} files, {sum(sizes) / 1e6:,.1f} MB, from {run.dir / stage}")
    if not run.finished:
        console.warn(f"{run.name} is not finished: these are the newest promoted weights")
    if "\nlicense: " not in (folder / CARD).read_text(encoding="utf-8").split("\n---\n")[0]:
        console.warn(f"the license of the start weights is unknown; add it to {folder / CARD} before you distribute "
                     "the model")


def promoted(run: RunRecord) -> tuple[str, str]:
    """(stage, folder in it) of the weights to export: ("final", "") or e.g. ("round-00/dpo", "model/")."""
    published = run.of_kind("model")
    if run.finished and published:
        return published[-1]["stage"], ""
    if run.reward_model:
        return run.reward_model, "model/"
    for promotion in reversed(run.promotions):
        stage, _, folder = (promotion["weights"] or "").rpartition("/")
        if stage in run.manifests:
            return stage, f"{folder}/"
    raise UserError(f"{run.dir}: only the start weights were promoted so far, there is nothing to export; run more "
                     "rounds")


def card_of(run: RunRecord) -> str:
    """The model card of an unfinished run, or of a reward model."""
    if run.reward_model:
        measured = read_json(run.dir / run.reward_model / "reward.json")
        return reward_card(run.start, run.plan.get("base", {}), measured)
    recipe = recipe_of(run.config)
    about = card_info(recipe, run, run.results(), run.promotions)
    return model_card({"base_model": recipe.model.path} | run.plan.get("base", {}) | about)


def parent_licenses(run: RunRecord) -> list[Path]:
    """License files next to the start weights, or of the Python package that contains them."""
    path = str(run.config.get("model", {}).get("path", ""))
    if path.startswith("package:"):
        try:
            found = importlib.metadata.files(path.removeprefix("package:")) or []
        except importlib.metadata.PackageNotFoundError:
            return []
        paths = [Path(f.locate()) for f in found]
    else:
        folder = Path(path).expanduser()
        folder = folder if folder.is_dir() else folder.parent
        paths = sorted(folder.iterdir()) if folder.is_dir() else []
    return [p for p in paths if p.is_file() and p.name.upper().startswith(LICENSE_FILES)]
