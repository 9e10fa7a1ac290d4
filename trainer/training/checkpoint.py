"""Resume points: step-NNNNNN/ with the state of a training, from one rank or a part of it from each.

A tensor is saved whole or as flat slices, [start, end) of its elements in row-major order, one in the file of each
rank. So what one number of ranks or one engine wrote, another one reads.
"""

import json
import os
import threading
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from strop.trainer.errors import UserError
from strop.trainer.run import mirror, stopping
from strop.trainer.run.artifacts import check_file, list_files
from strop.trainer.run.files import read_json, remove, write_json, writing
from strop.trainer.run.world import World

PATIENCE = 60.0  # seconds that a write may still take when training fails
_writing: threading.Thread | None = None  # of this process, also of a training that failed


class Checkpoints:
    """Writes resume points on a thread while training goes on, one after another. As a context it waits for the last.

    An error of a write, on any rank, is raised by `finish`."""

    def __init__(self, world: World, group: dist.ProcessGroup | None = None):
        """group: of all ranks, which nothing else uses, if each writes a part; else only the first rank writes."""
        self.world, self.group = world, group
        self.error: Exception | None = None

    def begin(self, work: Path, about: dict, kept: Callable[[], dict], tensors: dict[str, torch.Tensor],
              starts: dict[str, int] | None = None) -> None:
        """Waits for the last write, copies the tensors to the host and returns while they are written; see
        write_checkpoint."""
        global _writing
        self.finish()
        copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        arguments = work, about, kept, copies, self.world, self.group, starts

        def write() -> None:
            try:
                write_checkpoint(*arguments)
            except Exception as e:
                self.error = e

        _writing = threading.Thread(target=write, name="checkpoint", daemon=True)
        _writing.start()

    def finish(self) -> None:
        """Waits until nothing is written any more. Raises UserError if that failed."""
        if _writing:
            _writing.join()
        if self.error:
            error, self.error = self.error, None
            raise error

    def __enter__(self) -> None:
        self.finish()

    def __exit__(self, kind, *error) -> None:
        if kind is None:
            self.finish()
        elif _writing:  # what is whole a moment later is better than the point before it
            _writing.join(stopping.PATIENCE if stopping.requested() else PATIENCE)


def write_checkpoint(work: Path, about: dict, kept: Callable[[], dict], tensors: dict[str, torch.Tensor], world: World,
                     group: dist.ProcessGroup | None = None, starts: dict[str, int] | None = None) -> None:
    """Writes work/step-NNNNNN and deletes older ones.

    about: "step" and what else state.json shall hold; kept(): further files that the resume point needs, with their
    hashes. Without a group the first rank writes whole tensors, and only this one calls it. With a group every rank
    does, and writes flat slices, the first element of each at starts[name]. Raises UserError on every rank if one
    cannot write; the older ones are then kept.
    """
    target, temporary = (work / f"{prefix}-{about['step']:06}" for prefix in ("step", ".checkpoint"))
    name = "state.safetensors" if group is None else f"state-{world.rank:05}-of-{world.size:05}.safetensors"
    keeps = mirror.keeps(world)  # nodes without shared storage have a folder each, with the files of their ranks

    def on_all(act: Callable[[], dict | None]) -> list[dict]:
        """What act() returns on every rank, once it has on all of them."""
        error, found = None, None
        try:
            with writing(target):
                found = act()
        except UserError as e:
            error = str(e)
        results = [(error, found)] * (1 if group is None else world.size)
        if group is not None:
            dist.all_gather_object(results, (error, found), group=group)
        if errors := [e for e, _ in results if e]:
            if keeps:
                remove([temporary])
            raise UserError(errors[0])
        return [found for _, found in results]

    def begin() -> None:
        if keeps:
            remove([temporary])
            temporary.mkdir()

    def write() -> dict:
        save_file(tensors, temporary / name, None if starts is None else {"starts": json.dumps(starts)})
        with open(temporary / name, "rb") as f:
            os.fsync(f.fileno())
        return list_files(temporary / name)

    def rename() -> None:
        remove([target])
        os.replace(temporary, target)

    def rename_last() -> None:
        if world.first:
            files = {name: entry for part in parts for name, entry in part.items()}
            write_json(temporary / "state.json", about | {"files": files, "kept": kept()})
            rename()

    def clean() -> None:
        if keeps:
            remove(old for old in work.glob("step-*") if old != target)

    on_all(begin)
    parts = on_all(write)
    if mirror.is_on():
        on_all(lambda: rename() if keeps and not world.first else None)
    on_all(rename_last)
    on_all(clean)


def checkpoints_in(work: Path) -> list[Path]:
    """The whole resume points, oldest first; a folder without state.json is the part of another node."""
    return sorted(path.parent for path in work.glob("step-*/state.json"))


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
