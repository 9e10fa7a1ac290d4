"""The run directory: immutable artifacts with manifests, atomic writes, resume, staleness, and the plan.

A stage writes to `<name>.partial/`, which survives a kill. When its function returns, every file is hashed and fsynced,
`manifest.json` is written, and the directory is renamed to `<name>/`. A stage is up to date if the key in its manifest
equals the hash of its config and of its inputs' contents.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strop.trainer.config import key_of
from strop.trainer.errors import UserError
from strop.trainer.run import mirror
from strop.trainer.run.artifacts import (
    WORK,
    Artifact,
    check_file,
    check_unchanged,
    content_hash,
    list_files,
    read_manifest,
    versions,
)
from strop.trainer.run.files import (
    check_file_types,
    hash_json,
    remedy_of,
    remove,
    sync,
    write_atomic,
    write_json,
    writing,
)

if TYPE_CHECKING:  # readers of run directories need no torch
    from strop.trainer.run.world import World

PLAN = "plan.json"


@dataclass
class Stage:
    """The first argument of every stage function."""

    name: str
    dir: Path
    world: World
    console: Any
    metrics: Any
    round: int | None = None
    counts: dict[str, float] = field(default_factory=dict)
    ahead: Callable | None = None  # see Store.stage

    @property
    def scored(self) -> Path:
        """Folder beside the artifact for values of its samples, until they are scored; see trainer/scoring/ahead.py."""
        return self.dir.with_name(self.dir.name.removesuffix(".partial") + ".scored")

    @property
    def work(self) -> Path:
        """Scratch space that survives a kill; deleted when the stage is done."""
        path = self.dir / WORK
        path.mkdir(parents=True, exist_ok=True)
        return path

    def meet(self) -> None:
        """A barrier, after which every rank sees what all ranks wrote."""
        self.world.barrier()
        mirror.meet(self.dir)

    def nothing_to_learn(self, why: str) -> None:
        """Raises UserError(why) in the first round. A later round goes on with the weights that it has, so that
        earlier rounds are not lost, and warns."""
        if not self.round:
            raise UserError(why)
        self.console.warn(f"{self.name}: the weights stay as they are: {why}")


class Store:
    """A run directory. With `planning=True` nothing runs and nothing is written.

    plan: the stages so far, as in plan.json: stage, kind, title, round, inputs (name -> folder in the run directory, or
    "outside"), state ("done", "stale", "to run" or "running") and why.
    """

    def __init__(self, run_dir: Path, world: World, console: Any, metrics: Any = None, planning: bool = False):
        self.run_dir, self.world, self.console, self.metrics = run_dir, world, console, metrics
        self.planning = planning
        self.plan: list[dict] = []
        self.asked: dict[str, dict] = {}  # while planning: the sections of each stage
        self.about: dict = {}  # further keys of plan.json: name, method, base
        self.after: list = []  # callbacks on the first rank: called with the manifest of each stage that ran
        self._checked: set[Path] = set()
        self._lock = self._folder = None

    def lock(self) -> None:
        """Locks the run directory, and every copy of it, for this run. Raises UserError if another process holds it."""
        if not mirror.keeps(self.world) or self._lock is not None:
            return
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = open(self.run_dir / ".lock", "a+")  # noqa: SIM115 - held until unlock()
            self._folder = os.open(self.run_dir, os.O_RDONLY)
        except OSError as e:
            raise UserError(f"{self.run_dir}: cannot be written ({e.strerror}); {remedy_of(e)}") from e
        # a process that was just killed can hold the lock a moment longer, through a child process
        for patience in (0.1, 0.2, 0.4, 0.8, 0):
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _lock_folder(self._folder)  # holds if somebody deletes .lock
                break
            except BlockingIOError as e:
                if not patience:
                    self._lock.seek(0)
                    pid = self._lock.read().strip() or "?"
                    self.unlock()
                    raise UserError(f"{self.run_dir}: process {pid} is running it; wait for it to end or choose "
                                    "another name=") from e
                time.sleep(patience)
        with writing(self.run_dir / ".lock"):
            self._lock.truncate(0)
            self._lock.write(str(os.getpid()))
            self._lock.flush()
        remove(self.run_dir.glob(".*.tmp"))
        check_file_types(self.run_dir)

    def unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            os.close(self._folder)
            self._lock = None

    def stage(self, name: str, function, *, config: dict, inputs: dict, kind: str, title: str = "",
              round: int | None = None, all_ranks: bool = False, ahead: Callable | None = None) -> Artifact:
        """The artifact of stage `name`: cached if it is up to date, else `function(stage, **config, **inputs)` runs.

        config: sections, parts of sections and plain values, which are hashed into the stage's key. inputs: artifacts
        (also in dicts and lists), passed to the function as paths, and plain values. all_ranks: every rank calls the
        function, else only rank 0. kind, title and round describe the stage in plan.json. ahead(stage, idle) opens
        what scores its samples as they come, on which no artifact depends.
        """
        key_config, hashes = json.loads(json.dumps(key_of(config))), _walk(inputs, lambda a: a.hash)
        final, key = self.run_dir / name, hash_json({"stage": name, "config": key_config, "inputs": hashes})
        artifacts: list[Artifact] = []
        _walk(inputs, artifacts.append)
        waiting = any(a.hash is None for a in artifacts)
        if mirror.is_on() and not self.planning:
            self._check_equal(inputs, hashes)
            found = self._state(final, key, key_config, hashes, waiting) if self.world.first else None
            (state, why), key = self.world.share((found, key))  # a copy may be older
        else:
            state, why = self._state(final, key, key_config, hashes, waiting)
        entry = {"stage": name, "kind": kind, "title": title or name.split("/")[-1], "round": round,
                 "inputs": self._origins(inputs), "state": state, "why": why}
        if self.planning:
            self.plan.append(entry)
            self.asked[name] = config
            return self._load(final) if state == "done" else Artifact(final, None)
        self.world.barrier()  # all ranks have read the state before rank 0 moves anything
        if state != "done":
            if state == "stale":
                self.console.warn(f"{name}: re-running, because {why or 'its manifest changed'}; the old artifact is "
                                  f"kept in {self.run_dir / 'stale'}")
            self.verify(inputs)
            self._note(entry | {"state": "running"})
            stage = Stage(name, final.parent / f"{final.name}.partial", self.world, self.console, self.metrics, round,
                          ahead=ahead)
            self._run(stage, key, function, config, inputs, all_ranks,
                      {"kind": kind, "config": key_config, "inputs": hashes})
        else:
            self.console.line(f"{name}: up to date")
            self._copy(final)
            if mirror.keeps(self.world):
                shutil.rmtree(final / WORK, ignore_errors=True)
        self._note(entry | {"state": "done", "why": ""})
        return self._load(final)

    def _check_equal(self, inputs: dict, hashes: dict) -> None:
        """Raises UserError on every rank if an input of a stage is another one on some node."""
        mine = _flat(hashes)
        first = self.world.share(mine)
        paths = _known(_walk(inputs, lambda a: str(a.path), lambda plain: None))
        wrong = [k for k in first | mine if first.get(k) != mine.get(k)]
        wrong = [paths[k] for k in wrong if k in paths] + wrong
        found = self.world.gather(f"{os.uname().nodename}: {wrong[0]}" if wrong else "")
        if named := next(filter(None, found), None):
            raise UserError(f"{named}: is not what it is on node 0; the nodes share no storage, so copy it to each")

    def _copy(self, final: Path) -> None:
        """Makes every node's copy of an artifact that of node 0, if they share no storage."""
        if not mirror.is_on():
            return
        manifest = final / "manifest.json"
        text, known = self.world.share(_text(manifest) if self.world.first else None), None
        if self.world.first:
            known = read_manifest(final)["files"] | list_files(manifest)
        elif mirror.keeps(self.world):
            partial = final.parent / f"{final.name}.partial"
            if _text(manifest) not in (None, text):
                self._set_aside(final)
            if not final.exists() and _text(partial / "manifest.json") == text:  # a run was killed before it renamed it
                os.replace(partial, final)
            with writing(final):
                final.mkdir(parents=True, exist_ok=True)
        mirror.spread(final, known)

    def _note(self, entry: dict) -> None:
        """Updates the entry of a stage in plan.json."""
        at = next((i for i, e in enumerate(self.plan) if e["stage"] == entry["stage"]), len(self.plan))
        if self.plan[at:at + 1] != [entry]:
            self.plan[at:at + 1] = [entry]
            if self.world.first:
                write_json(self.run_dir / PLAN, self.about | {"stages": self.plan})

    def _origins(self, inputs: dict) -> dict[str, str]:
        def origin(artifact: Artifact) -> str:
            inside = self.run_dir in artifact.path.parents
            return artifact.path.relative_to(self.run_dir).as_posix() if inside else "outside"

        return _known(_walk(inputs, origin, lambda plain: None))

    def _state(self, final: Path, key: str, config: dict, hashes: dict, waiting: bool) -> tuple[str, str]:
        if not (final / "manifest.json").exists():
            return "to run", "partly done" if (final.parent / f"{final.name}.partial").exists() else ""
        manifest = read_manifest(final)
        if manifest["key"] == key:
            return "done", ""
        changed = [f"input {k.split(':')[0]} changed" for k in _differences(manifest["inputs"], _known(hashes))]
        if waiting:
            changed = ["its inputs are re-run"]
        return "stale", "; ".join(_differences(manifest["config"], config) + changed)

    def verify(self, artifacts: Any) -> None:
        """Checks the hashes of artifacts from earlier processes before their first use. Raises UserError on a mismatch.

        artifacts: an Artifact, or dicts and lists of them. Reads nothing while planning."""

        def check(artifact: Artifact) -> None:
            checked = self._checked & {artifact.path, *artifact.path.parents}
            if self.planning or not self.world.first or checked or self.run_dir not in artifact.path.parents:
                return
            self._checked.add(artifact.path)
            stage = next(p for p in [artifact.path, *artifact.path.parents] if (p / "manifest.json").exists())
            for name, entry in artifact.files.items():
                check_file(artifact.path / name, entry, f"delete the folder {stage} to re-run it")

        _walk(artifacts, check)

    def _check_outside(self, inputs: dict) -> None:
        """Raises UserError if an input from outside the run directory changed, so that the key does not say what the
        stage has read."""
        artifacts: list[Artifact] = []
        _walk(inputs, artifacts.append)
        for artifact in artifacts if mirror.keeps(self.world) else ():
            if self.run_dir not in artifact.path.parents:
                check_unchanged(artifact)

    def _run(self, stage: Stage, key: str, function, config: dict, inputs: dict, all_ranks: bool, about: dict) -> None:
        final, partial = self.run_dir / stage.name, stage.dir
        if mirror.keeps(self.world):
            if final.exists():
                self._set_aside(final)
            owner = partial / ".key"
            if partial.exists():
                is_ours = owner.exists() and owner.read_text(errors="replace") == key
                kept = {owner, partial / mirror.MET} if is_ours else {owner}
                remove(p for p in partial.rglob(".*") if p not in kept)
                if not is_ours and any(p != owner for p in partial.iterdir()):
                    self._set_aside(partial)
            with writing(partial):
                partial.mkdir(parents=True, exist_ok=True)
            write_atomic(owner, lambda p: p.write_text(key))
        stage.meet()
        started = time.perf_counter()
        if all_ranks or self.world.first:
            function(stage, **config, **_walk(inputs, lambda a: a.path))
        self.world.barrier()
        self._check_outside(inputs)
        if self.world.first:
            files = {k: v for k, v in list_files(partial).items() if k != "manifest.json"}
            with writing(partial):
                for folder in {partial / path for path in files} | {(partial / path).parent for path in files}:
                    sync(folder)
            manifest = {"stage": stage.name, "key": key, **about, "files": files, "counts": stage.counts,
                        "seconds": round(time.perf_counter() - started, 3), "ranks": self.world.size,
                        "versions": versions(), "created": datetime.now(UTC).isoformat(timespec="seconds")}
            manifest["inputs"] = _known(about["inputs"])
            write_json(partial / "manifest.json", manifest)
        mirror.spread(partial)
        if mirror.keeps(self.world):
            with writing(final):
                os.replace(partial, final)
                sync(final.parent)
            shutil.rmtree(final / WORK, ignore_errors=True)
        if self.world.first:
            self._checked.add(final)
            self._summary(manifest)
            for call in self.after:
                call(manifest)
        self.world.barrier()

    def _summary(self, manifest: dict) -> None:
        shown = [f"{k} {v:,.4g}" if isinstance(v, float) else f"{k} {v:,}" for k, v in manifest["counts"].items()]
        self.console.line(f"{manifest['stage']}: {manifest['seconds']:.1f} s  {'  '.join(shown)}")

    def _set_aside(self, path: Path) -> None:
        """Moves a stale artifact to stale/: a run never deletes its data."""
        target = self.run_dir / "stale"
        name = path.relative_to(self.run_dir).as_posix().replace("/", "-")
        with writing(target):
            target.mkdir(exist_ok=True)
            n = 1 + max((int(m[1]) for p in target.iterdir() if (m := re.match(r"(\d+)-", p.name))), default=-1)
            os.replace(path, target / f"{n:03}-{name}")

    def _load(self, final: Path) -> Artifact:
        files = read_manifest(final)["files"]
        return Artifact(final, content_hash(files), files)


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else None


def _lock_folder(folder: int) -> None:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # some network file systems lock files only
        pass


def _walk(tree, leaf, plain=lambda value: value):
    """Replaces every Artifact of a tree by leaf(artifact) and every other value by plain(value)."""
    if isinstance(tree, Artifact):
        return leaf(tree)
    if isinstance(tree, dict):
        return {k: _walk(v, leaf, plain) for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_walk(v, leaf, plain) for v in tree)
    return plain(tree)


def _flat(tree, prefix="") -> dict[str, Any]:
    """Dotted key -> value of a tree of dicts and lists."""
    if isinstance(tree, list | tuple):
        tree = dict(enumerate(tree))
    if isinstance(tree, dict):
        return {k: v for name, t in tree.items() for k, v in _flat(t, f"{prefix}{name}.").items()}
    return {prefix[:-1]: tree}


def _known(tree) -> dict[str, Any]:
    return {k: v for k, v in _flat(tree).items() if v is not None}


def _differences(old: dict, new: dict) -> list[str]:
    old, new = _flat(old), _flat(new)
    missing = object()
    return [f"{k}: {old.get(k, 'unset')} -> {new.get(k, 'unset')}" for k in sorted(old.keys() | new.keys())
            if old.get(k, missing) != new.get(k, missing)]
