"""The run directory: immutable artifacts with manifests, atomic writes, resume, staleness.

A stage writes into `<name>.partial/`, which survives a kill. When its function has returned, every file is hashed and
fsynced, `manifest.json` is written, and one rename to `<name>/` makes the artifact exist. A stage is done when a
directory of its name holds a manifest whose key equals the hash of its config and its inputs' contents.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError

if TYPE_CHECKING:  # those who only read run directories need no torch
    from strop.trainer.world import World

WORK = "work"  # a stage's scratch (step checkpoints); never part of the artifact
DROPS = pa.schema([(c, pa.string()) for c in ("stage", "prompt_id")] + [("sample_index", pa.int32())]
                  + [(c, pa.string()) for c in ("source", "reason", "detail")])


def hash_file(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def hash_json(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def writing(path: Path, *temporary: Path):
    """Around what writes `path`: an error of the file system becomes one line that names it (ValueError), and the
    `temporary` files or folders go, so that a full disk gets its space back."""
    try:
        yield
    except (OSError, SafetensorError, pa.ArrowException) as e:
        for part in temporary:
            shutil.rmtree(part, ignore_errors=True) if part.is_dir() else part.unlink(missing_ok=True)
        raise ValueError(f"{path}: cannot be written ({reason_of(e)}); {remedy_of(e)}; the same command then goes on "
                         "from here, what was finished stands") from e


def reason_of(error: Exception) -> str:
    """What went wrong, in one line."""
    return getattr(error, "strerror", None) or (str(error).strip().splitlines() or [type(error).__name__])[0]


def remedy_of(error: Exception) -> str:
    """What to do about an error of the file system; Rust and C++ say its number in the text only."""
    told = re.search(r"(?:os error|errno) (\d+)", str(error))
    number = getattr(error, "errno", None) or (int(told[1]) if told else None)
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "free some space"
    if number in (errno.EROFS, errno.EACCES, errno.EPERM):
        return "make it writable or choose another output_dir="
    return "see to that or choose another output_dir="


def write_atomic(path: Path, write) -> None:
    """Calls `write(temporary_path)`, then puts the file in place of `path` in one step.

    Raises ValueError, naming the file, where the disk is full or the folder cannot be written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path, temporary):
        write(temporary)
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, lambda p: p.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"))


def read_json(path: Path) -> Any:
    """Raises ValueError if the file is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as e:
        raise ValueError(f"{path}: not readable as JSON ({e}); delete its folder to have it made again") from e


def write_table(path: Path, table: pa.Table) -> None:
    """Writes Parquet, atomically, with the same bytes for the same rows and a checksum in every page."""
    write_atomic(path, lambda p: pq.write_table(table, p, compression="zstd", write_page_checksum=True))


def read_table(path: Path) -> pa.Table:
    """Raises ValueError if the file is missing, not Parquet or damaged."""
    try:
        return pq.read_table(path, partitioning=None, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as e:
        raise ValueError(f"{path}: not readable as Parquet ({reason_of(e)}); delete its folder to have it made "
                         "again") from e


def read_part(path: Path, schema: pa.Schema) -> pa.Table | None:
    """A part that an earlier process may have written: None if it is not there, is torn or is of another kind."""
    if not path.exists():
        return None
    try:
        table = read_table(path)
    except ValueError:
        return None
    return table if table.schema == schema else None


@dataclass(frozen=True)
class Artifact:
    """A directory and the hash of its content. `hash` is None where it is yet to be made (only while planning)."""

    path: Path
    hash: str | None
    files: dict[str, dict] = field(default_factory=dict, repr=False, compare=False)

    def sub(self, folder: str) -> Artifact:
        """The part below `folder`, with the hash of its own content: equal weights have equal hashes."""
        files = {k.removeprefix(folder + "/"): v for k, v in self.files.items() if k.startswith(folder + "/")}
        return Artifact(self.path / folder, content_hash(files) if self.hash else None, files)


def content_hash(files: dict[str, dict]) -> str:
    return hash_json({name: entry["hash"] for name, entry in files.items()})


def external(path: str | Path) -> Artifact:
    """A file or folder from outside the run directory, hashed by content."""
    path = Path(path).expanduser()
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    return Artifact(path, content_hash(files := list_files(path)), files)


def list_files(top: Path) -> dict[str, dict]:
    """Every file below `top` (or `top` itself) with its hash and size; scratch, hidden files and caches left out."""
    if top.is_file():
        return {top.name: {"hash": hash_file(top), "bytes": top.stat().st_size}}
    found = {}
    for path in sorted(p for p in top.rglob("*") if p.is_file()):
        name = path.relative_to(top)
        if name.parts[0] != WORK and not any(part.startswith(".") for part in name.parts):
            found[name.as_posix()] = {"hash": hash_file(path), "bytes": path.stat().st_size}
    return found


def read_manifest(folder: Path) -> dict:
    """Raises ValueError if the folder's manifest is missing or is none."""
    manifest = read_json(folder / "manifest.json")
    if not isinstance(manifest, dict) or not {"key", "config", "inputs", "files"} <= manifest.keys():
        raise ValueError(f"{folder / 'manifest.json'}: damaged, it is no manifest; delete its folder to have it made "
                         "again")
    return manifest


