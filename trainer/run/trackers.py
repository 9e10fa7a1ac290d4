"""Experiment trackers (Weights & Biases, trackio): optional views of a run besides metrics.jsonl."""

import importlib
import os
import secrets
from pathlib import Path

from strop.trainer.errors import UserError
from strop.trainer.run.files import read_json, write_json


class Tracker:
    """A tracker of a run. If it fails during the run, it warns once and logs nothing more; the run continues."""

    def __init__(self, module, console):
        self.module, self.console, self.stages = module, console, set()

    def log(self, stage: str, values: dict) -> None:
        """Logs values as `<stage>/<name>`. A stage that resumes from a checkpoint logs some steps again."""
        if self.module is None:
            return
        try:
            if stage not in self.stages and hasattr(self.module, "define_metric"):
                self.module.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            self.stages.add(stage)
            self.module.log({f"{stage}/{name}": value for name, value in values.items()})
        except Exception as e:
            self.drop(e)

    def close(self) -> None:
        if self.module is not None:
            try:
                self.module.finish()
            except Exception as e:
                self.drop(e)

    def drop(self, e: Exception) -> None:
        name, self.module = self.module.__name__, None
        self.console.warn(f"{name}: {first_line(e)}; tracker disabled, metrics.jsonl has all metrics")


def open_trackers(recipe, run_dir: Path, console) -> list[Tracker]:
    """The trackers in log.report_to; a resumed run keeps its id, which is in trackers.json.

    Keys, modes and projects come from their own environment variables (WANDB_API_KEY, WANDB_MODE, WANDB_PROJECT,
    TRACKIO_PROJECT, ...), never from the recipe. Raises UserError if one is not installed or does not start.
    """
    modules = {name: load(name) for name in recipe.log.report_to}
    path = run_dir / "trackers.json"
    run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    ids = {name: secrets.token_hex(4) for name in modules} | (read_json(path) if path.exists() else {})
    write_json(path, ids)
    trackers = []
    for name, module in modules.items():
        project = os.environ.get(f"{name.upper()}_PROJECT", "strop")
        options = {"name": f"{recipe.name}-{ids[name]}"}
        if name == "wandb":
            options = {"name": recipe.name, "id": ids[name], "dir": str(run_dir)}
        try:
            module.init(project=project, config=recipe.model_dump(mode="json"), resume="allow", **options)
        except Exception as e:
            raise UserError(f"log.report_to={name}: {name} does not start: {first_line(e)}; fix this, or remove {name} "
                             "from log.report_to") from e
        trackers.append(Tracker(module, console))
    return trackers


def load(name: str):
    try:
        return importlib.import_module(name)
    except ImportError as e:
        if e.name != name:
            raise UserError(f"log.report_to={name}: {first_line(e)}") from e
        raise UserError(f"log.report_to={name}: {name} is not installed: pip install {name}") from e


def first_line(e: Exception) -> str:
    return f"{type(e).__name__}: {(str(e).strip() or '?').splitlines()[0]}"
