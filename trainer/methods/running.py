"""Runs or plans a recipe in its run directory, for the command line and `import strop`."""

import os
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from strop.trainer.cli import load_recipe
from strop.trainer.config import Model, Recipe, to_yaml
from strop.trainer.environment import prepare_environment
from strop.trainer.errors import UserError
from strop.trainer.methods import METHODS, forecast
from strop.trainer.methods.run import Run
from strop.trainer.models.folders import Base, find_base
from strop.trainer.models.hub import find_data
from strop.trainer.planning.hardware import Hardware, hardware_of
from strop.trainer.reports.html import Refresh, write_report
from strop.trainer.reports.reading import RunRecord, read_run
from strop.trainer.run import mirror, nodes, restart
from strop.trainer.run.console import PROGRESS, Console
from strop.trainer.run.files import write_atomic
from strop.trainer.run.metrics import open_metrics
from strop.trainer.run.store import Store
from strop.trainer.run.world import World, join

Named = str | Path | dict | Recipe  # a YAML file, the name of a shipped recipe, a dict of keys, or a Recipe


def train(recipe: Named = "quickstart", overrides: dict[str, Any] | None = None, *,
          console: Console | None = None) -> RunRecord:
    """Runs or resumes a recipe and returns the record of its run directory.

    recipe: a YAML file, the name of a shipped recipe, a dict of keys or a Recipe. overrides: dotted keys and their
    values, e.g. {"sample.k": 16}. Under torchrun every rank calls it. Raises UserError for mistakes that a user can
    fix; completed stages are kept, and the same call resumes."""
    with open_run(recipe, overrides, console=console) as run:
        run.store.plan = mirror.on_nodes(run.store.world, lambda: _plan_of(run))
        METHODS[run.recipe.method](run, run.recipe)
    return read_run(run.store.run_dir)


def _plan_of(run: Run) -> list[dict]:
    """The plan of a run that begins. On a node with a copy of the run directory, which is not up to date yet, it only
    tells whether all that is outside of it is there."""
    copy = mirror.is_on() and not run.store.world.first
    run_dir = run.store.run_dir / ".none" if copy else run.store.run_dir
    store = Store(run_dir, run.store.world, Console(enabled=False), planning=True)
    METHODS[run.recipe.method](Run(store, run.recipe, run.base, run.data, run.others), run.recipe)
    return store.plan


def plan(recipe: Named = "quickstart", overrides: dict[str, Any] | None = None, on: str | None = None) -> list[dict]:
    """What `train` would do: a dict per stage with its kind, inputs, state ("done", "stale" or "to run") and why, and
    `needs` of a stage that is to run: bytes on the device and the host of a rank and on disk, seconds, whether it fits,
    and the keys that make it fit (docs/memory.md). on: other hardware than this machine, e.g. "8x80GB".

    Nothing is run or written. Raises UserError as train does."""
    hardware, console = hardware_of(on) if on is not None else None, Console(enabled=False)
    recipe, store = planned(load_recipe(recipe, overrides), console, hardware)
    needs = forecast.needs(recipe, store, hardware)
    return [entry | ({"needs": needs[entry["stage"]]} if entry["stage"] in needs else {}) for entry in store.plan]


def planned(recipe: Recipe, console: Console, on: Hardware | None = None) -> tuple[Recipe, Store]:
    """(the recipe with all defaults resolved, a store with the plan of its method). on: the hardware that it is for, if
    it is not this machine."""
    prepare_environment()
    world = join("cpu" if on else recipe.device, recipe.threads)
    if on and recipe.dtype == "auto":
        recipe = recipe.model_copy(update={"dtype": "bfloat16"})
    recipe = world.settle_dtype(recipe)
    store = Store(Path(recipe.output_dir) / recipe.name, world, console, planning=True)
    METHODS[recipe.method](Run(store, recipe, *_outside(recipe, console, download=False)), recipe)
    return recipe, store