def check_file(path: Path, entry: dict, remedy: str) -> None:
    """Raises ValueError unless the file's content is what `entry`, as `list_files` made it, says."""
    if not path.exists():
        raise ValueError(f"{path}: missing; {remedy}")
    if path.stat().st_size != entry["bytes"] or hash_file(path) != entry["hash"]:
        raise ValueError(f"{path}: damaged, its content is not what was written; {remedy}")


def remove_leftovers(paths) -> None:
    """Removes files and folders that a killed process had not finished."""
    for path in list(paths):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


@dataclass
class Stage:
    """What a stage's entry function is handed."""

    name: str
    dir: Path
    world: World
    console: Any
    metrics: Any
    counts: dict[str, float] = field(default_factory=dict)

    @property
    def work(self) -> Path:
        """Scratch that survives a kill and goes when the stage is done."""
        path = self.dir / WORK
        path.mkdir(parents=True, exist_ok=True)
        return path


class Drops:
    """Rows that a stage leaves out, each with its reason; written as drops.parquet and counted."""

    def __init__(self, stage: Stage):
        self.stage, self.rows = stage, []

    def add(self, reason: str, *, prompt_id=None, sample_index=None, source=None, detail="") -> None:
        self.rows.append({"stage": self.stage.name, "prompt_id": prompt_id, "sample_index": sample_index,
                          "source": source, "reason": reason, "detail": str(detail)})

    def write(self) -> None:
        write_table(self.stage.dir / "drops.parquet", pa.Table.from_pylist(self.rows, schema=DROPS))
        for row in self.rows:
            name = f"dropped/{row['reason']}"
            self.stage.counts[name] = self.stage.counts.get(name, 0) + 1


def _walk(tree, leaf):
    if isinstance(tree, Artifact):
        return leaf(tree)
    if isinstance(tree, dict):
        return {k: _walk(v, leaf) for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_walk(v, leaf) for v in tree)
    return tree


def _flat(tree, prefix="") -> dict[str, Any]:
    if isinstance(tree, dict):
        return {k: v for name, t in tree.items() for k, v in _flat(t, f"{prefix}{name}.").items()}
    if isinstance(tree, list | tuple):
        return {k: v for i, t in enumerate(tree) for k, v in _flat(t, f"{prefix}{i}.").items()}
    return {prefix[:-1]: tree}


