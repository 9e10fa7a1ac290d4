"""Merge: the round's last weights, their EMA or an average of checkpoints."""

from pathlib import Path

from strop.trainer.config import Merge
from strop.trainer.models.averaging import combine, copy_folder, linear, slerp, task_arithmetic, toward, warp
from strop.trainer.run.store import Stage


def merge(stage: Stage, *, merge: Merge, start: Path, trained: dict[str, Path]) -> None:
    """Writes model/: the last weights, their EMA or an average, interpolated with `start`.

    start: a model folder. trained: the artifacts of the training stages, in order, by their names in merge.members.
    """
    folders, weights = members_of(merge, start, trained)
    single = len(folders) == 1 and merge.method in ("last", "average", "ema")
    target = stage.dir / "model"
    stage.counts["checkpoints"] = len(folders) + (merge.interpolate < 1)
    if folders == [start] or (single and merge.interpolate == 1):
        copy_folder(folders[0], target)
        return

    def formula(base, tensors):
        match merge.method:
            case "slerp":
                merged = slerp(*tensors, merge.t)
            case "warp":
                merged = warp(base, *tensors, merge.t)
            case "task_arithmetic":
                merged = task_arithmetic(base, tensors, weights)
            case _:
                merged = linear(tensors, weights)
        return merged if merge.interpolate == 1 else toward(base, merged, merge.interpolate)

    combine(folders, start, target, formula, merge.interpolate < 1 or merge.method in ("warp", "task_arithmetic"))


def average(stage: Stage, *, runs: list[Path]) -> None:
    """Writes model/: the uniform average of model folders of one architecture, causal LMs or reward models, with the
    tokenizer of the first one (model soups, arXiv 2203.05482)."""
    combine(runs, runs[0], stage.dir / "model", lambda base, tensors: linear(tensors, [1 / len(runs)] * len(runs)),
            uses_start=False)
    stage.counts["checkpoints"] = len(runs)


def members_of(section: Merge, start: Path, trained: dict[str, Path]) -> tuple[list[Path], list[float]]:
    """The folders that the method combines, and the weight of each: of averages they sum to 1."""
    if not trained:
        return [start], [1.0]
    if section.method in ("last", "ema"):
        last = list(trained.values())[-1]
        return [last / ("ema" if section.method == "ema" else "model")], [1.0]
    if section.method != "average":
        folders = [trained[name] / "model" if name in trained else start for name in section.members]
        return folders, section.weights or [1.0] * len(folders)
    mixture = []
    weights = section.weights or [1.0] * len(section.members)
    for name, weight in zip(section.members, weights, strict=True):
        folder = trained.get(name, start)
        checkpoints = [start] if name == "start" else [*sorted((folder / "snapshots").glob("step-*")), folder / "model"]
        # by default uniform over checkpoints, not over stages
        mixture += [(c, weight / len(checkpoints) if section.weights else 1.0) for c in checkpoints]
    total = sum(weight for _, weight in mixture)
    return [path for path, _ in mixture], [weight / total for _, weight in mixture]
