"""The promoted model of a run as a folder of its own: weights, tokenizer, card, and the licence of its parents."""

import importlib.metadata
import os
import shutil
import tempfile
from pathlib import Path

from strop.trainer.config import Recipe
from strop.trainer.errors import UserError
from strop.trainer.reports.card import card_info, model_card
from strop.trainer.reports.reading import RunRecord, find_run, read_run
from strop.trainer.run.files import hash_file

LICENCE_FILES = ("LICENSE", "LICENCE", "NOTICE", "COPYING")
CARD = "README.md"


def export(console, argument: str, target: str) -> None:
    """Copies the newest promoted weights of a run to `target`, a new folder that transformers loads.

    A finished run's final folder is taken as it stands; of an unfinished one the weights that were promoted last, with
    a card made for them. Raises UserError if `target` exists, nothing was promoted, or a file is damaged.
    """
    run, folder = read_run(find_run(argument)), Path(target)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists already; name a folder that does not")
    stage, prefix = promoted(run)
    files = {name: entry for name, entry in run.manifests[stage]["files"].items()
             if name.startswith(prefix) and "/" not in name.removeprefix(prefix) and name != "results.json"}
    if not any(name.endswith(".safetensors") for name in files):
        raise UserError(f"{run.dir / stage}: holds no weights; delete the folder to have it made again")
    if not folder.parent.is_dir():
        raise UserError(f"{folder.parent}: no such folder; make it first")
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name, entry in files.items():
            copy_checked(run.dir / stage / name, temporary / name.removeprefix(prefix), entry, run.dir / stage)
        if not (temporary / CARD).exists():
            (temporary / CARD).write_text(card_of(run), encoding="utf-8")
        for source in parent_licences(run):
            if not (temporary / source.name).exists():
                shutil.copyfile(source, temporary / source.name)
        temporary.chmod(0o755)
        os.replace(temporary, folder)
    except OSError as e:
        raise UserError(f"{folder}: cannot be written ({e.strerror}); nothing was exported") from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    size = sum(p.stat().st_size for p in folder.iterdir())
    console.line(f"{folder}: {len(list(folder.iterdir()))} files, {size / 1e6:,.1f} MB, from {run.dir / stage}")
    if not run.finished:
        console.warn(f"{run.name} is not finished: these are the weights promoted so far")
    if "\nlicense: " not in (folder / CARD).read_text(encoding="utf-8").split("\n---\n")[0]:
        console.warn(f"the licence of the start weights is not known; look it up and name it in {folder / CARD} before "
                     "you pass the model on")


def promoted(run: RunRecord) -> tuple[str, str]:
    """(stage, folder in it) of the weights to export, e.g. ("final", "") or ("round-00/dpo", "model/")."""
    published = run.of_kind("model")
    if run.finished and published:
        return published[-1]["stage"], ""
    for promotion in reversed(run.promotions):
        stage, _, folder = (promotion["weights"] or "").rpartition("/")
        if stage in run.manifests:
            return stage, f"{folder}/"
    raise UserError(f"{run.dir}: only the start weights were promoted so far, there is nothing to export")


def copy_checked(source: Path, target: Path, entry: dict, folder: Path) -> None:
    """Copies a file of an artifact. Raises UserError unless the copy is what the manifest says was written."""
    if not source.exists():
        raise UserError(f"{source}: missing; delete the folder {folder} and run the recipe to have it made again")
    shutil.copyfile(source, target)
    if hash_file(target) != entry["hash"]:
        raise UserError(f"{source}: damaged, its content is not what was written; delete the folder {folder} and run "
                         "the recipe to have it made again")


def card_of(run: RunRecord) -> str:
    """A card for the weights of a run that is not finished."""
    recipe = Recipe.model_validate(run.config)
    about = card_info(recipe, run, run.results(), run.promotions)
    return model_card({"base_model": recipe.model.path} | run.plan.get("base", {}) | about)


def parent_licences(run: RunRecord) -> list[Path]:
    """Licence texts that stand beside the start weights, or that the package which holds them ships."""
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
    return [p for p in paths if p.is_file() and p.name.upper().startswith(LICENCE_FILES)]
