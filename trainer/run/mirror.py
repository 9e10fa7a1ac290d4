"""Nodes that share no storage: every node keeps a copy of the run directory, and that of node 0 is the truth.

One rank of each such node, its keeper, compares its files with those of the others and copies what differs. With shared
storage rank 0 is the only keeper, nothing is compared, and there is no process group.
"""

import os
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from strop.trainer.errors import UserError
from strop.trainer.run.artifacts import WORK, list_files
from strop.trainer.run.files import hash_file, read_json, remove, sync, write_atomic, write_json, writing

if TYPE_CHECKING:  # readers of run directories need no torch
    from strop.trainer.run.world import World

CHUNK = 8 << 20  # bytes that are sent at a time
PATIENCE = 10.0  # seconds: a network file system may show new files late
INCOMING = ".incoming"  # in the folder that is copied: what has arrived so far
MET = ".met"  # in a stage's folder: the hashes of its files when nodes last met
T = TypeVar("T")

_mirror: "Mirror | None" = None


class Entry(NamedTuple):
    hash: str
    bytes: int
    time: int  # of the last change, ns; copies keep it


class Mirror:
    """The keepers of a run directory's copies, ranks in ascending order. On other ranks every method only waits."""

    def __init__(self, world: "World", keepers: list[int]):
        import torch.distributed as dist

        self.world, self.keepers = world, keepers
        self.index = keepers.index(world.rank) if world.rank in keepers else None
        # NCCL sends no files; ranks wait for a stage that only rank 0 runs
        self.group = dist.new_group(keepers, backend="gloo", timeout=timedelta(days=7))

    def spread(self, folder: Path, known: dict[str, dict] | None = None, top: bool = False) -> None:
        """Makes the folder on every node what it is on node 0, without scratch. known: node 0's files, as list_files
        returns them. top: only files directly in the folder, and none is deleted."""
        self.world.barrier()
        if self.index is not None:
            if known is None or self.index:
                known = list_files(folder, (lambda name: "/" not in name) if top else (lambda name: True))
            lists = self._gather(entries(folder, known))
            if not top:
                delete(folder, known.keys() - lists[0].keys())
            self._copy(folder, lists, dict.fromkeys(lists[0], 0))
        self.world.barrier()

    def meet(self, folder: Path) -> None:
        """Gives every node all files of the folder, scratch included, that any node has, except those that node 0 has
        deleted since they met. Of different ones the newest counts, and of .jsonl, to which ranks append, every
        line."""
        self.world.barrier()
        if self.index is not None:
            found = list_files(folder) | {f"{WORK}/{name}": e for name, e in list_files(folder / WORK).items()}
            lists = self._gather(entries(folder, {n: e for n, e in found.items() if not n.endswith(".log")}))
            had = read_json(folder / MET) if (folder / MET).exists() else {}
            deleted = {name: old for name, old in self._gather(had)[0].items() if name not in lists[0]}
            for i, files in enumerate(lists):
                gone = [name for name, entry in files.items() if entry.hash == deleted.get(name)]
                for name in gone:
                    del files[name]
                if i == self.index:
                    delete(folder, gone)
            merged = self._merge_lines(folder, lists)
            newest: dict[str, int] = {}
            for i, files in enumerate(lists):
                for name in files.keys() - merged:
                    if name not in newest or files[name].time > lists[newest[name]][name].time:
                        newest[name] = i
            self._copy(folder, lists, newest)
            write_json(folder / MET, {name: lists[i][name].hash for name, i in newest.items()})
        self.world.barrier()

    def _gather(self, value) -> list:
        import torch.distributed as dist

        found = [None] * len(self.keepers)
        dist.all_gather_object(found, value, group=self.group)
        return found

    def _copy(self, folder: Path, lists: list[dict[str, Entry]], sources: dict[str, int]) -> None:
        """Copies each file from the keeper `sources` names to those that lack it or have another one. A kill leaves
        none of them half there, and almost never only some of them."""
        arrived, incoming = [], folder / INCOMING
        for n, name in enumerate(sorted(sources)):
            source = sources[name]
            entry = lists[source][name]
            lacking = [i for i, files in enumerate(lists) if name not in files or files[name].hash != entry.hash]
            if not lacking:
                continue
            target = incoming / str(n) if self.index in lacking else None
            self._send(folder / name, entry, source, target)
            if target is not None:
                arrived.append((target, folder / name))
        with writing(folder):
            for target, path in arrived:
                path.parent.mkdir(parents=True, exist_ok=True)
                os.replace(target, path)
            for parent in {path.parent for _, path in arrived}:
                sync(parent)
        remove([incoming])

    def _send(self, path: Path, entry: Entry, source: int, target: Path | None) -> None:
        """Sends a file from keeper `source` to all others; one with a `target` writes it there."""
        import torch
        import torch.distributed as dist

        reader = open(path, "rb") if self.index == source else None  # noqa: SIM115 - closed below
        writer = None
        if target is not None:
            with writing(path):
                target.parent.mkdir(parents=True, exist_ok=True)
                writer = open(target, "wb")  # noqa: SIM115 - closed below
        for start in range(0, entry.bytes, CHUNK):
            chunk = torch.empty(min(CHUNK, entry.bytes - start), dtype=torch.uint8)
            if reader is not None and reader.readinto(chunk.numpy()) != len(chunk):
                raise UserError(f"{path}: changed while it was sent to other nodes; the same command resumes")
            dist.broadcast(chunk, self.keepers[source], group=self.group)
            if writer is not None:
                with writing(path, target):
                    writer.write(chunk.numpy())
        if reader is not None:
            reader.close()
        if writer is not None:
            with writing(path, target):
                writer.close()
                sync(target)
                os.utime(target, ns=(entry.time, entry.time))
            if hash_file(target) != entry.hash:
                raise UserError(f"{path}: damaged on another node, its content does not match its hash; delete its "
                                "folder on node 0 to re-run the stage")

    def _merge_lines(self, folder: Path, lists: list[dict[str, Entry]]) -> set[str]:
        """Gives each .jsonl file the lines that it has on other nodes only. Returns the names that differed."""
        done = set()
        for name in sorted({name for files in lists for name in files if name.endswith(".jsonl")}):
            versions = {files[name].hash: i for i, files in reversed([*enumerate(lists)]) if name in files}
            if len(versions) < 2:
                continue
            done.add(name)
            path, copy, texts = folder / name, folder / INCOMING / "lines", []
            for i in sorted(versions.values()):
                self._send(path, lists[i][name], i, None if i == self.index else copy)
                texts.append((path if i == self.index else copy).read_bytes().splitlines())
            remove([folder / INCOMING])
            every = dict.fromkeys(line for text in texts for line in text)
            # a rank of this node may have the file open, so one that has every line is not replaced
            if not path.exists() or not set(path.read_bytes().splitlines()).issuperset(every):
                whole = next((text for text in texts if set(text) == set(every)), every)
                with writing(path):
                    path.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(path, lambda p, whole=whole: p.write_bytes(b"".join(line + b"\n" for line in whole)))
        return done


