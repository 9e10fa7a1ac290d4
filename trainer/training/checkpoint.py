"""Resume points: step-NNNNNN/ with the state of a training, from one rank or a part of it from each.

A tensor is saved whole or as flat slices, [start, end) of its elements in row-major order, one in the file of each
rank. So what one number of ranks or one engine wrote, another one reads.
"""

import json
import os
import shutil
from collections import defaultdict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from strop.trainer.errors import UserError
from strop.trainer.run.artifacts import check_file, list_files
from strop.trainer.run.files import read_json, write_json, writing
from strop.trainer.run.world import World


def write_checkpoint(work: Path, about: dict, tensors: dict[str, torch.Tensor], world: World,
                     starts: dict[str, int] | None = None) -> None:
    """Writes work/step-NNNNNN and deletes older ones.

    about: "step" and what else state.json shall hold. Without `starts` the first rank writes whole tensors; with it
    every rank writes flat slices, the first element of each at starts[name]. Raises UserError on every rank that
    writes, if one cannot; the older ones are then kept.
    """
    if starts is None and not world.first:
        return
    target, temporary = (work / f"{prefix}-{about['step']:06}" for prefix in ("step", ".checkpoint"))
    name = "state.safetensors" if starts is None else f"state-{world.rank:05}-of-{world.size:05}.safetensors"
    error, entry = None, {}
    if world.first:
        with writing(target, temporary):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
    if starts is not None:
        world.barrier()
    try:
        with writing(target, temporary):
            metadata = None if starts is None else {"starts": json.dumps(starts)}
            save_file({k: v.contiguous() for k, v in tensors.items()}, temporary / name, metadata)
            with open(temporary / name, "rb") as f:
                os.fsync(f.fileno())
            entry = list_files(temporary / name)
    except UserError as e:
        if starts is None:
            raise
        error = str(e)
    if starts is not None:
        found = world.gather((error, entry))
        if errors := [e for e, _ in found if e]:
            raise UserError(errors[0])
        entry = {name: value for _, files in found for name, value in files.items()}
    if world.first:
        with writing(target, temporary):
            write_json(temporary / "state.json", about | {"files": entry})
            shutil.rmtree(target, ignore_errors=True)
            os.replace(temporary, target)
        for old in work.glob("step-*"):
            if old != target:
                shutil.rmtree(old)
    if starts is not None:
        world.barrier()


def newest_checkpoint(work: Path) -> Path | None:
    return max(work.glob("step-*"), default=None)


def check_checkpoint(point: Path, world: World) -> dict:
    """state.json of a resume point. The ranks check the hashes of its files and of kept snapshots between them; all
    raise UserError if one is damaged."""
    state, work, error = read_json(point / "state.json"), point.parent, None
    files = [(point / name, entry) for name, entry in state["files"].items()]
    files += [(work.parent / name, entry) for name, entry in state["kept"].items()]
    try:
        for path, entry in files[world.rank::world.size]:
            check_file(path, entry, f"delete the folder {work} to train the stage from its start")
    except UserError as e:
        error = str(e)
    if errors := [e for e in world.gather(error) if e]:
        raise UserError(errors[0])
    return state


class Saved:
    """The tensors of a resume point, from however many files."""

    def __init__(self, point: Path, files: list[str]):
        self.parts: dict[str, list[tuple]] = defaultdict(list)  # name -> (first element, end, file)
        for file in (safe_open(point / name, "pt") for name in sorted(files)):
            starts = json.loads((file.metadata() or {}).get("starts", "{}"))
            for name in file.keys():  # noqa: SIM118 - not a dict
                first = starts.get(name, 0)
                end = first + torch.Size(file.get_slice(name).get_shape()).numel()
                self.parts[name].append((first, end, file))

    def __contains__(self, name: str) -> bool:
        return name in self.parts

    def read(self, name: str, start: int, count: int) -> torch.Tensor:
        """Elements [start, start + count) of a tensor, flat, on the host."""
        pieces, end = [], start + count
        for first, last, file in sorted(self.parts[name], key=lambda part: part[:2]):
            a, b = max(start, first), min(end, last)
            if a < b:
                saved = file.get_slice(name)
                flat = saved[a - first:b - first] if len(saved.get_shape()) == 1 else file.get_tensor(name).flatten()
                pieces.append(flat if len(flat) == b - a else flat[a - first:b - first])
        found = torch.cat(pieces) if pieces else torch.zeros(0)
        assert len(found) == count, (name, start, count, len(found))
        return found
