"""Merge: averages weights in fp32, rounded once."""

import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from strop.trainer.config import Merge
from strop.trainer.errors import UserError
from strop.trainer.models.folders import finish_folder
from strop.trainer.models.loading import read_tensors
from strop.trainer.run.files import writing
from strop.trainer.run.store import Stage


def merge(stage: Stage, *, merge: Merge, start: Path, trained: dict[str, Path]) -> None:
    """Writes model/: the last weights, their EMA or an average, interpolated with `start`.

    start: a model folder. trained: the artifacts of the training stages, in order, by their names in merge.members.
    """
    mixture = mixture_of(merge, start, trained)
    if merge.interpolate < 1:
        mixture = [(path, weight * merge.interpolate) for path, weight in mixture]
        mixture.append((start, 1 - merge.interpolate))
    average(mixture, stage.dir / "model")
    stage.counts["checkpoints"] = len(mixture)


def mixture_of(section: Merge, start: Path, trained: dict[str, Path]) -> list[tuple[Path, float]]:
    """The folders to average and their weights, which sum to 1."""
    if not trained:
        return [(start, 1.0)]
    last = list(trained.values())[-1]
    if section.method in ("last", "ema"):
        return [(last / ("ema" if section.method == "ema" else "model"), 1.0)]
    mixture = []
    weights = section.weights or [1.0] * len(section.members)
    for name, weight in zip(section.members, weights, strict=True):
        folder = trained.get(name, start)
        checkpoints = [start] if name == "start" else [*sorted((folder / "snapshots").glob("step-*")), folder / "model"]
        # by default uniform over checkpoints, not over stages
        mixture += [(c, weight / len(checkpoints) if section.weights else 1.0) for c in checkpoints]
    total = sum(weight for _, weight in mixture)
    return [(path, weight / total) for path, weight in mixture]


def average(mixture: list[tuple[Path, float]], target: Path) -> None:
    """Writes the weighted sum of model folders of one architecture, a tensor at a time, accumulated in fp32.

    Raises UserError if the folders do not have the same tensors.
    """
    first, files = mixture[0][0], [read_tensors(path) for path, _ in mixture]
    if not all("lm_head.weight" in f for f in files):  # a tied head may be saved in some of the folders only
        for found in files:
            found.pop("lm_head.weight", None)
    for (path, _), found in zip(mixture, files, strict=True):
        if found.keys() != files[0].keys():
            odd = sorted(found.keys() ^ files[0].keys())
            raise UserError(f"{path}: does not hold the tensors of {first} ({odd[0]}); they cannot be averaged")
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    with writing(target, temporary):
        write_average(mixture, files, first, temporary)
        finish_folder(temporary, first, target)


def write_average(mixture: list[tuple[Path, float]], files: list[dict], first: Path, target: Path) -> None:
    """files: what read_tensors found in each folder of the mixture."""
    for file in sorted({f for f, _ in files[0].values()}):
        tensors = {}
        for name in (n for n, (f, _) in files[0].items() if f == file):
            parts = [(found[name][1], weight) for found, (_, weight) in zip(files, mixture, strict=True)]
            total = torch.zeros_like(parts[0][0], dtype=torch.float32)
            for tensor, weight in parts:
                total.add_(tensor.float(), alpha=weight)
            tensors[name] = total.to(parts[0][0].dtype) if len(parts) > 1 else parts[0][0]
        save_file(tensors, target / file.name, metadata={"format": "pt"})
    for name in ("config.json", "model.safetensors.index.json"):
        if (first / name).exists():
            shutil.copyfile(first / name, target / name)
