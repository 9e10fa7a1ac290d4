"""Strop from Python: run recipes, read runs, call methods. This folder is the package `strop` itself.

Importing it loads neither torch nor transformers; the first use of a name does. docs/api.md has examples.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from strop.trainer import methods
    from strop.trainer.cli import load_recipe
    from strop.trainer.config import Recipe
    from strop.trainer.errors import UserError
    from strop.trainer.methods.run import Run
    from strop.trainer.methods.running import open_run, plan, train
    from strop.trainer.reports.reading import RunRecord, load_run

_HOMES = {
    "Recipe": "strop.trainer.config",
    "Run": "strop.trainer.methods.run",
    "RunRecord": "strop.trainer.reports.reading",
    "UserError": "strop.trainer.errors",
    "load_recipe": "strop.trainer.cli",
    "load_run": "strop.trainer.reports.reading",
    "open_run": "strop.trainer.methods.running",
    "plan": "strop.trainer.methods.running",
    "train": "strop.trainer.methods.running",
}
__all__ = ["Recipe", "Run", "RunRecord", "UserError", "load_recipe", "load_run", "methods", "open_run", "plan", "train"]


def __getattr__(name: str):
    if name == "methods":
        return import_module("strop.trainer.methods")
    if name not in _HOMES:
        raise AttributeError(f"module 'strop' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
