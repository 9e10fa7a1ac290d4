"""Content hashes, atomic writes, and errors of the file system."""

import errno
import hashlib
import json
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
from safetensors import SafetensorError

from strop.trainer.errors import UserError


def cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "strop"


def check_file_type(path: Path) -> None:
    """Raises UserError if the path is neither a file nor a folder: reading a pipe or a device may never end."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"{path}: is a pipe, a socket or a device; name a file (save what it yields to one)")


def check_file_types(folder: Path) -> None:
    """check_file_type of all that is in the folder."""
    for path in folder.rglob("*"):
        check_file_type(path)


def hash_file(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def hash_json(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).hexdigest()


def sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def writing(path: Path, *temporary: Path):
    """Wraps code that writes `path`: an error of the file system becomes a UserError that names the path, and the
    `temporary` files or folders are deleted, which frees space on a full disk."""
    try:
        yield
    except (OSError, SafetensorError, pa.ArrowException) as e:
        remove(temporary)
        raise UserError(f"{path}: cannot be written ({reason_of(e)}); {remedy_of(e)}; completed stages are kept, and "
                         "the same command resumes") from e


def reason_of(error: Exception) -> str:
    """The error's message in one line of at most 300 characters."""
    text = " ".join((getattr(error, "strerror", None) or str(error)).split())
    return (text if len(text) <= 300 else text[:297] + "...") or type(error).__name__


def remedy_of(error: Exception) -> str:
    """What to do about an error of the file system. Errors from Rust and C++ have the errno in their text only."""
    match = re.search(r"(?:os error|errno) (\d+)", str(error))
    number = getattr(error, "errno", None) or (int(match[1]) if match else None)
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "free some space"
    if number in (errno.EROFS, errno.EACCES, errno.EPERM):
        return "make it writable or choose another output_dir="
    return "fix this or choose another output_dir="


def write_atomic(path: Path, write) -> None:
    """Calls `write(temporary_path)`, then atomically replaces `path`. Raises UserError if it cannot be written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path, temporary):
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, lambda p: p.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"))


def read_json(path: Path) -> Any:
    """Raises UserError if the file is missing or not JSON."""
    check_file_type(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as e:
        raise UserError(f"{path}: not readable as JSON ({e}); delete its folder to re-run the stage") from e


def remove(paths) -> None:
    """Deletes files and folders, where they exist."""
    for path in list(paths):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