def entries(folder: Path, files: dict[str, dict]) -> dict[str, Entry]:
    if missing := next((name for name in files if not (folder / name).exists()), None):
        raise UserError(f"{folder / missing}: missing; delete the folder {folder} to re-run it")
    return {name: Entry(entry["hash"], entry["bytes"], (folder / name).stat().st_mtime_ns)
            for name, entry in files.items()}


def delete(folder: Path, names: Iterable[str]) -> None:
    """Deletes files, and folders that are empty then: an empty one would look like a checkpoint."""
    for path in [folder / name for name in names]:
        path.unlink()
        while (path := path.parent) not in (folder, folder / WORK) and not any(path.iterdir()):
            path.rmdir()


def begin(world: "World", run_dir: Path) -> list[str]:
    """Finds out which nodes see whose run directory, and starts to copy it if some do not see that of rank 0. Every
    rank calls it. Returns the names of these nodes, on every rank."""
    global _mirror
    token, leads = world.share(os.urandom(8).hex()), os.environ.get("LOCAL_RANK") == "0"
    leaders = [rank for rank in world.gather(world.rank if leads else None) if rank is not None]
    signs = {rank: run_dir / f".seen-{rank}.tmp" for rank in leaders}
    if leads:
        with writing(run_dir):
            run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomic(signs[world.rank], lambda p: p.write_text(token))
    world.barrier()

    def seen() -> list[int]:
        return [rank for rank, sign in signs.items() if sign.is_file() and sign.read_text() == token]

    until = time.monotonic() + PATIENCE
    while leads and 0 not in seen() and time.monotonic() < until:
        time.sleep(0.2)
    found = world.gather((min(seen()), os.uname().nodename) if leads else None)
    if leads:
        signs[world.rank].unlink(missing_ok=True)
    keepers = sorted({keeper for keeper, _ in filter(None, found)})
    if len(keepers) > 1:
        _mirror = Mirror(world, keepers)
    return [host for keeper, host in filter(None, found) if keeper]


def end() -> None:
    global _mirror
    _mirror = None


def is_on() -> bool:
    """Whether nodes keep copies of the run directory."""
    return _mirror is not None


def keeps(world: "World") -> bool:
    """Whether this rank looks after a run directory: rank 0, and one of each node that has a copy."""
    return world.first if _mirror is None else _mirror.index is not None


def spread(folder: Path, known: dict[str, dict] | None = None, top: bool = False) -> None:
    """See Mirror.spread; does nothing if storage is shared."""
    if _mirror is not None:
        _mirror.spread(folder, known, top)


def meet(folder: Path) -> None:
    """See Mirror.meet; does nothing if storage is shared."""
    if _mirror is not None:
        _mirror.meet(folder)


def on_nodes(world: "World", make: Callable[[], T]) -> T:
    """What make() returns on rank 0, and if nodes keep copies on the first rank of this node. Raises UserError on every
    rank if it does on one."""
    if _mirror is None:
        return world.share(make() if world.first else None)
    local, mine = int(os.environ["LOCAL_RANK"]), None
    if local == 0:
        try:
            mine = "", make()
        except UserError as e:
            mine = f"{os.uname().nodename}: {e}", None
    found = world.gather(mine)
    for error, _ in filter(None, found):
        if error:
            raise UserError(error)
    return found[world.rank - local][1]
