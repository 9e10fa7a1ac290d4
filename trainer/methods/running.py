"""Running or planning a recipe in its run directory."""

from pathlib import Path

from strop.trainer.config import Recipe, to_yaml
from strop.trainer.errors import UserError
from strop.trainer.methods import METHODS
from strop.trainer.methods.run import Run
from strop.trainer.models.folders import Base, find_base
from strop.trainer.models.hub import find_data
from strop.trainer.reports.html import Refresh, write_report
from strop.trainer.reports.reading import RunRecord, read_run
from strop.trainer.run.console import PROGRESS, Console
from strop.trainer.run.files import read_json, write_atomic
from strop.trainer.run.metrics import open_metrics
from strop.trainer.run.store import PLAN, Store
from strop.trainer.run.world import join


def plan_recipe(recipe: Recipe, console: Console) -> tuple[Recipe, Store]:
    """The recipe with every default resolved, and a store whose `plan` lists what a run would do. Writes nothing."""
    world = join(recipe.device, recipe.threads)
    recipe = world.settle_dtype(recipe)
    store = Store(Path(recipe.output_dir) / recipe.name, world, console, planning=True)
    return recipe, follow(recipe, find_outside(recipe, store.run_dir, console, download=False), store)


def find_outside(recipe: Recipe, run_dir: Path, console: Console, download: bool = True) -> tuple[Base, dict]:
    """The start weights, and the files of the datasets that the recipe names on the hub (see find_data).

    What this run has resolved before stays at its commit. Raises UserError for what cannot be found or downloaded."""
    try:
        pins = read_json(run_dir / PLAN)["base"]["revisions"]
    except (UserError, KeyError, TypeError):
        pins = {}
    base = find_base(recipe.model, console, download, pins.get(recipe.model.path))
    return base, find_data(recipe.data, console, download, pins)


def follow(recipe: Recipe, outside: tuple[Base, dict], store: Store) -> Store:
    METHODS[recipe.method](Run(store, recipe, *outside), recipe)
    return store


def run_recipe(recipe: Recipe, console: Console) -> RunRecord:
    """Runs or resumes a recipe and returns what its run directory then holds. Every rank calls it.

    Raises UserError for what a user can mend; completed stages are kept, and the same call resumes."""
    world = join(recipe.device, recipe.threads)
    recipe = world.settle_dtype(recipe)
    run_dir, text = Path(recipe.output_dir) / recipe.name, to_yaml(recipe)
    store = Store(run_dir, world, console)
    store.lock()
    try:
        outside = world.share(find_outside(recipe, run_dir, console) if world.first else None)
        console.line(f"run directory {run_dir}   {world.size} rank(s), {world.hardware}, {recipe.dtype}   "
                     f"base {outside[0].name}")
        store.metrics = open_metrics(recipe, run_dir, console, world.first)
        console.note = run_dir / PROGRESS
        store.after = [store.metrics.stage_done, Refresh(run_dir, console)]
        if world.first:
            store.plan = follow(recipe, outside, Store(run_dir, world, console, planning=True)).plan
            write_atomic(run_dir / "config.yaml", lambda p: p.write_text(text, encoding="utf-8"))
        follow(recipe, outside, store)
        store.metrics.close()
        if world.first:
            write_report(run_dir)
        world.barrier()
        return read_run(run_dir)
    finally:
        console.note = None
        store.unlock()
        world.close()
