"""Artifacts: immutable directories that are identified by the hash of their content."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from strop.trainer.errors import UserError
from strop.trainer.run.files import hash_file, hash_json, read_json

WORK = "work"  # a stage's scratch (step checkpoints); never part of the artifact


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

    @property
    def model(self) -> Artifact:
        """The weights of a stage that trains or merges."""
        return self.sub("model")


def content_hash(files: dict[str, dict]) -> str:
    return hash_json({name: entry["hash"] for name, entry in files.items()})


def external(path: str | Path, counts=lambda name: True) -> Artifact:
    """A file or folder from outside the run directory, hashed by the content of the files whose name `counts`.

    Raises UserError if it does not exist."""
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    files = {name: {"hash": _hash_once(str(path if path.is_file() else path / name), *stamp), "bytes": stamp[1]}
             for name, stamp in _stamps(path).items() if counts(name)}
    return Artifact(path, content_hash(files), files)


@lru_cache(maxsize=4096)
def _hash_once(path: str, changed_ns: int, size: int) -> str:
    """Planning and running hash the same inputs; a large file is read once."""
    return hash_file(Path(path))


def list_files(top: Path) -> dict[str, dict]:
    """Every file below `top` (or `top` itself) with its hash and size; scratch, hidden files and caches left out."""
    return {name: {"hash": hash_file(top if top.is_file() else top / name), "bytes": size}
            for name, (_, size) in _stamps(top).items()}


def _stamps(top: Path) -> dict[str, tuple[int, int]]:
    """Relative path -> (time of the last change in ns, size) of the files that count."""
    found = {}
    for path in [top] if top.is_file() else sorted(p for p in top.rglob("*") if p.is_file()):
        name = path.relative_to(top if top.is_dir() else top.parent)
        if (name.parts[0] != WORK and not any(part.startswith(".") for part in name.parts)) or path == top:
            found[name.as_posix()] = (path.stat().st_mtime_ns, path.stat().st_size)
    return found


def read_manifest(folder: Path) -> dict:
    """Raises UserError if the folder's manifest is missing or is none."""
    manifest = read_json(folder / "manifest.json")
    if not isinstance(manifest, dict) or not {"key", "config", "inputs", "files"} <= manifest.keys():
        raise UserError(f"{folder / 'manifest.json'}: damaged, it is no manifest; delete its folder to have it made "
                         "again")
    return manifest


def check_file(path: Path, entry: dict, remedy: str) -> None:
    """Raises UserError unless the file's content is what `entry`, as `list_files` made it, says."""
    if not path.exists():
        raise UserError(f"{path}: missing; {remedy}")
    if path.stat().st_size != entry["bytes"] or hash_file(path) != entry["hash"]:
        raise UserError(f"{path}: damaged, its content is not what was written; {remedy}")


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("strop", "torch", "transformers", "peft", "reasoning-gym"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
