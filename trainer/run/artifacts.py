"""Artifacts: immutable directories, identified by the hash of their content."""

from __future__ import annotations

import platform
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path

from strop.trainer.errors import UserError
from strop.trainer.run.files import check_file_type, hash_file, hash_json
from strop.trainer.run.records import MANIFEST, read_record

WORK = "work"  # scratch space of a stage (step checkpoints), not part of its artifact


@dataclass(frozen=True)
class Artifact:
    """A directory and the hash of its content. While planning, `hash` is None if the artifact does not exist yet."""

    path: Path
    hash: str | None
    files: dict[str, dict] = field(default_factory=dict, repr=False, compare=False)

    def sub(self, folder: str) -> Artifact:
        """The subfolder `folder`, hashed by its content alone: equal weights have equal hashes."""
        files = {k.removeprefix(folder + "/"): v for k, v in self.files.items() if k.startswith(folder + "/")}
        return Artifact(self.path / folder, content_hash(files) if self.hash else None, files)

    @property
    def model(self) -> Artifact:
        """The weights that a training or merging stage wrote."""
        return self.sub("model")


def content_hash(files: dict[str, dict]) -> str:
    return hash_json({name: entry["hash"] for name, entry in files.items()})


def external(path: str | Path, counts=lambda name: True) -> Artifact:
    """A file or folder outside the run directory, hashed by the content of the files whose relative path `counts`.

    Raises UserError if it does not exist."""
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    check_file_type(path)
    files = list_files(path, counts)
    return Artifact(path, content_hash(files), files)


def check_unchanged(artifact: Artifact) -> None:
    """Raises UserError if a file of an artifact outside the run directory is not what it was when it was hashed."""
    for name, entry in artifact.files.items():
        path = artifact.path if name == artifact.path.name and not artifact.path.is_dir() else artifact.path / name
        if not path.exists() or _entry(path)["hash"] != entry["hash"]:
            raise UserError(f"{path}: {'changed' if path.exists() else 'deleted'} while the run was going; the same "
                            "command re-runs what depends on it")


@lru_cache(maxsize=4096)
def _hash_once(path: str, *state: int) -> str:
    return hash_file(Path(path))  # planning and running hash the same large files


def _entry(path: Path) -> dict:
    stat = path.stat()
    state = stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_size
    return {"hash": _hash_once(str(path), *state), "bytes": stat.st_size}


def list_files(top: Path, counts=lambda name: True) -> dict[str, dict]:
    """{relative path: {"hash", "bytes"}} of the files below `top` (or of `top` itself) whose relative path `counts`,
    except scratch and hidden."""
    found = {}
    for path in [top] if top.is_file() else sorted(top.rglob("*")):
        name = path.relative_to(top if top.is_dir() else top.parent)
        known = name.parts[0] != WORK and not any(part.startswith(".") for part in name.parts)
        if path != top and not (known and counts(name.as_posix())):
            continue
        check_file_type(path)
        if path.is_file():
            found[name.as_posix()] = _entry(path)
    return found


def read_manifest(folder: Path) -> dict:
    """Raises UserError if the folder's manifest is missing or not a manifest."""
    return read_record(folder / "manifest.json", MANIFEST)


def check_file(path: Path, entry: dict, remedy: str) -> None:
    """Raises UserError unless the file matches `entry`, its hash and size as `list_files` returns them."""
    if not path.exists():
        raise UserError(f"{path}: missing; {remedy}")
    if path.stat().st_size != entry["bytes"] or hash_file(path) != entry["hash"]:
        raise UserError(f"{path}: damaged, its content does not match its hash; {remedy}")


@cache
def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("strop", "torch", "transformers", "peft", "reasoning-gym"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
