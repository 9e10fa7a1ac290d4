"""Files: content hashes, atomic writes, and what to say when the file system refuses."""

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
    """Around what writes `path`: an error of the file system becomes one line that names it (UserError), and the
    `temporary` files or folders go, so that a full disk gets its space back."""
    try:
        yield
    except (OSError, SafetensorError, pa.ArrowException) as e:
        for part in temporary:
            shutil.rmtree(part, ignore_errors=True) if part.is_dir() else part.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({reason_of(e)}); {remedy_of(e)}; the same command then goes on "
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

    Raises UserError, naming the file, where the disk is full or the folder cannot be written."""
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
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as e:
        raise UserError(f"{path}: not readable as JSON ({e}); delete its folder to have it made again") from e


def remove_leftovers(paths) -> None:
    """Removes files and folders that a killed process had not finished."""
    for path in list(paths):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
