"""The promoted model of a run as a folder of its own: weights, tokenizer, card, and the licence of its parents."""

import importlib.metadata
import os
import shutil
import tempfile
from pathlib import Path

from strop.trainer.card import card_info, model_card
from strop.trainer.config import Recipe
from strop.trainer.results import round_results
from strop.trainer.rundir import Run, find_run, read_run
from strop.trainer.store import hash_file

LICENCE_FILES = ("LICENSE", "LICENCE", "NOTICE", "COPYING")
CARD = "README.md"


def export(console, argument: str, target: str) -> None:
    """Copies the newest promoted weights of a run to `target`, a new folder that transformers loads.

    A finished run's final folder is taken as it stands; of an unfinished one the weights that were promoted last, with
    a card made for them. Raises ValueError if `target` exists, nothing was promoted, or a file is damaged.
    """
    run, folder = read_run(find_run(argument)), Path(target)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: exists already; name a folder that does not")
    stage, prefix = promoted(run)
    files = {name: entry for name, entry in run.manifests[stage]["files"].items()
             if name.startswith(prefix) and "/" not in name.removeprefix(prefix) and name != "results.json"}
    if not any(name.endswith(".safetensors") for name in files):
        raise ValueError(f"{run.dir / stage}: holds no weights; delete the folder to have it made again")
    if not folder.parent.is_dir():
        raise ValueError(f"{folder.parent}: no such folder; make it first")
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name, entry in files.items():
            copy_checked(run.dir / stage / name, temporary / name.removeprefix(prefix), entry, run.dir / stage)
        if not (temporary / CARD).exists():
            (temporary / CARD).write_text(card_of(run, console), encoding="utf-8")
        for source in parent_licences(run):
            if not (temporary / source.name).exists():
                shutil.copyfile(source, temporary / source.name)
        temporary.chmod(0o755)
        os.replace(temporary, folder)
    except OSError as e:
        raise ValueError(f"{folder}: cannot be written ({e.strerror}); nothing was exported") from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    size = sum(p.stat().st_size for p in folder.iterdir())
    console.line(f"{folder}: {len(list(folder.iterdir()))} files, {size / 1e6:,.1f} MB, from {run.dir / stage}")
    if not run.finished:
        console.warn(f"{run.name} is not finished: these are the weights promoted so far")
    if "\nlicense: " not in (folder / CARD).read_text(encoding="utf-8").split("\n---\n")[0]:
        console.warn(f"the licence of the start weights is not known; look it up and name it in {folder / CARD} before "
                     "you pass the model on")


def promoted(run: Run) -> tuple[str, str]:
    """(stage, folder in it) of the weights to export: ("final", ""), or e.g. ("round-00/dpo", "model/")."""
    if run.finished:
        return "final", ""
    for promotion in reversed(run.promotions):
        stage = f"round-{promotion['round']:02}/{promotion['promoted']}"
        if stage in run.manifests:
            return stage, "model/"
    raise ValueError(f"{run.dir}: no weights but the start's were promoted so far, there is nothing to export")


def copy_checked(source: Path, target: Path, entry: dict, folder: Path) -> None:
    """Copies a file of an artifact. Raises ValueError unless the copy is what the manifest says was written."""
    if not source.exists():
        raise ValueError(f"{source}: missing; delete the folder {folder} and run the recipe to have it made again")
    shutil.copyfile(source, target)
    if hash_file(target) != entry["hash"]:
        raise ValueError(f"{source}: damaged, its content is not what was written; delete the folder {folder} and run "
                         "the recipe to have it made again")


def card_of(run: Run, console) -> str:
    """A card for the weights of a run that is not finished."""
    from strop.trainer.models import find_base  # slow to import: it needs torch

    recipe = Recipe.model_validate(run.config)
    about = {"base_model": Path(recipe.model.path).name, "base_from_gguf": recipe.model.path.endswith(".gguf")}
    try:
        base = find_base(recipe.model, console, convert=False)
        about = {"base_model": base.name, "base_from_gguf": base.from_gguf, "license": base.license}
    except ValueError as e:
        console.warn(str(e))
    prompts = run.dir / "prompts" if "prompts" in run.manifests else None
    results = round_results(run.dir, run.promotions, recipe.evaluate.bootstrap) if prompts else []
    start = run.manifests.get("baseline", {}).get("inputs", {}).get("candidates.base", "unknown")
    return model_card(about | card_info(recipe, run.dir, results, start, prompts, run.promotions))


def parent_licences(run: Run) -> list[Path]:
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