def _differences(old: dict, new: dict) -> list[str]:
    old, new = _flat(old), _flat(new)
    missing = object()
    return [f"{k}: {old.get(k, 'unset')} -> {new.get(k, 'unset')}" for k in sorted(old.keys() | new.keys())
            if old.get(k, missing) != new.get(k, missing)]


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("strop", "torch", "transformers", "peft", "reasoning-gym"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


class Store:
    """One run directory. With `plan=True` nothing is started and nothing is written: `plans` tells what would be."""

    def __init__(self, run_dir: Path, world: World, console: Any, metrics: Any = None, plan: bool = False):
        self.run_dir, self.world, self.console, self.metrics, self.plan = run_dir, world, console, metrics, plan
        self.after: list = []  # called in turn, on the first rank, with the manifest of each stage that was made
        self.plans: list[tuple[str, str, str]] = []  # (stage, done | stale | to run, why)
        self.manifests: dict[str, dict] = {}
        self._checked: set[Path] = set()
        self._lock = None

    def lock(self) -> None:
        """Takes the run directory for this process. Raises ValueError if another one holds it."""
        if not self.world.first:
            return
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = open(self.run_dir / ".lock", "a+")  # noqa: SIM115 - held for the life of the process
        except OSError as e:
            raise ValueError(f"{self.run_dir}: cannot be written ({e.strerror}); {remedy_of(e)}") from e
        # a process that was just killed may hold it for a moment yet, by a child that was killed with it
        for patience in (0.1, 0.2, 0.4, 0.8, 0):
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as e:
                self._lock.seek(0)
                holder = self._lock.read().strip() or "?"
                if not patience:
                    raise ValueError(f"{self.run_dir}: process {holder} is running it; wait for it to end or choose "
                                     "another name=") from e
                time.sleep(patience)
        with writing(self.run_dir / ".lock"):
            self._lock.truncate(0)
            self._lock.write(str(os.getpid()))
            self._lock.flush()
        remove_leftovers(self.run_dir.glob(".*.tmp"))

    def stage(self, name: str, function, recipe, config: dict, all_ranks: bool = False, depends: dict | None = None,
              **inputs) -> Artifact:
        """The artifact of stage `name`: as it stands if it is done and fresh, else made by
        `function(stage, recipe, **inputs)`.

        `config` is all of the recipe that the stage depends on; `inputs` holds artifacts (in dicts and lists too, their
        paths are handed to the function) and plain values; `depends` holds artifacts that the function finds by itself.
        With `all_ranks` every rank calls the function, else rank 0.
        """
        config, hashes = json.loads(json.dumps(config)), _walk(inputs | (depends or {}), lambda a: a.hash)
        final, key = self.run_dir / name, hash_json({"stage": name, "config": config, "inputs": hashes})
        state, why = self._state(final, key, config, hashes)
        if self.plan:
            self.plans.append((name, state, why))
            return self._load(final, name) if state == "done" else Artifact(final, None)
        self.world.barrier()  # all ranks have read the state before anything moves
        if state != "done":
            if state == "stale":
                self.console.warn(f"{name}: made again, because {why or 'its manifest changed'}; the old one is kept "
                                  f"in {self.run_dir / 'stale'}")
            self.verify(inputs)
            self._make(final, name, key, function, recipe, config, all_ranks, inputs, hashes)
        elif self.world.first:
            self.console.line(f"{name}: done before, kept")
            shutil.rmtree(final / WORK, ignore_errors=True)
        return self._load(final, name)

    def _state(self, final: Path, key: str, config: dict, hashes: dict) -> tuple[str, str]:
        upstream = [k for k, v in _flat(hashes).items() if v is None]
        if not (final / "manifest.json").exists():
            return "to run", "partly made" if (final.parent / f"{final.name}.partial").exists() else ""
        manifest = read_manifest(final)
        if manifest["key"] == key:
            return "done", ""
        changed = _differences(manifest["config"], config) + [
            f"input {k.split(':')[0]} changed" for k in _differences(manifest["inputs"], hashes)]
        if upstream:
            changed = [*_differences(manifest["config"], config), "what it is made from will be made again"]
        return "stale", "; ".join(changed)

    def verify(self, artifacts: Any) -> None:
        """Re-hashes artifacts of earlier processes before they are used, once. Raises ValueError on corruption.

        `artifacts` is an Artifact, or dicts and lists of them; a plan reads none."""

        def check(artifact: Artifact) -> None:
            own = self.run_dir in artifact.path.parents
            if self.plan or not self.world.first or not own or self._checked & {artifact.path, *artifact.path.parents}:
                return
            self._checked.add(artifact.path)
            parts = artifact.path.relative_to(self.run_dir).parts
            stage = self.run_dir.joinpath(*parts[:2 if parts[0].startswith("round-") else 1])
            for name, entry in artifact.files.items():
                check_file(artifact.path / name, entry, f"delete the folder {stage} to have it made again")

        _walk(artifacts, check)

    def _make(self, final, name, key, function, recipe, config, all_ranks, inputs, hashes) -> None:
        partial = final.parent / f"{final.name}.partial"
        if self.world.first:
            if final.exists():
                self._set_aside(final)
            owner = partial / ".key"
            if partial.exists():
                remove_leftovers(p for p in partial.rglob(".*") if p != owner)
                if (owner.read_text() if owner.exists() else "") != key and any(p != owner for p in partial.iterdir()):
                    self._set_aside(partial)
            with writing(partial):
                partial.mkdir(parents=True, exist_ok=True)
            write_atomic(owner, lambda p: p.write_text(key))
        self.world.barrier()
        started = time.perf_counter()
        stage = Stage(name, partial, self.world, self.console, self.metrics)
        if all_ranks or self.world.first:
            function(stage, recipe, **_walk(inputs, lambda a: a.path))
        self.world.barrier()
        if self.world.first:
            files = {k: v for k, v in list_files(partial).items() if k != "manifest.json"}
            with writing(partial):
                for folder in {partial / path for path in files} | {(partial / path).parent for path in files}:
                    _sync(folder)
            manifest = {"stage": name, "key": key, "inputs": _flat(hashes), "config": config, "files": files,
                        "counts": stage.counts, "seconds": round(time.perf_counter() - started, 3),
                        "ranks": self.world.size, "versions": versions(),
                        "created": datetime.now(UTC).isoformat(timespec="seconds")}
            manifest["inputs"] = {k: v for k, v in manifest["inputs"].items() if v is not None}
            write_json(partial / "manifest.json", manifest)
            with writing(final):
                os.replace(partial, final)
                _sync(final.parent)
            shutil.rmtree(final / WORK, ignore_errors=True)
            self._checked.add(final)
            self._summary(manifest)
            for call in self.after:
                call(manifest)
        self.world.barrier()

    def _summary(self, manifest: dict) -> None:
        shown = [f"{k} {v:,.4g}" if isinstance(v, float) else f"{k} {v:,}" for k, v in manifest["counts"].items()]
        self.console.line(f"{manifest['stage']}: {manifest['seconds']:.1f} s  {'  '.join(shown)}")

    def _set_aside(self, path: Path) -> None:
        """Moves a stale artifact away: data already made is never deleted by a run."""
        target = self.run_dir / "stale"
        name = path.relative_to(self.run_dir).as_posix().replace("/", "-")
        with writing(target):
            target.mkdir(exist_ok=True)
            n = 1 + max((int(p.name[:3]) for p in target.iterdir() if p.name[:3].isdigit()), default=-1)
            os.replace(path, target / f"{n:03}-{name}")

    def _load(self, final: Path, name: str) -> Artifact:
        manifest = read_manifest(final)
        self.manifests[name] = manifest
        return Artifact(final, content_hash(manifest["files"]), manifest["files"])
