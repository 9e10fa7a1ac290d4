"""Rows and stages for the tests of training: the same rows go through every way of running them."""

import random
from pathlib import Path

import pyarrow as pa
import torch
from safetensors.torch import load_file

from strop.trainer.config import Recipe
from strop.trainer.run.console import Console
from strop.trainer.run.store import Stage
from strop.trainer.run.tables import write_table
from strop.trainer.run.world import World


class Log:
    """Stands in for Metrics: keeps what is logged, and can stop the run at a step as a kill would."""

    def __init__(self, stop_at=None):
        self.rows, self.stop_at = [], stop_at

    def log(self, stage, step, values, total=None):
        self.rows.append(values)
        if step == self.stop_at:
            raise KeyboardInterrupt

    def rewind(self, stage, step):
        self.rewound_to = step


def stage_in(folder: Path, name: str, log=None) -> Stage:
    folder.mkdir(parents=True, exist_ok=True)
    return Stage(name, folder, World(), Console(enabled=False), log or Log())


def recipe_of(**keys) -> Recipe:
    base = {"dtype": "float32", "data": {"sft": [{"name": "x", "path": "x"}]}}
    return Recipe.model_validate(base | keys)


def select_of(folder: Path, n: int = 12, seed: int = 0, vocab: int = 90, **columns) -> Path:
    """A select artifact of n random rows and n random pairs; some template tokens are masked out of the pairs."""
    draw = random.Random(seed)

    def ids(low, high):
        return [draw.randrange(3, vocab) for _ in range(draw.randint(low, high))]

    sft, pairs = [], []
    for i in range(n):
        prompt, chosen, rejected = ids(2, 12), ids(1, 9), ids(1, 9)
        shared = {"row_id": f"r{i:03}", "source": "s", "prompt_id": f"p{i}", "prompt_tokens": prompt, "weight": 1.0,
                  "origin": "round-00"} | columns
        sft.append(shared | {"sample_index": 0, "completion_tokens": chosen, "score": 1.0,
                             "loss_mask": [True] + [draw.random() < 0.8 for _ in chosen[1:]]})
        pairs.append(shared | {"chosen_tokens": chosen, "rejected_tokens": rejected, "chosen_score": 1.0,
                               "rejected_score": 0.0, "margin": None, "chosen_mask": [True] * len(chosen),
                               "rejected_mask": [True] * len(rejected),
                               "chosen_template": [False] * (len(chosen) - 1) + [len(chosen) > 1],
                               "rejected_template": [False] * (len(rejected) - 1) + [len(rejected) > 1]} | columns)
    folder.mkdir(parents=True, exist_ok=True)
    write_table(folder / "sft.parquet", pa.Table.from_pylist(sft))
    write_table(folder / "pairs.parquet", pa.Table.from_pylist(pairs))
    return folder


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def largest_difference(a: Path, b: Path) -> float:
    a, b = weights_of(a), weights_of(b)
    assert a.keys() == b.keys()
    return max((a[k].float() - b[k].float()).abs().max().item() for k in a)