def show_plan(recipe: Recipe, console: Console, on: Hardware | None = None) -> None:
    """Prints the resolved recipe, what each stage would do, and what it needs on this machine or on `on`."""
    recipe, store = planned(recipe, console, on)
    console.line(to_yaml(recipe))
    console.table(f"plan of {store.run_dir}", ["stage", "state", "why"],
                  [[s["stage"], s["state"], s["why"]] for s in store.plan])
    if store.world.first:
        forecast.show(console, recipe, store, on)


Outside = tuple[Base, dict, dict]


def _outside(recipe: Recipe, console: Console, download: bool = True, first: Outside | None = None) -> Outside:
    """The start weights, the files of the recipe's hub datasets (see find_data), and the weights of writers that are
    not of this run, by path. What this run resolved before, or the `first` node now, stays at its commit."""
    if first is None:
        pins = read_run(Path(recipe.output_dir) / recipe.name).plan.get("base", {}).get("revisions", {})
    else:
        pins = {recipe.model.path: first[0].revision} | {path: commit for path, (_, commit) in first[1].items()}
        pins |= {path: base.revision for path, base in first[2].items()}
    base = find_base(recipe.model, console, download, pins.get(recipe.model.path))
    writers = [*getattr(recipe.sample, "models", ()), *getattr(getattr(recipe, "annotate", None), "models", ()),
               *([recipe.write_prompts] if recipe.write_prompts.enabled else [])]
    paths = {w.path for w in writers if getattr(w, "path", None) is not None}
    others = {path: find_base(Model(path=path), console, download, pins.get(path)) for path in sorted(paths)}
    return base, find_data(recipe.data, console, download, pins), others


def _on_node(store: Store, recipe: Recipe, first: Outside) -> Outside:
    """What _outside is on this node. first: on rank 0. Raises UserError if a file of the recipe is not on this node."""
    found = first if store.world.first else _outside(recipe, store.console, first=first)
    Run(Store(store.run_dir, store.world, store.console, planning=True), recipe, *found)
    return found


@contextmanager
def open_run(recipe: Named = "quickstart", overrides: dict[str, Any] | None = None, *,
             console: Console | None = None):
    """Locks the recipe's run directory and yields a Run, for your own methods:

        with strop.open_run("mine.yaml") as run:
            weights = strop.methods.rounds(run, run.recipe)

    Completed stages are kept, and the same code resumes. Raises UserError as train does."""
    prepare_environment()
    recipe = load_recipe(recipe, overrides)
    world = join(recipe.device, recipe.threads)
    recipe = world.settle_dtype(recipe)
    console = console or Console(enabled=world.first)
    run_dir, text = Path(recipe.output_dir) / recipe.name, to_yaml(recipe)
    store = Store(run_dir, world, console)
    store.lock()
    try:
        blind = mirror.begin(world, run_dir) if nodes.several() else []
        outside = world.share(_outside(recipe, console) if world.first else None)
        if blind:
            console.warn(f"output_dir={recipe.output_dir}: {', '.join(blind)} does not see the run directory of rank 0 "
                         "and keeps a copy of it")
            store.lock()
            _check_recipes(world, text)
            outside = mirror.on_nodes(world, lambda first=outside: _on_node(store, recipe, first))
        console.line(f"run directory {run_dir}   {world.size} rank(s), {world.hardware}, {recipe.dtype}   "
                     f"base {outside[0].name}")
        if why := restart.reason():
            console.warn(why)
        store.metrics = open_metrics(recipe, run_dir, console, world.first)
        console.note, store.after = run_dir / PROGRESS, [store.metrics.stage_done, Refresh(run_dir, console)]
        if world.first:
            write_atomic(run_dir / "config.yaml", lambda p: p.write_text(text, encoding="utf-8"))
        yield Run(store, recipe, *outside)
        store.metrics.close()
        if world.first:
            write_report(run_dir)
        mirror.spread(run_dir, top=True)
        world.barrier()
        nodes.leave()
    finally:
        mirror.end()
        console.note = None
        store.unlock()
        world.close()



def _check_recipes(world: World, text: str) -> None:
    """Raises UserError on every rank if a node has another recipe than rank 0."""
    other = [host for host in world.gather("" if text == world.share(text) else os.uname().nodename) if host]
    if other:
        raise UserError(f"{other[0]}: the recipe is not that of node 0; start the same command with the same file on "
                        "every node")
