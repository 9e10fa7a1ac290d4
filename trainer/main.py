"""What torchrun starts: parse, set up, run, tear down. `--help` lists every key."""

import os
import sys
import time
from pathlib import Path

# libraries' bars and warnings would break up a run's own lines, and whatever the environment says, it fetches nothing
os.environ.update({"TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error",
                   **os.environ, "HF_HUB_OFFLINE": "1"})

try:
    from strop.trainer.cli import Command, answer, parse, to_yaml
except ModuleNotFoundError as e:
    sys.exit(f"{e}: install Strop first, with `make run` or `pip install -e .` in the folder above trainer/")


def run(command: Command) -> None:
    from strop.trainer.console import Console
    from strop.trainer.loop import run_recipe
    from strop.trainer.metrics import open_metrics
    from strop.trainer.models import find_base
    from strop.trainer.report import Refresh, write_report
    from strop.trainer.results import print_results
    from strop.trainer.store import Store, write_atomic
    from strop.trainer.world import join

    started, world = time.perf_counter(), join(command.recipe.device, command.recipe.threads)
    recipe = world.settle_dtype(command.recipe)
    console = Console(enabled=world.first)
    run_dir, text = Path(recipe.output_dir) / recipe.name, to_yaml(recipe)
    store = Store(run_dir, world, console, plan=command.plan)
    if command.plan:
        run_recipe(store, recipe, find_base(recipe.model, console, convert=False))
        console.line(text)
        console.table(f"plan of {run_dir}", ["stage", "state", "why"], [list(plan) for plan in store.plans])
        return
    store.lock()
    base = world.share(find_base(recipe.model, console) if world.first else None)
    console.line(f"run directory {run_dir}   {world.size} rank(s), {world.hardware}, {recipe.dtype}   base {base.name}")
    store.metrics = open_metrics(recipe, run_dir, console, world.first)
    console.note, store.after = run_dir / "progress.json", [store.metrics.stage_done, Refresh(run_dir, console)]
    if world.first:
        write_atomic(run_dir / "config.yaml", lambda p: p.write_text(text, encoding="utf-8"))
    final = run_recipe(store, recipe, base)
    store.metrics.close()
    if world.first:
        print_results(run_dir, console, recipe.evaluate.bootstrap)
        console.line(f"{time.perf_counter() - started:.0f} s   weights {final.path}   report {write_report(run_dir)}")
    world.close()


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    first = os.environ.get("RANK", "0") == "0"
    try:
        command = parse(argv)
        if command.recipe is not None:
            run(command)
        elif first:
            answer(command)
    except BrokenPipeError:  # the reader of --help or --plan has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except (ValueError, OSError) as e:
        if "--debug" in argv:
            raise
        if not first:
            time.sleep(2)  # rank 0 has most likely said the same, and torchrun then ends this process
        text = f"{e.filename}: {e.strerror}" if isinstance(e, OSError) and e.filename else str(e)
        print("error: " + text.replace("\n", "\nerror: "), file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
